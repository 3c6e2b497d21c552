"""Block-scaled weights kept in 8 bits: the same logits as of those brought to the model's dtype, in half its memory."""

import dataclasses
import json

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from hisa_jax import models
from hisa_jax.models.block_scaled import BlockScaled, run_of
from hisa_jax.models.params import parameter_table

from . import golden

FP8 = golden.FOLDER / "fp8_loader"
E4M3 = "float8_e4m3fn"


def kept(model):
    """Names and values of the weights that are block-scaled."""
    state = nnx.to_flat_state(nnx.state(model))
    return {path: x.get_value() for path, x in state if isinstance(x.get_value(), BlockScaled)}


@pytest.mark.parametrize("dtype", [jnp.bfloat16, pytest.param(jnp.float32, marks=pytest.mark.exhaustive)])
def test_a_weight_kept_in_8_bits_is_bit_for_bit_the_one_brought_to_the_dtype(dtype):
    plain = dict(nnx.to_flat_state(nnx.state(models.from_pretrained(FP8, dtype=dtype))))
    found = kept(models.from_pretrained(FP8, dtype=dtype, weight_dtype=E4M3))
    assert {"q_a", "q_b", "kv_a", "k_b", "v_b", "o", "q", "k", "gate", "up", "down"} == {path[-1] for path in found}
    for path, weight in found.items():
        assert weight.values.dtype == E4M3 and weight.scales.dtype == jnp.float32
        np.testing.assert_array_equal(np.asarray(weight[...]), np.asarray(plain[path][...]), str(path))


@pytest.mark.exhaustive
def test_logits_are_the_golden_ones():
    out = models.from_pretrained(FP8, weight_dtype=E4M3)(golden.ids("fp8_loader"))
    golden.assert_close(out, golden.numbers("fp8_loader")["logits"], golden.LOGITS)


def test_a_checkpoint_without_block_scales_and_another_dtype_are_refused():
    with pytest.raises(ValueError, match=r"weight_dtype='float8_e4m3fn', but .*glm5 holds no F8_E4M3 tensor"):
        models.from_pretrained(golden.FOLDER / "glm5", weight_dtype=E4M3)
    with pytest.raises(ValueError, match=r"weight_dtype is int8, wanted float8_e4m3fn or None"):
        models.from_pretrained(FP8, weight_dtype="int8")


def test_published_sizes_take_a_byte_a_weight_and_a_scale_a_block():
    """DeepSeek-V3.2: heads of 192 and 256 rows do not end where blocks of 128 do, so runs are 64 there."""
    config = models.dsv32()
    model = nnx.eval_shape(lambda: models.from_config(config, rngs=nnx.Rngs(0), dtype=jnp.bfloat16, weight_dtype=E4M3))
    found = kept(model)
    shapes = {path[-1]: x.scales.shape for path, x in found.items() if path[1] == 3 and "shared" not in path}
    assert shapes["q_b"] == (12, 128, 3) and shapes["kv_a"] == (56, 9) and shapes["o"] == (128, 1, 56)
    assert shapes["gate"] == (256, 56, 16)
    values, scales = (sum(getattr(x, name).size for x in found.values()) for name in ("values", "scales"))
    # All but embedding, head, router and norms; a scale takes 4 bytes.
    assert 669.5e9 < values < 670.2e9 and 4 * scales < 3e-4 * values


def test_a_run_divides_the_block_and_what_the_axis_was_cut_from():
    assert [run_of(128, x) for x in (128, 192, (192, 256), 576, 7, (128, 128))] == [128, 64, 64, 64, 1, 128]


@pytest.mark.exhaustive
def test_heads_that_end_inside_a_block_and_a_plain_tensor_among_scaled_ones(tmp_path):
    """Blocks of 16 x 8, heads of 24 and 40 rows; one matrix is bfloat16 in the checkpoint and stays so."""
    config = dataclasses.replace(models.read_config(golden.FOLDER / "dsv32"), weight_block_size=(16, 8))
    rng, tensors = np.random.default_rng(0), {}
    for source in parameter_table(config).values():
        for key in source.keys:
            x = rng.standard_normal(source.shape).astype(np.float32) * 0.1
            is_scaled = len(source.shape) == 2 and not any(
                x in key for x in ("embed", "lm_head", "mlp.gate.", "weights_")
            )
            if is_scaled and "o_proj" not in key:
                blocks = [-(-n // b) for n, b in zip(source.shape, config.weight_block_size, strict=True)]
                tensors[f"{key}_scale_inv"] = rng.uniform(0.5, 2, blocks).astype(np.float32)
                x = x.astype(ml_dtypes.float8_e4m3fn)
            tensors[key] = x
    safetensors.numpy.save_file(
        {k: x.view(np.uint8) if x.dtype == ml_dtypes.float8_e4m3fn else x for k, x in tensors.items()}, tmp_path / "a"
    )
    data = (tmp_path / "a").read_bytes()
    n = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + n])
    for key, x in tensors.items():
        if x.dtype == ml_dtypes.float8_e4m3fn:
            header[key]["dtype"] = "F8_E4M3"
    text = json.dumps(header).encode()
    (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data[8 + n :])
    plain = dict(nnx.to_flat_state(nnx.state(models.from_pretrained(tmp_path, config=config))))
    scaled = models.from_pretrained(tmp_path, config=config, weight_dtype=E4M3)
    found = kept(scaled)
    assert len(found) > 20 and not any(path[-1] == "o" for path in found)
    for path, parameter in nnx.to_flat_state(nnx.state(scaled)):
        np.testing.assert_array_equal(parameter[...], plain[path][...], str(path))
