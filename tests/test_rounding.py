"""What is rounded stays rounded, also where a compiler reads numbers as they were before: 3 s in the gate."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax import lax
from jax.extend.core import Literal

import hisa_jax as hj
from hisa_jax.layout import Keys
from hisa_jax.xla import sketch
from hisa_jax.xla.means import mean_parts
from hisa_jax.xla.rounding import E4M3_MAX, to_e4m3

NARROW = (jnp.bfloat16, jnp.float8_e4m3fn)
X = 3 * jax.random.normal(jax.random.key(0), (2, 16, 256))
PRESENT = jnp.ones(X.shape[:-1], bool)


@pytest.mark.parametrize("sign", [0, -(2**31)], ids=["positive", "negative"])
def test_e4m3_is_rounded_to_nearest_even(sign):
    """Every e4m3 number, the middles between neighbours, and the float32 beside each; numbers between."""
    grid = np.unique(np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32))
    grid = grid[(grid >= 0) & (grid <= E4M3_MAX)]
    places = np.concatenate([grid, (grid[1:] + grid[:-1]) / 2]).view(np.int32)
    between = np.random.default_rng(0).integers(0, 2**31, 100_000, np.int32)
    bits = np.concatenate([places + by for by in (-1, 0, 1)] + [between])
    bits = bits[(bits >= 0) & (bits <= np.float32(E4M3_MAX).view(np.int32))] | np.int32(sign)
    x = bits.view(np.float32)
    got = np.asarray(jax.jit(to_e4m3)(x))
    np.testing.assert_array_equal(
        got.view(np.int32), x.astype(ml_dtypes.float8_e4m3fn).astype(np.float32).view(np.int32)
    )


@pytest.mark.parametrize(
    "made",
    [
        lambda x: hj.quantize_keys(x).dequantize(),
        lambda x: hj.quantize_keys(x.astype(jnp.bfloat16), scale="ue8m0").dequantize(),
        lambda x: hj.quantize_keys(x.astype(jnp.bfloat16), jnp.int8).values,
        lambda x: hj.quantize_queries(x, x[..., 0])[0].astype(jnp.float32),
        lambda x: hj.quantize_latents(x, 256).dequantize(),
        lambda x: Keys(x.astype(jnp.bfloat16), None).dequantised(PRESENT),
        lambda x: sketch.pack(x.astype(jnp.bfloat16))[0],
        lambda x: [part.astype(jnp.float32) for part in mean_parts(x, jnp.float8_e4m3fn)],
    ],
    ids=["keys", "bfloat16_keys", "int8_keys", "queries", "latents", "page_keys", "sketch", "means"],
)  # fmt: skip
def test_what_is_made_of_rounded_numbers_is_of_those_that_are_stored(made):
    jaxpr = jax.make_jaxpr(made)(X)
    for wanted, got in zip(
        jax.tree.leaves(jax.jit(made)(X)), without_conversions(jaxpr.jaxpr, jaxpr.consts, [X]), strict=True
    ):
        np.testing.assert_array_equal(got, wanted)


def test_a_conversion_that_is_left_out_is_noticed():
    jaxpr = jax.make_jaxpr(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32))(X)
    np.testing.assert_array_equal(without_conversions(jaxpr.jaxpr, jaxpr.consts, [X])[0], X)


def without_conversions(jaxpr, consts, operands):
    """A program's results where numbers that it rounds to fewer bits stay as they were, as XLA for GPUs has them."""
    values = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *operands), strict=True))
    read = lambda x: x.val if isinstance(x, Literal) else values[x]  # noqa: E731
    for eqn in jaxpr.eqns:
        given, params = [read(x) for x in eqn.invars], eqn.params
        if eqn.primitive is lax.convert_element_type_p and params["new_dtype"] in NARROW:
            out = [given[0].astype(jnp.float32)]
        elif inner := params.get("jaxpr") or params.get("call_jaxpr"):
            out = without_conversions(inner.jaxpr, inner.consts, given)
        else:
            out = eqn.primitive.bind(*given, **params)
        values.update(zip(eqn.outvars, out if isinstance(out, list | tuple) else [out], strict=True))
    return [read(x) for x in jaxpr.outvars]
