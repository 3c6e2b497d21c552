"""The algorithm, stage by stage, in plain JAX: read this file first.

    pool          mean key of each block
    block_filter  the best block_topk blocks of each query, by the score of their means
    scan          in place of both: the best units of tokens by a few heads in place of all (scan.py)
    units         in place of both: the best blocks by the best of their tokens (units.py)
    refine        the best topk tokens inside them, by the token scores
    flat          the best topk of all tokens: the indexer that the others replace

Every stage takes one tile of queries of one sequence (`select.py` cuts the work into tiles) and streams candidates past
a running exact top-k, so nothing of size queries x keys ever exists. The flat indexer over block means is the block
filter, hence the one loop, `stream_topk`, under both.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

from hisa_jax.layout import LANES, Keys, Queries, Sequence
from hisa_jax.methods import Activation, BlockSparse, Hisa, Scan, has_ratio, least_blocks
from hisa_jax.sharded import varying
from hisa_jax.xla import own, topk
from hisa_jax.xla.means import mean, tree_sum
from hisa_jax.xla.rounding import widened


class Candidates(NamedTuple):
    """Scored candidates of a tile of queries: `sort_key` [t, s] int32 (see topk.py), `positions` [t, s] int32."""

    sort_key: Array
    positions: Array


def pool(keys: Keys, starts: Array, counts: Array, block_size: int, tile_n: int) -> Array:
    """Mean key of each block, over the tokens present in it.

    Args:
        keys: N keys.
        starts: [n] int32, row of each block's first key.
        counts: [n] int32, tokens present in each block, at most `block_size`.
        tile_n: blocks pooled at a time.

    Returns: [n, D] float32; zeros for a block with no token.
    Source: HISA, arXiv 2603.28458, equation for the block representative.
    """

    def one(start: Array, count: Array) -> Array:
        present = jnp.arange(block_size, dtype=jnp.int32) < count
        return tree_sum(keys.rows(start + jnp.arange(block_size, dtype=jnp.int32)).dequantised(present))

    sums = lax.map(lambda block: one(*block), (starts, counts), batch_size=min(tile_n, starts.shape[0]))
    return mean(sums, counts)


def scores(q: Array, keys: Keys, w: Array, activation: Activation | None = "relu") -> Array:
    """Scores of some keys for one query: scale[s] * sum_h w[h] * relu(q[h] . k[s]), or without the relu.

    [H, D], [s, D], [H] -> [s] float32. Products are exact and sums in float32: 8-bit operands are exact in bfloat16.
    """
    return head_sum(head_products(q, keys), keys, w, activation)


def head_products(q: Array, keys: Keys) -> Array:
    """[H, D], s keys -> [H, s] float32, without the keys' scales."""
    dtype = product_dtype(q.dtype, keys.values.dtype)
    wide = widened if dtype == jnp.float32 else lambda x: x.astype(dtype)
    # A product of one row is another loop on a CPU, whose bits depend on what surrounds it.
    rows = jnp.pad(q, ((0, max(2 - q.shape[0], 0)), (0, 0)))
    products = jnp.einsum(
        "hd,sd->hs",
        wide(rows),
        wide(keys.values),
        precision=lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
    return products[: q.shape[0]]


def product_dtype(q: DTypeLike, k: DTypeLike) -> DTypeLike:
    """In which dtype queries and keys of these are multiplied: 8-bit operands are exact in bfloat16."""
    return jnp.float32 if jnp.float32 in (q, k) else jnp.bfloat16


def head_sum(products: Array, keys: Keys, w: Array, activation: Activation | None = "relu") -> Array:
    """[H, s] products of heads and keys, [H] -> [s] float32 scores."""
    products = jnp.maximum(products, 0) if activation else products
    # The head sum as a matrix product: XLA's CPU reduction over heads takes as long as the products.
    total = jnp.einsum("hs,h->s", products, w, precision=lax.Precision.HIGHEST)
    return total if keys.scales is None else total * keys.scales


def tile_scores(
    queries: Queries, keys_of: Callable[[Array], Keys], width: int, needed: Array, score: own.Score = scores
) -> Array:
    """Scores of `width` keys for each query of a tile, -inf in rows that do not need them.

    `keys_of` maps a row of the tile to its keys; `needed` is [t] bool. Returns [t, width] float32.
    """
    none = varying.like(jnp.full((width,), -jnp.inf, jnp.float32), queries)

    def one(row: Array) -> Array:
        return score(queries.q[row], keys_of(row), queries.w[row])

    def one_if_needed(row: Array) -> Array:
        return lax.cond(needed[row], one, lambda _: none, row)

    return each_row(one, queries.q.shape[0], on_cpu=one_if_needed)


def each_row[Found](one: Callable[[Array], Found], t: int, on_cpu: Callable[[Array], Found] | None = None) -> Found:
    """one(row) for each row of a tile of t queries; a CPU calls `on_cpu` instead if there is one."""
    rows = jnp.arange(t, dtype=jnp.int32)
    # A CPU keeps one query's products in its cache and skips rows; an accelerator wants all queries in one product.
    return lax.platform_dependent(
        rows, cpu=lambda rows: lax.map(on_cpu or one, rows), default=lambda rows: jax.vmap(one)(rows)
    )


def stream_topk(
    candidates: Callable[[Array], Candidates], n_tiles: Array, max_tiles: int, k: int, n_queries: int
) -> Candidates:
    """The `k` best of `n_tiles` tiles of candidates, in ascending position.

    `max_tiles` bounds `n_tiles` statically. Empty slots hold `INVISIBLE` and -1.
    """
    if max_tiles == 1:
        return Candidates(*topk.topk_in_order(*candidates(jnp.int32(0)), k))

    def merge(i: Array, best: Candidates) -> Candidates:
        new = candidates(i)
        both = Candidates(*(jnp.concatenate(pair, axis=1) for pair in zip(best, new, strict=True)))
        return Candidates(*topk.topk_in_order(*both, k))

    nothing = Candidates(jnp.full((n_queries, k), topk.INVISIBLE, jnp.int32), jnp.full((n_queries, k), -1, jnp.int32))
    return lax.fori_loop(0, n_tiles, merge, varying.like(nothing, n_tiles))


def flat(
    queries: Queries,
    sequence: Sequence,
    k: int,
    tile_s: int,
    forced: Callable[[Array], Array] | None = None,
    score: own.Score = scores,
) -> Candidates:
    """The `k` best of the visible keys of each query, by a running top-k over tiles of `tile_s` keys.

    `forced` maps positions [t, s] to which of them, [t, s] bool, are chosen whatever their score; `score` gives that.
    Returns the best, [t, k], ascending.
    """
    t, max_keys, visible = queries.q.shape[0], sequence.max_keys, queries.visible
    tile_s = min(tile_s, _round_up(max_keys, LANES))

    def candidates(i: Array) -> Candidates:
        start = i * tile_s
        tile, positions = sequence.tile(start, tile_s)
        positions = jnp.broadcast_to(positions, (t, tile_s))
        sort_key = topk.sort_key_of(tile_scores(queries, lambda _: tile, tile_s, visible > start, score))
        if forced is not None:
            sort_key = jnp.where(forced(positions), topk.FORCED, sort_key)
        seen = (positions >= start) & (positions < visible[:, None])
        return Candidates(jnp.where(seen, sort_key, topk.INVISIBLE), positions)

    max_tiles = -(-max_keys // tile_s)
    return stream_topk(candidates, _cdiv(jnp.max(visible), tile_s), max_tiles, k, t)


def block_filter(
    queries: Queries, means: Sequence, method: Hisa | BlockSparse, tile_n: int, budget: Array | None = None
) -> Array:
    """The blocks each query keeps: the best of the eligible ones, the first and the last always among them.

    `means` are the sequence's block means, scored `tile_n` at a time; `budget` is that of `kept_of`. Returns
    [t, block_topk] int32 block ids, ascending, then -1.
    Source: HISA, arXiv 2603.28458, stage 1.
    """
    m = min(method.block_topk, means.max_keys)
    eligible = _cdiv(queries.visible, method.block_size)
    forced = forced_blocks(eligible, method)

    def filtered() -> Array:
        score = own.score_of(method, "block_score", scores)
        best = flat(queries._replace(visible=eligible), means, m, tile_n, forced, score)
        return kept_of(best, eligible, method, budget)

    keeps_all = jnp.all(eligible <= surely_kept(method, budget))
    return lax.cond(keeps_all, lambda: first_positions(eligible, method.block_topk), filtered)


def surely_kept(method: Hisa | BlockSparse | Scan, budget: Array | None) -> int | Array:
    """Up to how many blocks a query keeps all that it sees, as `least_blocks`; [t] int32 with budgets."""
    if budget is None:
        return least_blocks(method)
    return jnp.clip(budget // method.block_size, method.keep_first + method.keep_last, method.block_topk)


def how_many_kept(eligible: Array, method: Hisa | BlockSparse | Scan, budget: Array | None) -> Array | None:
    """[t] int32, how many of the `eligible` [t] blocks a query keeps at most; None: `block_topk`."""
    if not has_ratio(method) and budget is None:
        return None
    n = surely_kept(method, budget)
    if isinstance(method, Hisa):
        n = jnp.maximum(_cdiv(eligible, method.block_ratio), n)
    return jnp.minimum(n, method.block_topk)


def kept_of(best: Candidates, eligible: Array, method: Hisa | BlockSparse | Scan, budget: Array | None = None) -> Array:
    """Of the best blocks of each query, [t, m] ascending, those that it keeps: fewer where `block_ratio` says so.

    `eligible` [t] int32 are the blocks that it sees. With a `budget` [t] int32 of keys, as many as fit into it, and
    those always kept. Returns [t, block_topk] int32 block ids, ascending, then -1.
    """
    block_ids, m = best.positions, best.positions.shape[1]
    n = how_many_kept(eligible, method, budget)
    if n is not None:
        _, block_ids = topk.within(*best, n)
    return jnp.pad(block_ids, ((0, 0), (0, method.block_topk - m)), constant_values=-1)


def forced_blocks(eligible: Array, method: Hisa | BlockSparse | Scan) -> Callable[[Array], Array]:
    """Blocks that each query sees, [t] int32 -> which of some block ids, [t, n], are kept whatever they score."""

    def forced(block_ids: Array) -> Array:
        return (block_ids < method.keep_first) | (block_ids >= (eligible - method.keep_last)[:, None])

    return forced


def first_positions(visible: Array, k: int) -> Array:
    """[t] int32 -> [t, k] int32: 0, 1, 2, ... as far as visible, then -1."""
    positions = jnp.broadcast_to(jnp.arange(k, dtype=jnp.int32), (visible.shape[0], k))
    return jnp.where(positions < visible[:, None], positions, -1)


def tokens_of(block_ids: Array, visible: Array, block_size: int) -> tuple[Array, Array]:
    """Positions of the tokens in some blocks, and which are visible.

    [t, m] int32 (-1: no block), [t] int32 -> [t, m * block_size] int32, [t, m * block_size] bool
    """
    positions = block_ids[:, :, None] * block_size + jnp.arange(block_size, dtype=jnp.int32)[None, None, :]
    positions = positions.reshape(block_ids.shape[0], -1)
    return positions, (positions >= 0) & (positions < visible[:, None])


def refine(
    queries: Queries,
    sequence: Sequence,
    block_ids: Array,
    block_size: int,
    k: int,
    tile_s: int,
    score: own.Score = scores,
) -> Candidates:
    """The `k` best of the visible tokens in the kept blocks of each query.

    `block_ids` [t, m] int32 are ascending, then -1; their tokens are scored about `tile_s` at a time, in whole blocks.
    Returns the best, [t, k], ascending.
    Source: HISA, arXiv 2603.28458, stage 2.
    """
    t, m = block_ids.shape
    tile_m = min(max(tile_s // block_size, 1), m)
    # Whole lanes, for the reason given at LANES.
    tile_m = _round_up(tile_m * block_size, LANES) // block_size
    max_tiles = -(-m // tile_m)
    block_ids = jnp.pad(block_ids, ((0, 0), (0, max_tiles * tile_m - m)), constant_values=-1)
    n_kept = jnp.sum(block_ids >= 0, axis=1, dtype=jnp.int32)
    width = _round_up(tile_m * block_size, LANES)

    def candidates(i: Array) -> Candidates:
        tile_ids = lax.dynamic_slice_in_dim(block_ids, i * tile_m, tile_m, axis=1)
        positions, seen = tokens_of(tile_ids, queries.visible, block_size)
        missing = ((0, 0), (0, width - positions.shape[1]))
        positions, seen = jnp.pad(positions, missing), jnp.pad(seen, missing)

        def keys_of(row: Array) -> Keys:
            return sequence.rows(positions[row])

        sort_key = topk.sort_key_of(tile_scores(queries, keys_of, width, n_kept > i * tile_m, score))
        return Candidates(jnp.where(seen, sort_key, topk.INVISIBLE), positions)

    return stream_topk(candidates, _cdiv(jnp.max(n_kept), tile_m), max_tiles, k, t)


def _cdiv(a: Array, b: int) -> Array:
    return (a + (b - 1)) // b


def _round_up(a: int, b: int) -> int:
    return -(-a // b) * b
