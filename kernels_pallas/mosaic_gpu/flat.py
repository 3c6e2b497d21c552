"""The flat indexer with a streaming top-k: every token of the sequence is scored, no [T, S] matrix is ever in memory.

Tokens come in tiles. The best of the first tile are selected by `topk`. Later tiles are filtered where they are scored,
by the k-th best so far, and `merge` takes what passes.
"""

import math
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from hisa_jax.kernels_pallas.mosaic_gpu import merge as merge_stage
from hisa_jax.kernels_pallas.mosaic_gpu import scores as scores_stage
from hisa_jax.kernels_pallas.mosaic_gpu import topk as topk_stage
from hisa_jax.kernels_pallas.mosaic_gpu.ptx.select_row import COLUMNS
from hisa_jax.kernels_pallas.operands import Columns, Operands
from hisa_jax.kernels_pallas.sequences import Sequences
from hisa_jax.kernels_pallas.types import Interpret

ONE_TILE = 16384  # up to this many tokens are selected from in one piece
STEP = 13824  # tokens of a tile: bounds the memory to T * STEP sort keys


Found = tuple[Array, Array, Array | None]  # positions, ascending, then -1, [T, topk]; count, [T]; maybe sort keys


def flat(
    operands: Operands,
    visible: Array,
    sequences: Sequences,
    *,
    topk: int,
    n_ctas: int,
    has_sort_keys: bool = False,
    interpret: Interpret = False,
) -> Found:
    """Keys [S, D], visible [T] -> the best of all visible tokens."""
    T = operands.q.shape[0]
    launch: Any = {"n_ctas": n_ctas, "interpret": interpret}
    operands = operands._replace(k=operands.k[:, None])
    sizes = scores_stage.Sizes.of(operands)
    config = scores_stage.heuristic(sizes, min(STEP, sequences.max_keys), n_ctas, n_score=3)
    tiles = sequences.query_tiles(T, config.tile_t, visible, COLUMNS)

    def sort_keys(start: Array, n: int, threshold: Array | None = None) -> Any:
        columns = Columns(limit=visible, tiles=tiles, first=start, n=n, threshold=threshold)
        return scores_stage.scores(operands, columns, config=config, **launch)

    if sequences.max_keys <= max(ONE_TILE, 2 * topk) <= topk_stage.MAX_WIDTH:
        # Whole steps of a selection, also where a span is less.
        x = sort_keys(jnp.zeros((1,), jnp.int32), -(-sequences.max_keys // COLUMNS) * COLUMNS)
        return _best(x, visible, topk, has_sort_keys, launch)

    n_best = -(-topk // COLUMNS) * COLUMNS
    # Whole spans, and whole steps of a selection: a tile's result must not reach into the next tile.
    unit = math.lcm(config.span, COLUMNS)
    step = -(-STEP // unit) * unit
    x = sort_keys(jnp.zeros((1,), jnp.int32), step)
    positions, _, best = topk_stage.topk_with_sort_keys(x, visible, n_best, **launch)

    def one_tile(i: int | Array, best: tuple[Array, Array]) -> tuple[Array, Array]:
        start = jnp.full((1,), i * step, jnp.int32)
        # The least of the best so far is the k-th: what does not beat it is not even written.
        tile = sort_keys(start, step, jnp.min(best[0], axis=1))
        return merge_stage.merge(best, tile, start, visible, **launch)

    # Two tiles a turn: after an odd number of merges the best would have to be copied to where the next turn expects
    # them. As many turns as the query that sees most needs, which only the run knows; a tile that nobody sees adds
    # nothing, but no tile begins beyond the last key.
    result = best, positions
    n_later = -(-sequences.max_keys // step) - 1
    if n_later % 2:
        result = one_tile(1, result)
    first = 1 + n_later % 2
    n_turns = (jnp.max(visible) - first * step + 2 * step - 1) // (2 * step)
    two_tiles = lambda i, best: one_tile(first + 2 * i + 1, one_tile(first + 2 * i, best))  # noqa: E731
    best, positions = lax.fori_loop(0, n_turns, two_tiles, result)
    count = jnp.sum(positions >= 0, axis=1, dtype=jnp.int32)
    if n_best == topk:
        return positions, count, best if has_sort_keys else None
    # Rows are whole steps of the selection: the topk of those n_best.
    columns, count, best_keys = _best(best, count, topk, has_sort_keys, launch)
    positions = jnp.take_along_axis(positions, jnp.maximum(columns, 0), axis=1)
    return jnp.where(columns >= 0, positions, -1), count, best_keys


def _best(x: Array, limit: Array, k: int, has_sort_keys: bool, launch: dict[str, Any]) -> Found:
    """Of rows of sort keys; a row that is chosen whole costs no search where its sort keys are not wanted."""
    if has_sort_keys:
        return topk_stage.topk_with_sort_keys(x, limit, k, **launch)
    return *topk_stage.topk(x, limit, k, **launch), None
