"""8-bit keys and queries are DeepSeek's, value by value and scale by scale."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import hisa_jax as hj
from tests import draw, oracle

FORMATS = [(dtype, scale) for dtype in ("float8_e4m3fn", "int8") for scale in ("float32", "ue8m0")]
each_format = pytest.mark.parametrize(("dtype", "scale"), FORMATS)


@each_format
@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("source", ["float32", "bfloat16"])
@pytest.mark.parametrize("magnitude", [1e-6, 1.0, 1e4], ids=["below_the_amax_floor", "normal", "large"])
def test_keys_are_quantized_bit_for_bit_as_published(dtype, scale, jit, source, magnitude):
    rng = np.random.default_rng(0)
    k = draw.cast(magnitude * rng.normal(size=(2, 500, 128)), source)
    quantize = jax.jit(hj.quantize_keys, static_argnums=(1, 2)) if jit else hj.quantize_keys
    got = quantize(jnp.asarray(k), jnp.dtype(dtype), scale)
    values, scales = oracle.quantize_keys(k, dtype, scale)
    chex.assert_type(got.scales, np.float32)
    np.testing.assert_array_equal(np.asarray(got.scales), scales)
    np.testing.assert_array_equal(np.asarray(got.values).view(np.uint8), np.asarray(values).view(np.uint8))


@each_format
def test_the_query_scale_goes_into_the_weights(dtype, scale):
    q, _, w = draw.inputs(2, 5, 1, 4, 64)
    got_q, got_w = hj.quantize_queries(jnp.asarray(q), jnp.asarray(w), jnp.dtype(dtype), scale)
    wanted_q, wanted_w = oracle.quantize_queries(q, w, dtype, scale)
    np.testing.assert_array_equal(np.asarray(got_q).view(np.uint8), np.asarray(wanted_q).view(np.uint8))
    np.testing.assert_array_equal(got_w, wanted_w)


@given(amax=st.floats(2.0**-13, 2.0**100, width=32))
def test_ue8m0_scales_are_the_next_power_of_two(amax):
    k = np.zeros((1, 16), np.float32)
    k[0, 3] = amax
    scale = float(hj.quantize_keys(jnp.asarray(k), scale="ue8m0").scales[0])
    exact = np.float32(k[0, 3]) * np.float32(1 / 448)
    assert np.log2(scale) == np.ceil(np.log2(float(exact)))


@each_format
def test_an_all_zero_token_stays_zero(dtype, scale):
    keys = hj.quantize_keys(jnp.zeros((3, 16)), jnp.dtype(dtype), scale)
    assert np.all(np.asarray(keys.dequantize()) == 0) and np.all(np.asarray(keys.scales) > 0)


@each_format
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_token_that_is_not_finite_is_never_preferred(dtype, scale, bad):
    q, k, w = draw.inputs(1, 1, 20, 4, 16)
    k[0, 7, 3] = bad
    got = hj.select(*map(jnp.asarray, (q,)), draw.quantized(k, dtype, scale), jnp.asarray(w), hj.Dsa(topk=19))
    assert 7 not in got.indices[0, 0].tolist()


@pytest.mark.parametrize(("dtype", "recall"), [("float8_e4m3fn", 0.9), ("int8", 0.95)])
def test_the_format_costs_little_recall(dtype, recall):
    # The loose reference: the keys before they were rounded.
    q, k, w = draw.inputs(1, 16, 2000, 16, 128)
    q8, w8 = hj.quantize_queries(jnp.asarray(q), jnp.asarray(w), jnp.dtype(dtype))
    exact = hj.select(*map(jnp.asarray, (q, k, w)), hj.Dsa(topk=256))
    rounded = hj.select(q8, draw.quantized(k, dtype, "float32"), w8, hj.Dsa(topk=256))
    assert hj.compare(rounded, exact).summary()["recall"] > recall


def test_quantized_keys_are_a_pytree():
    keys = draw.quantized(np.ones((2, 5, 16), np.float32), "int8", "float32")
    assert keys.shape == (2, 5, 16)
    chex.assert_trees_all_equal(jax.jit(lambda keys: keys)(keys), keys)
