"""Device code of `scan_sketch`."""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from hisa_jax.kernels_pallas.sort_key import INVISIBLE, score_of, sort_key_of
from hisa_jax.kernels_pallas.triton.scan_body import (
    _MINUS_INFINITY,
    TILE_S,
    WORD,
    Inputs,
    Plan,
    _offsets,
    _own,
    _query,
    rows_of,
)
from hisa_jax.kernels_pallas.types import Ref
from hisa_jax.xla.sketch import GROUP, HALF, ZERO

_BITS_OF_128 = 0x4300  # in bfloat16: with a number below 128 in the last ones they are those of 128 and it


class Sketches(NamedTuple):
    """What `scan_body.Inputs` has beside the keys: here `k` are codes, [S, bytes]."""

    inputs: Inputs
    code_scales: Ref  # [S, groups]


def scan_masks_body(sketches: Sketches, o_ref: Ref, *, plan: Plan, keep_first: int, keep_last: int) -> None:
    # One program:   heads of its queries, group by group   x   tile after tile of 128 sketches   ->   4 words a query
    #
    # The bytes of a tile become two operands in registers, of the numbers in their low and in their high bits. The
    # other operand has a column for each head *and group*, zeros at the numbers of other groups. So scales multiply
    # sums of groups, 32 columns a query of 8 heads, and not 128 numbers, of which unpacking is a mask and a difference.
    # Rows and words are those of `scan_body.scan_masks_body`. out: [T, words].
    refs = sketches.inputs
    assert refs.threshold is not None
    t, rows, there = _own(refs, o_ref, plan)
    threshold = plt.load(refs.threshold.at[t], mask=there, other=INVISIBLE)
    limit = plt.load(refs.limit.at[t], mask=there, other=0)
    least, takes_all = score_of(threshold)[None, :], (threshold <= _MINUS_INFINITY)[None, :]
    bits = (jnp.int32(1) << (_offsets() & (WORD - 1)))[:, None]
    n_words = TILE_S // WORD

    def write(first: Array, tokens: Array, x: Array) -> None:
        tokens = tokens[:, None]
        passes = (x >= least) | takes_all | (tokens < keep_first) | (tokens >= (limit - keep_last)[None, :])
        taken = jnp.where(passes & (tokens < limit[None, :]), bits, 0)
        taken = jnp.sum(jnp.sum(taken.reshape(2, n_words, WORD // 2, plan.tile_t), axis=0), axis=1)
        word = lax.div(first, jnp.int32(WORD)) + jnp.arange(n_words, dtype=jnp.int32)
        plt.store(o_ref.at[rows[None, :], word[:, None]], taken, mask=jnp.broadcast_to(there[None, :], taken.shape))

    _scan(sketches, plan, write)


def scan_sort_keys_body(sketches: Sketches, o_ref: Ref, *, plan: Plan) -> None:
    # As `scan_masks_body`, but sort keys are written as they are. out: [T, n].
    t, rows, there = _own(sketches.inputs, o_ref, plan)
    limit = plt.load(sketches.inputs.limit.at[t], mask=there, other=0)

    def write(first: Array, tokens: Array, x: Array) -> None:
        del first
        sort_key = jnp.where(tokens[:, None] < limit[None, :], sort_key_of(x), INVISIBLE)
        plt.store(o_ref.at[rows[None, :], tokens[:, None]], sort_key, mask=jnp.broadcast_to(there[None, :], x.shape))

    _scan(sketches, plan, write)


def _scan(sketches: Sketches, plan: Plan, write: Callable[[Array, Array, Array], None]) -> None:
    """Calls write(first key, keys [128], scores [128, tile_t]) for every tile of keys that its queries see."""
    refs, tile, G, R = sketches.inputs, pl.program_id(0), plan.tile_t, plan.R
    (_, n_bytes), n_groups = refs.k.shape, sketches.code_scales.shape[1]
    first_row, most = refs.tiles[tile, 2], refs.tiles[tile, 3]
    chunk = pl.program_id(1) * (plan.n_tiles * TILE_S)
    low, high = _heads(refs, plan, n_bytes, n_groups)
    r = jnp.arange(G * R, dtype=jnp.int32) & (R - 1)
    is_linear, counts = (r < plan.n_linear)[None, :], (r < plan.n)[None, :]
    w = plt.load(refs.w.at[_heads_of(refs, plan, jnp.arange(G * R, dtype=jnp.int32))])[None, :]
    at, groups = (jnp.arange(n, dtype=jnp.int32)[None, :] for n in (n_bytes, n_groups))
    offsets = _offsets()

    def one_tile(i: Array, _: None) -> None:
        first = chunk + i * TILE_S
        tokens = first + offsets
        rows = rows_of(refs.k, refs.table, first_row + tokens * plan.step, plan.page_size)
        codes = plt.load(refs.k.at[rows[:, None], at]).astype(jnp.int16)
        x = _product(codes & 15, low) + _product(codes >> 4, high)
        scales = plt.load(sketches.code_scales.at[rows[:, None], groups]).astype(jnp.float32)
        x = jnp.sum(x.reshape(TILE_S, n_groups, G * R) * scales[:, :, None], axis=1)
        # A select, not a maximum, which Triton lowers to one that drops NaN.
        x = jnp.where(counts, jnp.where((x < 0.0) & ~is_linear, 0.0, x) * w, 0.0)
        x = jnp.sum(x.reshape(TILE_S, G, R), axis=2)
        if refs.k_scale is not None:
            x = x * plt.load(refs.k_scale.at[rows])[:, None]
        write(first, tokens, x)

    n = jnp.clip(lax.div(most - chunk + (TILE_S - 1), jnp.int32(TILE_S)), 0, plan.n_tiles)
    lax.fori_loop(0, n, one_tile, None)


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
    row, group = _heads_of(refs, plan, column & (n_rows - 1)), byte >> _log2(HALF)
    is_own = group[:, None] == (column >> _log2(n_rows))[None, :]

    def half(number: Array) -> Array:
        mask = is_own & (number < refs.q.shape[1])[:, None]
        return plt.load(refs.q.at[row[None, :], number[:, None]], mask=mask, other=0.0).astype(jnp.bfloat16)

    first = (group << _log2(GROUP)) | (byte & (HALF - 1))
    return half(first), half(first + HALF)


def _heads_of(refs: Inputs, plan: Plan, row: Array) -> Array:
    """Rows of this program's queries, one query's after the other's -> where they are in q."""
    return _query(refs, row >> _log2(plan.R)) * plan.R + (row & (plan.R - 1))


def _log2(n: int) -> int:
    return n.bit_length() - 1
