"""Forms that checkpoints of the same model come in: each loads as the plain one does, to the last bit."""

import json
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from hisa_jax import models
from hisa_jax.models.settings import QUANTIZATION, ROPE, SETTINGS

from . import golden

REQUIRED = {
    "model_type", "vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size", "num_hidden_layers",
    "num_attention_heads", "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim",
    "index_n_heads", "index_head_dim", "index_topk", "n_routed_experts", "n_shared_experts", "num_experts_per_tok",
    "n_group", "topk_group", "routed_scaling_factor", "rms_norm_eps", "max_position_embeddings",
}  # fmt: skip


def keys_of(case):
    return json.loads((golden.FOLDER / case / "config.json").read_text())


def assert_same_model(got, want):
    assert got.config == want.config
    jax.tree.map(np.testing.assert_array_equal, nnx.state(got), nnx.state(want))


def rewritten(folder, case, change, **config):
    return models.from_pretrained(golden.write_checkpoint(folder, case, change, **config))


@pytest.mark.parametrize("case", [*golden.CASES, *golden.VARIANTS])
@pytest.mark.parametrize("name", sorted(SETTINGS))
def test_null_is_as_good_as_absent_whatever_the_key(case, name):
    keys = keys_of(case)
    absent = {key: value for key, value in keys.items() if key != name}
    results = []
    for given in (absent, keys | {name: None}):
        try:
            results.append(models.config_from_keys(given))
        except ValueError as error:
            results.append(str(error))
    assert results[0] == results[1]
    assert isinstance(results[0], str) == (name in REQUIRED or (name == "rope_parameters" and "rope_theta" not in keys))


@pytest.mark.parametrize("outer", ["rope_parameters", "rope_scaling", "quantization_config"])
def test_null_is_as_good_as_absent_within_an_object(outer):
    quantization = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [64, 32], "scale_fmt": "ue8m0"}
    keys = keys_of("dsv32") | {"rope_theta": 5e3, "quantization_config": quantization}
    keys["rope_scaling"] = keys["rope_parameters"] | {
        "type": "yarn",
        "factor": 2.0,
        "attention_factor": 1.5,
        "mscale": 2,
    }
    rules = QUANTIZATION if outer == "quantization_config" else ROPE
    for name in rules:
        given = keys[outer]
        absent = {key: value for key, value in given.items() if key != name}
        want = models.config_from_keys(keys | {outer: absent})
        assert models.config_from_keys(keys | {outer: given | {name: None}}) == want, name
    assert models.config_from_keys(keys).weight_block_size == (64, 32)
    without = models.config_from_keys(keys | {"quantization_config": quantization | {"weight_block_size": None}})
    assert without.weight_block_size == (128, 128)


def test_an_indexers_rope_without_a_layout_has_its_familys():
    for case, is_interleaved in (("dsv32", False), ("glm5", True)):
        config = models.config_from_keys(keys_of(case) | {"indexer_rope_interleave": None})
        assert config.indexer_rope_interleave == is_interleaved


@pytest.mark.parametrize("kinds", ["FSF", "FFS", "FSS"])
def test_indexers_of_layers_that_share_a_selection_are_skipped(tmp_path, kinds):
    def drop(tensors):
        for layer, kind in enumerate(kinds):
            for name in [name for name in tensors if kind == "S" and f"layers.{layer}.self_attn.indexer." in name]:
                del tensors[name]

    want = rewritten(tmp_path / "bare", "dsv32", drop, index_topk_pattern=kinds)
    got = rewritten(tmp_path / "full", "dsv32", lambda tensors: None, index_topk_pattern=kinds)
    assert [kind[0].upper() for kind in got.config.indexer_kinds] == list(kinds)
    assert_same_model(got, want)


def test_a_head_beside_tied_embeddings_is_skipped(tmp_path):
    want = rewritten(tmp_path / "bare", "glm5", lambda t: t.pop("lm_head.weight"), tie_word_embeddings=True)
    got = rewritten(tmp_path / "both", "glm5", lambda t: None, tie_word_embeddings=True)
    assert got.head is None
    assert_same_model(got, want)


def test_stored_frequencies_are_skipped(tmp_path):
    def add(tensors):
        for name in ("model.rotary_emb.inv_freq", "model.layers.1.self_attn.rotary_emb.inv_freq"):
            tensors[name] = np.ones(4, np.float32)

    assert_same_model(rewritten(tmp_path, "glm5", add), golden.model("glm5"))


@pytest.mark.parametrize("layers", [1, 2])
def test_a_model_may_be_cut_short(tmp_path, layers):
    """`num_hidden_layers` alone is changed; lists of one value a layer keep theirs."""

    def drop(tensors):
        for name in [name for name in tensors if name.startswith("model.layers.")]:
            if int(name.split(".")[2]) >= layers:
                del tensors[name]

    lists = {"mlp_layer_types": ["dense", "sparse"][:layers], "indexer_types": ["full"] * layers}
    want = rewritten(tmp_path / "short", "glm5", drop, num_hidden_layers=layers, **lists)
    got = rewritten(tmp_path / "cut", "glm5", lambda t: None, num_hidden_layers=layers)
    assert len(got.layers) == layers
    assert_same_model(got, want)


@pytest.mark.parametrize("count", [0, 1, None])
def test_prediction_layers_are_skipped_whatever_they_hold(tmp_path, count):
    def add(tensors):
        for dtype in (np.uint8, np.int32, np.bool_, np.float16, ml_dtypes.float8_e5m2):
            tensors[f"model.layers.3.{np.dtype(dtype)}.weight"] = np.ones((2, 3), dtype)
        tensors["model.layers.4.mlp.experts.gate_up_proj"] = np.ones(7, np.float32)

    got = rewritten(tmp_path, "glm5", add, num_nextn_predict_layers=count)
    assert got.config.num_nextn_predict_layers == count
    jax.tree.map(np.testing.assert_array_equal, nnx.state(got), nnx.state(golden.model("glm5")))


def sharded(folder, case, places, extra=()):
    """Writes a case in shards, `places` from a tensor's name to its shard, and an index of them and of `extra`."""
    golden.write_checkpoint(folder, case)
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {name: places(name) for name in tensors} | dict(extra)
    for shard in {places(name) for name in tensors}:
        safetensors.numpy.save_file({n: x for n, x in tensors.items() if places(n) == shard}, folder / shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def test_a_shard_of_nothing_that_is_needed_may_be_missing(tmp_path):
    extra = {"model.layers.3.eh_proj.weight": "gone.safetensors", "model.layers.3.enorm.weight": "a.safetensors"}
    folder = sharded(tmp_path, "glm5", lambda name: "a.safetensors" if "1" in name else "b.safetensors", extra)
    assert_same_model(models.from_pretrained(folder), golden.model("glm5"))
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"]["more.weight"] = "gone.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(FileNotFoundError, match=r"more\.weight in .*gone\.safetensors: .* missing"):
        models.from_pretrained(folder)


def blocks(values, scales, dtype, folder):
    """A Reader's tensor of one F8_E4M3 matrix in blocks of 2 x 2."""
    tensors = {"a.weight": values.astype(ml_dtypes.float8_e4m3fn), "a.weight_scale_inv": scales.astype(dtype)}
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    return models.safetensors_io.Reader(folder, (2, 2)).tensor("a.weight")


VALUES = np.array([[1, 2, -3, 4, 5], [6, 7, 8, 9, 10], [11, 12, 13, 14, 15]], np.float32)


def test_scales_may_be_powers_of_two_of_8_bits(tmp_path):
    exponents = np.array([[0, 127, 254], [126, 100, 1]], np.uint8)
    values = VALUES.copy()
    values[:, 4] = 0  # 2^127 times 5 is too large for a float32
    want = (values * np.ldexp(1.0, exponents.astype(int) - 127).repeat(2, 0)[:3].repeat(2, 1)[:, :5]).astype(np.float32)
    got = blocks(values, exponents.view(ml_dtypes.float8_e8m0fnu), ml_dtypes.float8_e8m0fnu, tmp_path)
    np.testing.assert_array_equal(got, want)
    exponents[1, 1] = 255  # this format's NaN
    with pytest.raises(models.CheckpointError, match="a.weight_scale_inv in .*: holds nan, wanted positive numbers"):
        blocks(values, exponents.view(ml_dtypes.float8_e8m0fnu), ml_dtypes.float8_e8m0fnu, tmp_path)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_a_block_of_zeros_may_have_the_scale_0(tmp_path, dtype):
    values, scales = VALUES.copy(), np.full((2, 3), 0.5)
    values[:2, 2:4], scales[0, 1] = 0, 0
    np.testing.assert_array_equal(blocks(values, scales, dtype, tmp_path), values * 0.5)
    values[1, 3] = 1
    with pytest.raises(models.CheckpointError, match="a.weight_scale_inv in .*: holds 0 for a block of other values"):
        blocks(values, scales, dtype, tmp_path)


def test_an_fp8_checkpoint_loads_with_scales_of_8_bits(tmp_path):
    """The golden fp8 model with its scales rounded to powers of two: the bits of the same powers as float32."""
    reader = models.safetensors_io.Reader(golden.FOLDER / "fp8_loader")
    for name, dtype in (("a", np.float32), ("b", ml_dtypes.float8_e8m0fnu)):
        tensors = {key: reader.raw(key) for key in reader}
        for key in [key for key in tensors if key.endswith("_scale_inv")]:
            tensors[key] = np.exp2(np.round(np.log2(tensors[key]))).astype(dtype)
        (tmp_path / name).mkdir()
        safetensors.numpy.save_file(tensors, tmp_path / name / "model.safetensors")
        shutil.copy(golden.FOLDER / "fp8_loader" / "config.json", tmp_path / name)
    assert_same_model(models.from_pretrained(tmp_path / "b"), models.from_pretrained(tmp_path / "a"))


def pack(tensors, is_quantised=False):
    """Experts as the transformers package has them in memory: gate and up in one tensor, down in another."""
    for layer in {name.split(".mlp.")[0] for name in tensors if ".mlp.experts." in name}:
        for suffix in ("", "_scale_inv") if is_quantised else ("",):
            prefix, parts = f"{layer}.mlp.experts", {}
            for what in ("gate", "up", "down"):
                count = len([n for n in tensors if n.startswith(prefix) and n.endswith(f"{what}_proj.weight{suffix}")])
                parts[what] = np.stack([tensors.pop(f"{prefix}.{x}.{what}_proj.weight{suffix}") for x in range(count)])
            tensors[f"{prefix}.gate_up_proj{suffix}"] = np.concatenate([parts["gate"], parts["up"]], axis=1)
            tensors[f"{prefix}.down_proj{suffix}"] = parts["down"]


@pytest.mark.parametrize("case", ["dsv32", "glm5"])
def test_packed_experts_load_like_single_ones(tmp_path, case):
    assert_same_model(rewritten(tmp_path, case, pack), golden.model(case))


def quantised(tensors):
    """Experts in F8_E4M3 with a scale for each 4 x 8 block."""
    rng = np.random.default_rng(0)
    for name in [name for name in tensors if ".mlp.experts." in name]:
        rows, columns = tensors[name].shape
        tensors[name] = rng.standard_normal((rows, columns)).astype(ml_dtypes.float8_e4m3fn)
        scales = rng.uniform(0.1, 1, (-(-rows // 4), -(-columns // 8))).astype(np.float32)
        tensors[f"{name}_scale_inv"] = scales


def test_packed_experts_of_8_bits_load_if_gate_ends_where_a_block_does(tmp_path):
    def packed(tensors):
        quantised(tensors)
        pack(tensors, is_quantised=True)

    config = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [4, 8]}}
    want = rewritten(tmp_path / "single", "glm5", quantised, **config)
    assert_same_model(rewritten(tmp_path / "packed", "glm5", packed, **config), want)
    config["quantization_config"]["weight_block_size"] = [3, 8]
    with pytest.raises(models.CheckpointError, match=r"gate_up_proj in .*: packs gate and up of 16 rows, wanted a mul"):
        rewritten(tmp_path / "cut", "glm5", packed, **config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda x: x.transpose(0, 2, 1).copy(),
            r"experts\.0\.\S+ in|gate_up_proj in .*: is \[20, 32\], wanted \[16, 40\]",
        ),
        (
            lambda x: x[0],
            r"gate_up_proj in .*: holds the packed experts of a layer in shape \[32, 40\], wanted \[experts",
        ),
        (lambda x: x[:, :-1], r"gate_up_proj in .* in shape \[8, 31, 40\].* the rows those of gate, then of up"),
        (lambda x: x[:-1], r"experts\.7\.gate_proj\.weight and 1 more in .*: missing"),
        (lambda x: x[:0].reshape(0, 2, 0).repeat(0), r"in shape \[0\]"),
    ],
)
def test_experts_packed_in_another_way_are_named(tmp_path, change, message):
    def repack(tensors):
        pack(tensors)
        tensors["model.layers.2.mlp.experts.gate_up_proj"] = np.ascontiguousarray(
            change(tensors["model.layers.2.mlp.experts.gate_up_proj"])
        )

    with pytest.raises(models.CheckpointError, match=message):
        rewritten(tmp_path, "glm5", repack)


def test_values_too_large_for_their_dtype_are_named(tmp_path):
    def grow(tensors):
        tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(np.float64) * 1e300

    with pytest.raises(models.CheckpointError, match=r"model\.norm\.weight in .*: holds numbers that are not finite"):
        rewritten(tmp_path, "glm5", grow)
