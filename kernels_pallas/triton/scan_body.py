"""Device code of `scan_masks` and `scan_sort_keys`, of keys or, by the scores of scan_sketch_body.py, of sketches."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from hisa_jax.kernels_pallas.sort_key import INVISIBLE, score_of, sort_key_of
from hisa_jax.kernels_pallas.types import Ref

TILE_S, WORD = 128, 32  # keys of a tile, bits of a word
_MINUS_INFINITY = -(2**31) + 0x7FFFFF  # its sort key, and NaN's


class Inputs(NamedTuple):
    """Arrays in device memory, whole; of sketches `k` are codes, [S, bytes]."""

    q: Ref  # [T * R, D]
    w: Ref  # [T * R]
    limit: Ref  # [T]
    threshold: Ref | None  # [T]
    tiles: Ref  # [n_tiles, 4]
    k: Ref  # [S, D]
    table: Ref | None  # [n], for keys in pages
    k_scale: Ref | None  # [S]
    code_scales: Ref | None = None  # [S, groups], of sketches


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """The static numbers of a launch."""

    tile_t: int  # queries a program
    n_tiles: int  # tiles of keys a program
    step: int  # every so many tokens are keys
    R: int  # rows a query; `n_linear` and `n` of them as in `ScanHeads`
    n_linear: int
    n: int
    page_size: int | None


# How a program scores: rows [128] int32 of k -> [128, tile_t] float32, without the scales of tokens.
Scores = Callable[[Array], Array]
ScoresOf = Callable[[Inputs, Plan], Scores]


def scan_masks_body(
    refs: Inputs, o_ref: Ref, *, plan: Plan, scores_of: ScoresOf, keep_first: int, keep_last: int
) -> None:
    # One program:   rows [tile_t * R, D] in shared memory   x   tile after tile of 128 keys   ->   4 words a query
    #
    # The product has keys for rows. Thread c of every four holds columns 8 o + 2 c and the next, so these belong to one
    # query (`_queries`), and its sum is additions of a thread's own registers. A warp holds 16 rows of each half of a
    # tile: with those 32 keys in a row (`_offsets`) a word of bits is a sum within a warp. out: [T, words].
    assert refs.threshold is not None
    t, rows, there = _own(refs, o_ref, plan)
    threshold = plt.load(refs.threshold.at[t], mask=there, other=INVISIBLE)
    limit = plt.load(refs.limit.at[t], mask=there, other=0)
    # Scores are compared as they are; NaN passes no comparison and is the sort key of -inf, which is to pass here.
    least, takes_all = score_of(threshold)[None, :], (threshold <= _MINUS_INFINITY)[None, :]
    bits = (jnp.int32(1) << (_offsets() & (WORD - 1)))[:, None]
    n_words = TILE_S // WORD
    words = jnp.arange(n_words, dtype=jnp.int32)

    def write(first: Array, tokens: Array, x: Array) -> None:
        tokens = tokens[:, None]
        passes = (x >= least) | takes_all
        passes = passes | (tokens < keep_first) | (tokens >= (limit - keep_last)[None, :])
        taken = jnp.where(passes & (tokens < limit[None, :]), bits, 0)
        # Rows are halves of a tile, warps, a warp's rows: a word is the two halves of a warp.
        taken = jnp.sum(jnp.sum(taken.reshape(2, n_words, WORD // 2, plan.tile_t), axis=0), axis=1)
        word = lax.div(first, jnp.int32(WORD)) + words
        mask = jnp.broadcast_to(there[None, :], taken.shape)
        plt.store(o_ref.at[rows[None, :], word[:, None]], taken, mask=mask)

    _scan(refs, plan, scores_of(refs, plan), write)


def scan_sort_keys_body(refs: Inputs, o_ref: Ref, *, plan: Plan, scores_of: ScoresOf) -> None:
    # As `scan_masks_body`, but sort keys are written as they are. out: [T, n].
    t, rows, there = _own(refs, o_ref, plan)
    limit = plt.load(refs.limit.at[t], mask=there, other=0)

    def write(first: Array, tokens: Array, x: Array) -> None:
        del first
        sort_key = jnp.where(tokens[:, None] < limit[None, :], sort_key_of(x), INVISIBLE)
        mask = jnp.broadcast_to(there[None, :], sort_key.shape)
        plt.store(o_ref.at[rows[None, :], tokens[:, None]], sort_key, mask=mask)

    _scan(refs, plan, scores_of(refs, plan), write)


def _own(refs: Inputs, o_ref: Ref, plan: Plan) -> tuple[Array, Array, Array]:
    """[tile_t] int32, this program's queries; the rows of the result they have; which of them are there."""
    i = jnp.arange(plan.tile_t, dtype=jnp.int32)
    t, there = query_of(refs, i), i < refs.tiles[pl.program_id(0), 1]
    # Interpret mode writes a masked row anew with what it held: one beyond the last it drops.
    return t, jnp.where(there, t, o_ref.shape[0]), there


def query_of(refs: Inputs, i: Array) -> Array:
    """Queries of this program's tile, by their places in it; the first one for those that are not there."""
    first, n = refs.tiles[pl.program_id(0), 0], refs.tiles[pl.program_id(0), 1]
    return jnp.minimum(first + jnp.where(i < n, i, 0), refs.limit.shape[0] - 1)


def _offsets() -> Array:
    """[128] int32: which key of a tile each row of the product is."""
    row = jnp.arange(TILE_S, dtype=jnp.int32)
    half, warp, inside = row >> 6, (row >> 4) & 3, row & 15
    return warp * WORD + half * (WORD // 2) + inside


def _queries(plan: Plan) -> tuple[Array, Array]:
    """[tile_t * R] int32: which query of a tile each column of the product is of, and which of its rows."""
    column = jnp.arange(plan.tile_t * plan.R, dtype=jnp.int32)
    thread, own = (column >> 1) & 3, ((column >> 3) << 1) | (column & 1)
    return (own >> log2(plan.R)) * 4 + thread, own & (plan.R - 1)


def scores_of_keys(refs: Inputs, plan: Plan) -> Scores:
    """Scores of keys by the rows of this program's queries, which are loaded once."""
    G, R = plan.tile_t, plan.R
    query, r = _queries(plan)
    row = query_of(refs, query) * R + r
    columns = jnp.arange(refs.k.shape[1], dtype=jnp.int32)
    q, w = plt.load(refs.q.at[row[:, None], columns[None, :]]), plt.load(refs.w.at[row])[None, :]
    is_linear, counts = (r < plan.n_linear)[None, :], (r < plan.n)[None, :]

    def scores(rows: Array) -> Array:
        k = plt.load(refs.k.at[rows[:, None], columns[None, :]])
        x = lax.dot_general(k, q, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
        # Selects, not maxima, which Triton lowers to those that drop NaN.
        x = jnp.where(counts, jnp.where((x < 0.0) & ~is_linear, 0.0, x) * w, 0.0)
        x = jnp.sum(x.reshape(TILE_S, G // 4, R // 2, 4, 2), axis=4)
        return jnp.sum(x, axis=2).reshape(TILE_S, G)

    return scores


def _scan(refs: Inputs, plan: Plan, scores: Scores, write: Callable[[Array, Array, Array], None]) -> None:
    """Calls write(first key, keys [128], scores [128, tile_t]) for every tile of keys that its queries see."""
    tile, offsets = pl.program_id(0), _offsets()
    first_row, most = refs.tiles[tile, 2], refs.tiles[tile, 3]
    chunk = pl.program_id(1) * (plan.n_tiles * TILE_S)

    def one_tile(i: Array, _: None) -> None:
        first = chunk + i * TILE_S
        tokens = first + offsets
        rows = rows_of(refs.k, refs.table, first_row + tokens * plan.step, plan.page_size)
        x = scores(rows)
        if refs.k_scale is not None:
            x = x * plt.load(refs.k_scale.at[rows])[:, None]
        write(first, tokens, x)

    n = jnp.clip(lax.div(most - chunk + (TILE_S - 1), jnp.int32(TILE_S)), 0, plan.n_tiles)
    lax.fori_loop(0, n, one_tile, None)


def rows_of(k_ref: Ref, table_ref: Ref | None, rows: Array, page_size: int | None) -> Array:
    """Rows of all sequences -> where they are in k, and some row that there is for those that are nowhere."""
    if page_size is not None:
        assert table_ref is not None
        page_index = jnp.minimum(lax.shift_right_logical(rows, jnp.int32(log2(page_size))), table_ref.shape[0] - 1)
        page = jnp.clip(plt.load(table_ref.at[page_index]), 0, k_ref.shape[0] // page_size - 1)
        return page * page_size + (rows & (page_size - 1))
    return jnp.minimum(rows, k_ref.shape[0] - 1)


def log2(n: int) -> int:
    """Of a power of two."""
    return n.bit_length() - 1
