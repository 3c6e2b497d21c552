"""Checkpoints: every format that real ones come in, and a named tensor for everything that can be wrong with one."""

import json
import shutil
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from bench.files.faults import edit_header
from hisa_jax import models
from hisa_jax.models.safetensors_io import Reader

from . import golden

FP8 = golden.FOLDER / "fp8_loader"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


@pytest.fixture
def fp8_copy(tmp_path):
    for file in ("config.json", "model.safetensors.index.json", *SHARDS):
        shutil.copy(FP8 / file, tmp_path / file)
    return tmp_path


def test_block_scaled_tensors_are_exact_with_partial_last_blocks(tmp_path):
    shutil.copy(FP8 / "blocks.safetensors", tmp_path)
    reader = Reader(tmp_path, (128, 128))
    with np.load(FP8 / "blocks_expected.npz") as expected:
        for name, want in expected.items():
            got = reader.tensor(f"{name}.weight")
            assert got.dtype == np.float32 and got.shape == reader.shape(f"{name}.weight")
            np.testing.assert_array_equal(got[:, : want.shape[1]], want, name)


def test_an_fp8_checkpoint_in_shards_gives_its_golden_logits():
    numbers = golden.numbers("fp8_loader")
    out = models.from_pretrained(FP8).run(golden.ids("fp8_loader"), trace=True)
    for i, layer in enumerate(out.layers):
        want = numbers[f"L{i}.index_selected"]
        np.testing.assert_array_equal(golden.as_mask(layer.selection, want.shape[-1]), want, f"selection of layer {i}")
        golden.assert_close(layer.hidden, numbers[f"L{i}.hidden"], golden.HIDDEN, f"output of layer {i}")
    golden.assert_close(out.logits, numbers["logits"], golden.LOGITS)


def test_block_size_comes_from_the_config(fp8_copy):
    keys = json.loads((fp8_copy / "config.json").read_text())
    keys["quantization_config"]["weight_block_size"] = [64, 32]
    (fp8_copy / "config.json").write_text(json.dumps(keys))
    with pytest.raises(models.CheckpointError, match=r"one scale for each 64 x 32 block of"):
        models.from_pretrained(fp8_copy)


@pytest.mark.slow
def test_bfloat16_keeps_norms_router_and_index_head_weights_in_float32():
    model = models.from_pretrained(golden.FOLDER / "dsv32", dtype=jnp.bfloat16)
    float32 = {
        ".".join(map(str, path)) for path, x in nnx.to_flat_state(nnx.state(model)) if x[...].dtype != jnp.bfloat16
    }
    layer = {name.split(".", 2)[2] for name in float32 if name.startswith("layers.1.")}
    assert layer == {
        "attention_norm", "mlp_norm", "attention.q_a_norm", "attention.kv_a_norm", "attention.indexer.k_norm",
        "attention.indexer.k_norm_bias", "attention.indexer.w", "mlp.router", "mlp.router_bias",
    }  # fmt: skip
    assert model(golden.ids("dsv32")).dtype == jnp.float32


def test_the_model_does_not_change_with_the_file_it_was_read_from(tmp_path):
    folder = golden.write_checkpoint(tmp_path, "glm5")
    model = models.from_pretrained(folder)
    before = np.array(model.norm[...])
    with (folder / "model.safetensors").open("r+b") as file:
        size = file.seek(0, 2)
        file.seek(0)
        file.write(bytes(size))
    np.testing.assert_array_equal(model.norm[...], before)


def test_loading_holds_the_model_once(tmp_path):
    """Megabytes of experts in bfloat16: what is allocated on the way stays within a fraction of that."""

    def grow(tensors):
        for name, tensor in tensors.items():
            if "experts." in name:
                tensors[name] = tensor.repeat(64, axis=0 if "down" not in name else 1)

    folder = golden.write_checkpoint(tmp_path, "glm5", grow, moe_intermediate_size=1024)
    model_bytes = sum(x.nbytes for x in jax.tree.leaves(nnx.state(models.from_pretrained(folder, dtype=jnp.bfloat16))))
    tracemalloc.start()
    models.from_pretrained(folder, dtype=jnp.bfloat16)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1.3 * model_bytes + 1e6, f"{peak / 1e6:.1f} MB at the peak for a model of {model_bytes / 1e6:.1f} MB"


@pytest.mark.slow
def test_tied_embeddings_need_no_head(tmp_path):
    def tie(tensors):
        del tensors["lm_head.weight"]

    model = models.from_pretrained(golden.write_checkpoint(tmp_path, "glm5", tie, tie_word_embeddings=True))
    out = model.run(golden.ids("glm5"), trace=True)
    normed = out.layers[-1].hidden * jax.lax.rsqrt(jnp.mean(out.layers[-1].hidden ** 2, -1, keepdims=True) + 1e-5)
    golden.assert_close(out.logits, normed * model.norm[...] @ model.embed[...].T, 1e-5)


def renamed(old, new):
    def change(tensors):
        tensors[new] = tensors.pop(old)

    return change


NORM = "model.layers.1.post_attention_layernorm.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(NORM), f"{NORM} in .*: missing"),
        (lambda t: [t.pop(name) for name in list(t) if ".experts.3." in name], "and 5 more in .*: missing"),
        (renamed(NORM, "model.layers.1.extra.weight"), f"{NORM} in .*: missing"),
        (lambda t: t.update(extra=np.ones(3, np.float32)), r"extra in .*model\.safetensors: unexpected"),
        (
            lambda t: t.update({NORM: np.ones(41, np.float32)}),
            rf"{NORM} in .*model\.safetensors: is \[41\], wanted \[40\]",
        ),
        (
            lambda t: t.update({NORM: np.full(40, np.nan, np.float32)}),
            f"{NORM} in .*: holds numbers that are not finite",
        ),
        (lambda t: t.update({NORM: np.ones(40, np.int32)}), f"{NORM} in .*: has dtype I32, wanted one of BF16"),
        (
            lambda t: t.update({f"{NORM}_scale_inv": np.ones((1, 1), np.float32)}),
            f"{NORM}_scale_inv in .*: unexpected",
        ),
    ],
)
def test_a_tensor_that_does_not_fit_is_named_with_its_file(tmp_path, change, message):
    with pytest.raises(models.CheckpointError, match=message):
        models.from_pretrained(golden.write_checkpoint(tmp_path, "glm5", change))


def swap_offsets(header):
    header["lm_head.weight"]["data_offsets"] = header["model.embed_tokens.weight"]["data_offsets"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: f.write_bytes(f.read_bytes()[:-1]), r"\S+ in .*model\.safetensors: ends at byte .* truncated"),
        (lambda f: f.write_bytes(f.read_bytes()[:100]), r"model\.safetensors: has 100 bytes, too few for its header"),
        (lambda f: f.write_bytes(b""), r"model\.safetensors: has 0 bytes, too few"),
        (lambda f: f.write_bytes(f.read_bytes() + b"x"), r"model\.safetensors: has .* bytes, its tensors end at"),
        (lambda f: f.write_bytes((2).to_bytes(8, "little") + b"[]"), r"model\.safetensors: corrupt header"),
        (lambda f: f.write_bytes((2).to_bytes(8, "little") + b"\xff\xff"), r"model\.safetensors: corrupt header"),
        (lambda f: edit_header(f, swap_offsets), r"lm_head\.weight in .*: starts at byte .*: corrupt header"),
        (lambda f: edit_header(f, lambda h: h[NORM].update(shape=[39])), f"{NORM} in .*: takes 80 bytes, but BF16"),
        (lambda f: edit_header(f, lambda h: h[NORM].update(shape=["a"])), f"{NORM} in .*corrupt header"),
        (
            lambda f: edit_header(f, lambda h: h[NORM].pop("dtype")),
            f"{NORM} in .*, wanted dtype, shape and data_offsets",
        ),
    ],
)
def test_a_file_that_is_cut_short_or_corrupt_is_named(tmp_path, damage, message):
    folder = golden.write_checkpoint(tmp_path, "glm5")
    damage(folder / "model.safetensors")
    with pytest.raises(models.CheckpointError, match=message):
        models.from_pretrained(folder)


def edit_index(folder, change):
    file = folder / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    change(index["weight_map"])
    file.write_text(json.dumps(index))


GATE = "model.layers.0.mlp.gate_proj.weight"  # in the first shard, its scale in the second


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda m: m.update({GATE: SHARDS[1]}), models.CheckpointError, f"{GATE} in .*00001.*: .* has it in .*00002"),
        (lambda m: m.pop(GATE), models.CheckpointError, f"{GATE} in .*00001.*: .* has it in None"),
        (lambda m: m.update(more=SHARDS[0]), models.CheckpointError, "more in .*00001.*: the index has it there"),
        (lambda m: m.update(more="gone.safetensors"), FileNotFoundError, "more in .*gone.safetensors: .* missing"),
    ],
)
def test_shards_that_do_not_hold_what_the_index_says_are_named(fp8_copy, change, error, message):
    edit_index(fp8_copy, change)
    with pytest.raises(error, match=message):
        models.from_pretrained(fp8_copy)


def test_an_index_that_is_none_is_named(fp8_copy):
    (fp8_copy / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(models.CheckpointError, match=r"index\.json: corrupt index"):
        models.from_pretrained(fp8_copy)


def rewrite_scale(folder, value):
    """Replaces the bytes of one scale [1, 1], or drops it."""
    name, file = f"{GATE}_scale_inv", folder / SHARDS[1]
    if value is None:
        edit_header(file, lambda header: header.update({f"{GATE}_other": header.pop(name)}))
        edit_index(folder, lambda m: m.update({f"{GATE}_other": m.pop(name)}))
        return
    entry = Reader(folder).entries[name]
    data = bytearray(file.read_bytes())
    data[entry.start : entry.stop] = np.float32(value).tobytes()
    file.write_bytes(data)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.nan, f"{GATE}_scale_inv in .*00002.*: holds nan, wanted positive numbers"),
        (-1.0, f"{GATE}_scale_inv in .*00002.*: holds -1.0, wanted positive numbers"),
        (np.inf, f"{GATE}_scale_inv in .*00002.*: holds inf, wanted positive numbers"),
        (None, f"{GATE}_other in .*00002.*: unexpected"),
    ],
)
def test_a_bad_scale_is_named(fp8_copy, value, message):
    rewrite_scale(fp8_copy, value)
    with pytest.raises(models.CheckpointError, match=message):
        models.from_pretrained(fp8_copy)


def test_a_missing_scale_is_named(fp8_copy):
    name = f"{GATE}_scale_inv"
    # Named like a tensor of a prediction layer, it is skipped, and the weight stands without it.
    skipped = "model.layers.3.spare_scale_inv"
    edit_header(fp8_copy / SHARDS[1], lambda header: header.update({skipped: header.pop(name)}))
    edit_index(fp8_copy, lambda m: m.update({skipped: m.pop(name)}))
    with pytest.raises(models.CheckpointError, match=f"{GATE} in .*00001.*: is F8_E4M3, but {name} is missing"):
        models.from_pretrained(fp8_copy)


def test_a_folder_without_one_file_or_an_index_is_refused(tmp_path):
    folder = golden.write_checkpoint(tmp_path, "glm5")
    shutil.copy(folder / "model.safetensors", folder / "model-2.safetensors")
    with pytest.raises(FileNotFoundError, match=r"holds 2 \.safetensors files and no model\.safetensors\.index\.json"):
        models.from_pretrained(folder)


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.float16])
def test_a_dtype_that_no_model_has_is_refused(dtype):
    with pytest.raises(ValueError, match=r"dtype is .*, wanted float32 or bfloat16"):
        models.from_pretrained(golden.FOLDER / "glm5", dtype=dtype)
