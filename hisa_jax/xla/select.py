"""Implementation "xla": the stages over tiles of queries, in pure JAX, for every platform that XLA has.

Batches, packed batches and pages are one thing here: R sequences, each with its rows of queries and its keys.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp
from jax import Array, lax

from hisa_jax.layout import LANES, Call, Contiguous, Keys, Limits, PagedMeans, Queries, Sequence
from hisa_jax.methods import BlockSparse, Dsa, Hisa, Method, Scan, at_least, least_blocks
from hisa_jax.selection import Selection, nothing
from hisa_jax.sharded import varying
from hisa_jax.xla import own, scan, stages, topk, units
from hisa_jax.xla.stages import Candidates


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiles:
    """How much the XLA implementation works on at a time: it changes speed and memory, never the selection.

    Attributes:
        queries: queries a tile.
        keys: keys scored and merged at a time; also blocks scored at a time.

    Raises: TypeError: a size that is not an int. ValueError: one below 1, or `keys` that is not a multiple of 128.
    """

    queries: int = 32
    keys: int = 4096

    def __post_init__(self) -> None:
        at_least(self, "queries", 1)
        at_least(self, "keys", 0)
        if self.keys < 1 or self.keys % LANES:
            raise ValueError(f"Tiles(keys={self.keys}): must be a positive multiple of {LANES}")

    @classmethod
    def heuristic(cls, platform: str) -> "Tiles":
        """A CPU's tile of products stays in its cache; an accelerator needs enough queries to fill itself."""
        return cls() if platform == "cpu" else cls(queries=64)


@functools.partial(jax.jit, static_argnames=("method", "tiles", "return_scores", "return_blocks"))
def select(call: Call, method: Method, tiles: Tiles, *, return_scores: bool, return_blocks: bool) -> Selection:
    """The selection of all queries of a call, with leading axes `call.shape`."""
    means_of = _means_of(call, method, tiles)

    def select_tile(queries: Queries, r: Array, limits: Limits) -> Selection:
        means = means_of(r) if means_of else None
        return _select_tile(queries, call.sequence(r), means, method, tiles.keys, limits, return_scores, return_blocks)

    empty = functools.partial(nothing, method=method, return_scores=return_scores, return_blocks=return_blocks)
    # No more rows than the sequences have on average: in decoding each has one.
    n_rows = -(-call.queries.q.shape[0] // call.n_sequences)
    selection = over_tiles(select_tile, call, min(tiles.queries, n_rows), empty, call.limits)
    return call.unflatten(selection)


def has_filter(method: Method, max_keys: int, has_budget: bool) -> TypeGuard[Hisa | BlockSparse | Scan]:
    """False where no query can see blocks that it does not keep: there the method is the flat indexer by contract."""
    if isinstance(method, BlockSparse) and has_budget:
        return True
    return not isinstance(method, Dsa) and max_keys > least_blocks(method) * method.block_size


def has_means(method: Method, max_keys: int, has_budget: bool) -> TypeGuard[Hisa | BlockSparse]:
    """Whether block means choose the blocks."""
    by_means = isinstance(method, Hisa) or (isinstance(method, BlockSparse) and method.scored_by == "mean")
    return by_means and has_filter(method, max_keys, has_budget)


SequenceOf = Callable[[Array], Sequence]
WithMeans = Hisa | BlockSparse  # methods that choose blocks by their means


def _means_of(call: Call, method: Method, tiles: Tiles) -> SequenceOf | None:
    """What gives sequence r its block means: pooled here, or from what its pages keep. None where none are needed."""
    if not has_means(method, call.max_keys, call.budget is not None):
        return None
    max_blocks = -(-call.max_keys // method.block_size)
    if method.pool is not None:
        return lambda r: own.Pooled(call.sequence(r), method, max_blocks)
    if call.cache is not None:
        return paged_means(call, method.block_size)
    assert call.lengths is not None
    means, first_blocks = pool_all(call.keys, jnp.asarray(call.key_starts), call.lengths, method.block_size, tiles)
    return lambda r: Contiguous(means, first_blocks[r], max_blocks)


def paged_means(call: Call, block_size: int) -> SequenceOf:
    """What gives sequence r, whose keys are in pages, its block means."""
    cache, table = call.cache, call.table
    assert cache is not None and table is not None
    return lambda r: PagedMeans(cache.sums, cache.counts, table[r], block_size // cache.page_size)


def over_tiles[Found](
    select_tile: Callable[..., Found],
    call: Call,
    t: int,
    nothing: Callable[[tuple[int]], Found],
    *rows_of_tile: Any,
) -> Found:
    """What each query of a call finds, with a row a query; a loop over tiles of t queries of one sequence.

    Args:
        select_tile: gets a tile, the number of its sequence, and the tile's rows of `rows_of_tile`, trees of [T, ...].
        nothing: gives what so many queries find where there is nothing.
    """
    queries, query_starts = call.queries, jnp.asarray(call.query_starts)
    (T, *_), last_r = queries.q.shape, call.n_sequences - 1
    n_tiles = -(-jnp.diff(query_starts) // t)  # [R]
    tile_ends = jnp.cumsum(n_tiles)

    def one_tile(i: Array, done: Found) -> Found:
        r = jnp.minimum(jnp.searchsorted(tile_ends, i, side="right", method="compare_all"), last_r).astype(jnp.int32)
        first = query_starts[r] + (i - (tile_ends[r] - n_tiles[r])) * t
        rows = first + jnp.arange(t, dtype=jnp.int32)
        is_real = rows < query_starts[r + 1]
        rows = jnp.minimum(rows, T - 1)
        own = Queries(queries.q[rows], queries.w[rows], jnp.where(is_real, queries.visible[rows], 0))
        tile = select_tile(own, r, *jax.tree.map(lambda x: x[rows], rows_of_tile))
        # What a tile writes after its sequence, the next tile overwrites.
        return jax.tree.map(lambda whole, part: lax.dynamic_update_slice_in_dim(whole, part, first, axis=0), done, tile)

    done = lax.fori_loop(0, tile_ends[-1], one_tile, varying.like(nothing((T + t,)), queries))
    return jax.tree.map(lambda leaf: leaf[:T], done)


def pool_all(keys: Keys, key_starts: Array, lengths: Array, block_size: int, tiles: Tiles) -> tuple[Keys, Array]:
    """The block means of every sequence, one sequence's after the other's, and [R] int32, where each one's begin."""
    R = lengths.shape[0]
    n_blocks = -(-lengths // block_size)  # [R]
    ends = jnp.cumsum(n_blocks)
    # Each sequence ends in at most one partial block, so this many rows hold the blocks of all.
    block_ids = jnp.arange(keys.values.shape[0] // block_size + R, dtype=jnp.int32)
    r = jnp.minimum(jnp.searchsorted(ends, block_ids, side="right", method="compare_all"), R - 1)
    starts = (block_ids - (ends - n_blocks)[r]) * block_size
    counts = jnp.clip(lengths[r] - starts, 0, block_size)
    means = stages.pool(keys, key_starts[r] + starts, counts, block_size, max(tiles.keys // block_size, 1))
    return Keys(means, None), ends - n_blocks


def _select_tile(
    queries: Queries,
    sequence: Sequence,
    means: Sequence | None,
    method: Method,
    tile_s: int,
    limits: Limits,
    return_scores: bool,
    return_blocks: bool,
) -> Selection:
    """One tile of queries of one sequence: [t, H, D], [t, H], [t] -> Selection of [t].

    `means` are the sequence's block means, or None where none are needed.
    """
    k, listed, (budget, block_budget) = min(method.topk, sequence.max_keys), limits.candidates, budgets(limits, method)
    score = own.score_of(method, "token_score", stages.scores)
    blocks = None
    if not isinstance(method, Dsa):
        if not has_filter(method, sequence.max_keys, block_budget is not None):
            blocks = stages.first_positions(-(-queries.visible // method.block_size), method.block_topk)
        elif isinstance(method, Scan):
            blocks = scan.scan(queries, sequence, method, tile_s)
        elif means is not None:
            blocks = stages.block_filter(queries, means, method, tile_s, block_budget)
        else:
            assert isinstance(method, BlockSparse)
            blocks = units.block_maxima(queries, sequence, method, tile_s, block_budget)

    def all_visible() -> Candidates:
        return unscored(stages.first_positions(queries.visible, k))

    def best() -> Candidates:
        if listed is not None:
            own_k = min(k, listed.ids.shape[1] * listed.block_size)
            return stages.refine(queries, sequence, listed.ids, listed.block_size, own_k, tile_s, score)
        if blocks is None or not has_filter(method, sequence.max_keys, block_budget is not None):
            return stages.flat(queries, sequence, k, tile_s, score=score)
        if isinstance(method, BlockSparse) and not return_scores:
            # Only the last kept block, the query's own, has invisible tokens: they leave no hole.
            positions, seen = stages.tokens_of(blocks, queries.visible, method.block_size)
            return unscored(jnp.where(seen, positions, -1))
        return stages.refine(queries, sequence, blocks, method.block_size, k, tile_s, score)

    if return_scores or listed is not None or block_budget is not None:
        chosen = within_budget(best(), budget)
    else:
        most = k if budget is None else jnp.minimum(budget, k)
        chosen = lax.cond(jnp.all(queries.visible <= most), all_visible, lambda: within_budget(best(), budget))
    return selection_of(chosen, method, blocks, return_scores, return_blocks)


def budgets(limits: Limits, method: Method) -> tuple[Array | None, Array | None]:
    """The budget of keys that are chosen in the end, and that of blocks that are kept, in keys: a method has one."""
    return (None, limits.budget) if isinstance(method, BlockSparse) else (limits.budget, None)


def within_budget(chosen: Candidates, budget: Array | None) -> Candidates:
    """The best `budget` [t] int32 of the chosen of each query, [t, k] ascending."""
    return chosen if budget is None else Candidates(*topk.within(*chosen, budget))


def selection_of(
    chosen: Candidates, method: Method, blocks: Array | None, return_scores: bool, return_blocks: bool
) -> Selection:
    """The chosen of a tile, [t, k] with k at most topk, as a selection."""
    is_real = chosen.positions >= 0
    missing = ((0, 0), (0, method.topk - chosen.positions.shape[1]))
    scores = jnp.where(is_real, topk.score_of(chosen.sort_key), -jnp.inf)
    return Selection(
        indices=jnp.pad(chosen.positions, missing, constant_values=-1),
        count=jnp.sum(is_real, axis=1, dtype=jnp.int32),
        scores=jnp.pad(scores, missing, constant_values=-jnp.inf) if return_scores else None,
        blocks=blocks if return_blocks else None,
    )


def unscored(positions: Array) -> Candidates:
    return Candidates(jnp.zeros_like(positions), positions)
