"""Scores of sketches, for the bodies of scan_body.py."""

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental.pallas import triton as plt

from hisa_jax.kernels_pallas.triton.scan_body import TILE_S, Inputs, Plan, Scores, log2, query_of
from hisa_jax.xla.sketch import GROUP, HALF, ZERO

_BITS_OF_128 = 0x4300  # in bfloat16: with a number below 128 in the last ones they are those of 128 and it


def scores_of_sketches(refs: Inputs, plan: Plan) -> Scores:
    """Scores of sketches by the rows of this program's queries, which are loaded once."""
    # heads of its queries, group by group   x   the bytes of 128 sketches   ->   sums of groups   x   scales
    #
    # The bytes of a tile become two operands in registers, of the numbers in their low and in their high bits. The
    # other operand has a column for each head *and group*, zeros at the numbers of other groups. So scales multiply
    # sums of groups, 32 columns a query of 8 heads, and not 128 numbers, of which unpacking is a mask and a difference.
    G, R = plan.tile_t, plan.R
    code_scales = refs.code_scales
    assert code_scales is not None
    (_, n_bytes), n_groups = refs.k.shape, code_scales.shape[1]
    low, high = _heads(refs, plan, n_bytes, n_groups)
    r = jnp.arange(G * R, dtype=jnp.int32) & (R - 1)
    is_linear, counts = (r < plan.n_linear)[None, :], (r < plan.n)[None, :]
    w = plt.load(refs.w.at[_heads_of(refs, plan, jnp.arange(G * R, dtype=jnp.int32))])[None, :]
    at, groups = (jnp.arange(n, dtype=jnp.int32)[None, :] for n in (n_bytes, n_groups))

    def scores(rows: Array) -> Array:
        codes = plt.load(refs.k.at[rows[:, None], at]).astype(jnp.int16)
        x = _product(codes & 15, low) + _product(codes >> 4, high)
        scales = plt.load(code_scales.at[rows[:, None], groups]).astype(jnp.float32)
        x = jnp.sum(x.reshape(TILE_S, n_groups, G * R) * scales[:, :, None], axis=1)
        # A select, not a maximum, which Triton lowers to one that drops NaN.
        x = jnp.where(counts, jnp.where((x < 0.0) & ~is_linear, 0.0, x) * w, 0.0)
        return jnp.sum(x.reshape(TILE_S, G, R), axis=2)

    return scores


def _product(codes: Array, heads: Array) -> Array:
    """[128, bytes] int16 codes, as they are kept, [bytes, columns] -> [128, columns] float32."""
    numbers = lax.bitcast_convert_type(codes | _BITS_OF_128, jnp.bfloat16) - (128.0 + ZERO)
    return lax.dot_general(numbers, heads, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32)


def _heads(refs: Inputs, plan: Plan, n_bytes: int, n_groups: int) -> tuple[Array, Array]:
    """[bytes, groups * tile_t * R] bfloat16, of the numbers in the low bits of bytes, and of those in the high ones.

    Columns are groups, in each the queries, of each its rows. Zeros where a byte is of another group.
    """
    n_rows = plan.tile_t * plan.R
    column, byte = (jnp.arange(n, dtype=jnp.int32) for n in (n_groups * n_rows, n_bytes))
    row, group = _heads_of(refs, plan, column & (n_rows - 1)), byte >> log2(HALF)
    is_own = group[:, None] == (column >> log2(n_rows))[None, :]

    def half(number: Array) -> Array:
        mask = is_own & (number < refs.q.shape[1])[:, None]
        return plt.load(refs.q.at[row[None, :], number[:, None]], mask=mask, other=0.0).astype(jnp.bfloat16)

    first = (group << log2(GROUP)) | (byte & (HALF - 1))
    return half(first), half(first + HALF)


def _heads_of(refs: Inputs, plan: Plan, row: Array) -> Array:
    """Rows of this program's queries, one query's after the other's -> where they are in q."""
    return query_of(refs, row >> log2(plan.R)) * plan.R + (row & (plan.R - 1))
