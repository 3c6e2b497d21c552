"""The flat indexer with a streaming top-k: every token of the sequence is scored, no [T, S] matrix is ever in memory.

Tokens come in tiles. The first is selected from by itself; later ones are filtered by the k-th best so far where they
are scored, and only what passes is merged (see `merge`).
"""

import math
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from hisa_jax.kernels_pallas.mosaic_gpu import merge as merge_stage
from hisa_jax.kernels_pallas.mosaic_gpu import scores as scores_stage
from hisa_jax.kernels_pallas.mosaic_gpu import topk as topk_stage
from hisa_jax.kernels_pallas.mosaic_gpu.ptx.select_row import COLUMNS
from hisa_jax.kernels_pallas.pages import Pages
from hisa_jax.kernels_pallas.sequences import Sequences
from hisa_jax.kernels_pallas.types import Interpret

ONE_TILE = 16384  # up to this many tokens are selected from in one piece
STEP = 13824  # tokens of a tile: bounds the memory to T * STEP sort keys


def flat(
    q: Array,
    w: Array,
    k: Array,
    k_scale: Array | None,
    visible: Array,
    sequences: Sequences,
    pages: Pages | None = None,
    *,
    topk: int,
    n_ctas: int,
    interpret: Interpret = False,
) -> tuple[Array, Array]:
    """[T, H, D], [T, H], [S, D], [S], [T] -> [T, topk] positions in the sequence, ascending, then -1; [T] count."""
    T, H, D = q.shape
    config = scores_stage.heuristic(T, H, D, min(STEP, sequences.max_keys), 1, k.dtype.itemsize, n_ctas, n_score=3)
    tiles = sequences.query_tiles(T, config.tile_t, visible, COLUMNS)

    def sort_keys(start: Array, n_columns: int, threshold: Array | None = None) -> Any:
        return scores_stage.scores(
            q,
            w,
            k[:, None],
            k_scale,
            visible,
            tiles,
            start,
            threshold,
            pages,
            n_columns=n_columns,
            config=config,
            n_ctas=n_ctas,
            interpret=interpret,
        )

    if sequences.max_keys <= max(ONE_TILE, 2 * topk) <= topk_stage.MAX_WIDTH:
        # Whole steps of a selection, also where a span is less.
        x = sort_keys(jnp.zeros((1,), jnp.int32), -(-sequences.max_keys // COLUMNS) * COLUMNS)
        return topk_stage.topk(x, visible, topk, n_ctas=n_ctas, interpret=interpret)

    n_best = -(-topk // COLUMNS) * COLUMNS
    # Whole spans, and whole steps of a selection: a tile's result must not reach into the next tile.
    unit = math.lcm(config.span, COLUMNS)
    step = -(-STEP // unit) * unit
    x = sort_keys(jnp.zeros((1,), jnp.int32), step)
    positions, _, best = topk_stage.topk_with_sort_keys(x, visible, n_best, n_ctas=n_ctas, interpret=interpret)

    def one_tile(i: Array, found: tuple[Array, Array]) -> tuple[Array, Array]:
        best, positions = found
        start = jnp.full((1,), i * step, jnp.int32)
        x, masks = sort_keys(start, step, jnp.min(best, axis=1))
        return merge_stage.merge(best, positions, x, masks, start, visible, n_ctas=n_ctas, interpret=interpret)

    best, positions = lax.fori_loop(1, (jnp.max(visible) + step - 1) // step, one_tile, (best, positions))
    if n_best == topk:
        return positions, jnp.sum(positions >= 0, axis=1, dtype=jnp.int32)
    columns, count = topk_stage.topk(
        best, jnp.sum(positions >= 0, axis=1, dtype=jnp.int32), topk, n_ctas=n_ctas, interpret=interpret
    )
    positions = jnp.take_along_axis(positions, jnp.maximum(columns, 0), axis=1)
    return jnp.where(columns >= 0, positions, -1), count
