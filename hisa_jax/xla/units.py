"""The best units of adjacent keys by the best of their members: of `BlockSparse(scored_by="max")`, and of scans.

All visible keys are scored, tile by tile; a unit's score is the greatest of its visible ones.
"""

import math
from collections.abc import Callable

import jax.numpy as jnp
from jax import Array, lax

from hisa_jax.layout import LANES, Queries, Sequence
from hisa_jax.methods import BlockSparse
from hisa_jax.sharded import varying
from hisa_jax.xla import own, stages, topk
from hisa_jax.xla.stages import Candidates

_TILES = 8  # of keys between two top-ks: each looks at all of its units, whatever it throws away

# (start, size) -> sort keys of so many keys that hold those from `start` on, [t, size] int32, and positions, [size].
Scored = Callable[[Array, int], tuple[Array, Array]]


def block_maxima(
    queries: Queries, sequence: Sequence, method: BlockSparse, tile_s: int, budget: Array | None = None
) -> Array:
    """As `stages.block_filter`, where a block scores what the best of its visible tokens does.

    Source: MiniMax-M3's indexer.
    """
    m = min(method.block_topk, -(-sequence.max_keys // method.block_size))
    eligible = -(-queries.visible // method.block_size)

    def filtered() -> Array:
        best = best_blocks(queries, eligible, sequence, method, m, tile_s)
        return stages.kept_of(best, eligible, method, budget)

    keeps_all = jnp.all(eligible <= stages.surely_kept(method, budget))
    return lax.cond(keeps_all, lambda: stages.first_positions(eligible, method.block_topk), filtered)


def best_blocks(
    queries: Queries,
    eligible: Array,
    sequence: Sequence,
    method: BlockSparse,
    m: int,
    tile_s: int,
    place: Callable[[Array], Array] = lambda blocks: blocks,
) -> Candidates:
    """The `m` best blocks of each query by the best of their visible tokens, ascending.

    Args:
        eligible: [t] int32, blocks that each query sees, also elsewhere than in `sequence`.
        place: maps blocks of `sequence` to their places among all, where it is a part.
    """
    score = own.score_of(method, "token_score", stages.scores)
    is_forced = stages.forced_blocks(eligible, method)

    def scored(start: Array, size: int) -> tuple[Array, Array]:
        tile, positions = sequence.tile(start, size)
        is_needed = queries.visible > start
        return topk.sort_key_of(stages.tile_scores(queries, lambda _: tile, size, is_needed, score)), positions

    # Whole blocks, and whole lanes for the reason given at LANES.
    step = math.lcm(method.block_size, LANES)
    tile_s = min(-(-tile_s // step), -(-sequence.max_keys // step)) * step
    return best(
        scored, queries.visible, sequence.max_keys, method.block_size, m, tile_s, lambda ids: is_forced(place(ids))
    )


def best(
    scored: Scored,
    visible: Array,
    max_keys: int,
    unit: int,
    m: int,
    tile_s: int,
    is_forced: Callable[[Array], Array],
) -> Candidates:
    """The `m` best units of each query, ascending.

    Args:
        scored: gives the sort keys of a tile.
        visible: [t] int32, keys that each query sees, of at most `max_keys`.
        unit: keys of a unit; `tile_s`: keys of a tile, whole units.
        is_forced: maps units [t, n] to those that are among the best whatever they score, [t, n] bool.
    """
    t = visible.shape[0]
    n_tiles = min(-(-max_keys // tile_s), _TILES)
    width = n_tiles * tile_s

    def tile_sort_key(start: Array) -> Array:
        """[t, tile_s / unit] int32: the scores of the units from key `start` on."""
        sort_key, positions = scored(start, tile_s)
        seen = (positions >= start)[None, :] & (positions[None, :] < visible[:, None])
        sort_key = jnp.where(seen, sort_key, topk.INVISIBLE)

        def moved(sort_key: Array) -> Array:
            sort_key = jnp.pad(sort_key, ((0, 0), (0, tile_s)), constant_values=topk.INVISIBLE)
            return lax.dynamic_slice_in_dim(sort_key, start - positions[0], tile_s, axis=1)

        # The last tile may begin before `start`, so that it ends with the keys.
        sort_key = lax.cond(positions[0] < start, moved, lambda sort_key: sort_key, sort_key)
        sort_key = jnp.max(sort_key.reshape(t, -1, unit), axis=2)
        units = start // unit + jnp.broadcast_to(jnp.arange(tile_s // unit, dtype=jnp.int32), sort_key.shape)
        return jnp.where(is_forced(units) & (sort_key > topk.INVISIBLE), topk.FORCED, sort_key)

    def candidates(i: Array) -> Candidates:
        start = i * width

        def put(j: Array, sort_key: Array) -> Array:
            return lax.dynamic_update_slice_in_dim(
                sort_key, tile_sort_key(start + j * tile_s), j * (tile_s // unit), axis=1
            )

        n_seen = jnp.clip(-(-(jnp.max(visible) - start) // tile_s), 0, n_tiles)
        none = varying.like(jnp.full((t, width // unit), topk.INVISIBLE, jnp.int32), visible)
        sort_key = lax.fori_loop(0, n_seen, put, none)
        found, columns = topk.topk_in_order(sort_key, None, min(m, width // unit))
        return Candidates(found, jnp.where(columns >= 0, start // unit + columns, -1))

    max_spans = -(-max_keys // width)
    if max_spans == 1:
        return candidates(jnp.int32(0))
    return stages.stream_topk(candidates, -(-jnp.max(visible) // width), max_spans, m, t)
