"""What is rounded stays rounded, also where a compiler reads numbers as they were before: 6 s in the gate."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax import lax
from jax.extend.core import Literal

import hisa_jax as hj
from hisa_jax.kernels_pallas.mosaic_tpu.pool_body import parts_of
from hisa_jax.layout import Keys, Queries
from hisa_jax.xla import scan, sketch, stages
from hisa_jax.xla.means import mean_parts
from hisa_jax.xla.rounding import E4M3_MAX, to_e4m3, widened

BF16, E4M3 = jnp.bfloat16, jnp.float8_e4m3fn
X = 3 * jax.random.normal(jax.random.key(0), (2, 16, 256))
PRESENT, SEEN = jnp.ones(X.shape[:-1], bool), jnp.full((len(X),), 9, jnp.int32)


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


MADE = {
    "keys": lambda x: hj.quantize_keys(x).dequantize(),
    "keys_of_bfloat16": lambda x: hj.quantize_keys(x.astype(BF16), scale="ue8m0").dequantize(),
    "keys_in_int8": lambda x: hj.quantize_keys(x.astype(BF16), jnp.int8).values,
    "keys_by_others": lambda x: hj.QuantizedKeys(x.astype(E4M3), x[..., 0]).dequantize(),
    "queries": lambda x: hj.quantize_queries(x, x[..., 0])[0].astype(jnp.float32),
    "latents": lambda x: hj.quantize_latents(x, 128).dequantize(),
    "page": lambda x: Keys(x.astype(BF16), None).dequantised(PRESENT),
    "sketch": lambda x: sketch.pack(x.astype(BF16))[0],
    "means": lambda x: [part.astype(jnp.float32) for part in mean_parts(x, E4M3)],
    "means_for_tpus": lambda x: widened(parts_of(x[0], 2)),
    "products": lambda x: stages.head_products(x[0], Keys(x[1].astype(BF16), None)),
    "virtual_head": lambda x: scan.virtual_head(
        Queries(x.astype(BF16), x[..., 0], SEEN), x[..., 1], jnp.zeros((len(x), 1), jnp.int32)
    ),
    "exact_heads": lambda x: scan.exact_heads(Queries(x.astype(BF16), x[..., 0], SEEN), hj.Scan(topk=8, exact_heads=2)),
}


@pytest.mark.parametrize("made", MADE.values(), ids=MADE)
def test_what_is_made_of_rounded_numbers_is_of_those_that_are_stored(made):
    for wanted, got in zip(*map(jax.tree.leaves, (jax.jit(made)(X), by_gpus(made)(X))), strict=True):
        np.testing.assert_array_equal(got, wanted)


def test_a_conversion_that_is_left_out_is_noticed():
    np.testing.assert_array_equal(by_gpus(lambda x: x.astype(BF16).astype(jnp.float32))(X)[0], X)


def by_gpus(made):
    """A function as XLA for GPUs may have it: numbers that it rounds to fewer bits stay as they were."""
    jaxpr = jax.make_jaxpr(made)(X)
    return jax.jit(lambda x: without_conversions(jaxpr.jaxpr, jaxpr.consts, [x]))


def without_conversions(jaxpr, consts, operands):
    values = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *operands), strict=True))
    read = lambda x: x.val if isinstance(x, Literal) else values[x]  # noqa: E731
    for eqn in jaxpr.eqns:
        given, params = [read(x) for x in eqn.invars], eqn.params
        if eqn.primitive is lax.convert_element_type_p and params["new_dtype"] in (BF16, E4M3):
            out = [given[0].astype(jnp.float32)]
        elif inner := params.get("jaxpr") or params.get("call_jaxpr"):
            out = without_conversions(inner.jaxpr, inner.consts, given)
        else:
            out = eqn.primitive.bind(*given, **params)
        values.update(zip(eqn.outvars, out if isinstance(out, list | tuple) else [out], strict=True))
    return [read(x) for x in jaxpr.outvars]
