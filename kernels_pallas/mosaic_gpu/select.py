"""The stages put together: whole indexers over flat arrays of queries and keys."""

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from kernels_pallas.image import INVISIBLE
from kernels_pallas.mosaic_gpu import refine as refine_stage
from kernels_pallas.mosaic_gpu import scores as scores_stage
from kernels_pallas.mosaic_gpu import topk as topk_stage
from kernels_pallas.mosaic_gpu.rows import COLUMNS
from kernels_pallas.triton import pool as pool_stage
from kernels_pallas.triton import topk as narrow_topk_stage
from kernels_pallas.triton.select import map_rows
from kernels_pallas.types import Interpret

_FLAT_WIDTH = 16384  # images that a step of the streaming top-k holds: the best so far and a new tile
_NARROW = 2048  # up to this many images a row a program by itself is faster: 0.023 ms against 0.041 for 4096 x 512
_REFINE_ROWS = 4096  # queries at a time where the images of a query do not fit in shared memory: bounds the memory


def why_not_topk(topk: int) -> str | None:
    """None, or why so many tokens cannot be selected."""
    most = topk_stage.MAX_WIDTH // 2
    return None if topk <= most else f"needs topk at most {most}, not {topk}"


def block_filter(
    q: Array,
    w: Array,
    means: Array,
    mean_scale: Array | None,
    visible: Array,
    *,
    n_sequences: int,
    block_size: int,
    block_topk: int,
    keep_first: int,
    keep_last: int,
    n_ctas: int,
    interpret: Interpret = False,
) -> Array:
    """[T, H, D], [T, H], [parts, n, D], [n], [T] -> [T, block_topk] int32 block ids, ascending, then -1.

    Args:
        means: see `pool`; n = n_sequences times the blocks of a sequence.
        visible: tokens of its sequence that each query sees.
    """
    (T, H, D), (n_parts, n, _) = q.shape, means.shape
    per_sequence = n // n_sequences
    eligible = -(-visible // block_size)
    config = scores_stage.heuristic(T, H, D, per_sequence, n_parts, means.dtype.itemsize, n_ctas)
    # Sequences begin at multiples of 8 rows, as tiled copies need it.
    rows = -(-per_sequence // 8) * 8
    if rows != per_sequence:
        pad = rows - per_sequence
        means = jnp.pad(means.reshape(n_parts, n_sequences, per_sequence, D), ((0, 0), (0, 0), (0, pad), (0, 0)))
        means = means.reshape(n_parts, -1, D)
        if mean_scale is not None:
            mean_scale = jnp.pad(mean_scale.reshape(n_sequences, per_sequence), ((0, 0), (0, pad))).reshape(-1)
    tiles = scores_stage.query_tiles(n_sequences, T // n_sequences, config.tile_t, rows, eligible)
    images = scores_stage.scores(
        q,
        w,
        means,
        mean_scale,
        eligible,
        tiles,
        jnp.zeros((1,), jnp.int32),
        n_columns=per_sequence,
        config=config,
        keep_first=keep_first,
        keep_last=keep_last,
        n_ctas=n_ctas,
        interpret=interpret,
    )
    if images.shape[1] <= _NARROW:
        return narrow_topk_stage.topk(images, eligible, block_topk, interpret=bool(interpret))[0]
    return topk_stage.topk(images, eligible, block_topk, n_ctas=n_ctas, interpret=interpret)[0]


def hisa(
    q: Array,
    w: Array,
    k: Array,
    k_scale: Array | None,
    visible: Array,
    counts: Array | np.ndarray,
    *,
    n_sequences: int,
    topk: int,
    block_size: int,
    block_topk: int,
    keep_first: int,
    keep_last: int,
    n_ctas: int,
    means: tuple[Array, Array | None] | None = None,
    interpret: Interpret = False,
) -> tuple[Array, Array, Array]:
    """The hierarchical indexer over `n_sequences` sequences of equal size.

    Args:
        q: [T, H, D]; w: [T, H]; visible: [T] int32, queries of one sequence together.
        k: [S, D]; k_scale: [S] or None; whole blocks, sequences of equal size one after the other.
        counts: [S // block_size] int32, tokens present in each block.
        means: kept means (see `pool`), pooled here if None.

    Returns: [T, topk] token positions in the sequence, [T] count, [T, block_topk] block ids.
    """
    T = q.shape[0]
    per_sequence = k.shape[0] // block_size // n_sequences
    if per_sequence <= block_topk:
        blocks = jnp.arange(block_topk, dtype=jnp.int32)
        blocks = jnp.where(blocks < -(-visible // block_size)[:, None], blocks, -1)
    else:
        if means is None:
            means = pool_stage.pool(k, k_scale, counts, block_size=block_size, interpret=bool(interpret))
        blocks = block_filter(
            q,
            w,
            means[0],
            means[1],
            visible,
            n_sequences=n_sequences,
            block_size=block_size,
            block_topk=block_topk,
            keep_first=keep_first,
            keep_last=keep_last,
            n_ctas=n_ctas,
            interpret=interpret,
        )
    first_block = jnp.arange(T, dtype=jnp.int32) // (T // n_sequences) * per_sequence
    kept = blocks[:, : min(block_topk, per_sequence)]
    indices, count = refine(
        q,
        w,
        k,
        k_scale,
        kept,
        visible,
        first_block,
        topk=topk,
        block_size=block_size,
        n_ctas=n_ctas,
        interpret=interpret,
    )
    return indices, count, blocks


def refine(
    q: Array,
    w: Array,
    k: Array,
    k_scale: Array | None,
    block_ids: Array,
    visible: Array,
    first_block: Array,
    *,
    topk: int,
    block_size: int,
    n_ctas: int,
    interpret: Interpret = False,
) -> tuple[Array, Array]:
    """`refine.refine`, or its scores and `topk` one after the other where a query's images outgrow shared memory."""
    _, H, D = q.shape
    m = block_ids.shape[1]
    config = refine_stage.heuristic(H, D, m, block_size, k.dtype.itemsize)
    if config is not None:
        return refine_stage.refine(
            q,
            w,
            k,
            k_scale,
            block_ids,
            visible,
            first_block,
            k_top=topk,
            block_size=block_size,
            config=config,
            n_ctas=n_ctas,
            interpret=interpret,
        )
    config = refine_stage.Config(rows=128 if H <= 64 else 64, ring=4)

    def some(rows: tuple[Array, ...]) -> tuple[Array, Array]:
        q, w, block_ids, visible, first_block = rows
        images = refine_stage.refine_scores(
            q,
            w,
            k,
            k_scale,
            block_ids,
            visible,
            first_block,
            block_size=block_size,
            config=config,
            n_ctas=n_ctas,
            interpret=interpret,
        )
        n_kept = jnp.sum(block_ids >= 0, axis=1, dtype=jnp.int32)
        limit = n_kept * block_size
        return narrow_topk_stage.topk(images, limit, topk, block_ids, block_size, interpret=bool(interpret))

    return map_rows(some, (q, w, block_ids, visible, first_block), _REFINE_ROWS)


def flat(
    q: Array,
    w: Array,
    k: Array,
    k_scale: Array | None,
    visible: Array,
    *,
    n_sequences: int,
    topk: int,
    n_ctas: int,
    interpret: Interpret = False,
) -> tuple[Array, Array]:
    """The flat indexer with a streaming top-k: [T, topk] positions and [T] count, as `hisa` without blocks."""
    T, H, D = q.shape
    per_sequence = k.shape[0] // n_sequences
    parts = k[None]
    width = next(width for width in (_FLAT_WIDTH, topk_stage.MAX_WIDTH) if width >= 2 * topk)
    config = scores_stage.heuristic(T, H, D, min(width, per_sequence), 1, k.dtype.itemsize, n_ctas)
    tiles = scores_stage.query_tiles(n_sequences, T // n_sequences, config.tile_t, per_sequence, visible)

    def images(first_column: Array, n_columns: int) -> Array:
        return scores_stage.scores(
            q,
            w,
            parts,
            k_scale,
            visible,
            tiles,
            first_column,
            n_columns=n_columns,
            config=config,
            n_ctas=n_ctas,
            interpret=interpret,
        )

    if per_sequence <= width:
        x = images(jnp.zeros((1,), jnp.int32), per_sequence)
        return topk_stage.topk(x, visible, topk, n_ctas=n_ctas, interpret=interpret)
    n_best = -(-topk // COLUMNS) * COLUMNS
    step = (width - n_best) // config.span * config.span

    def one_tile(i: Array, best: tuple[Array, Array]) -> tuple[Array, Array]:
        start = jnp.full((1,), i * step, jnp.int32)
        return topk_stage.merge_topk(*best, images(start, step), start, visible, n_ctas=n_ctas, interpret=interpret)

    nothing = jnp.full((T, n_best), INVISIBLE, jnp.int32), jnp.full((T, n_best), -1, jnp.int32)
    best, positions = lax.fori_loop(0, -(-per_sequence // step), one_tile, nothing)
    if n_best == topk:
        return positions, jnp.sum(positions >= 0, axis=1, dtype=jnp.int32)
    columns, count = topk_stage.topk(
        best, jnp.sum(positions >= 0, axis=1, dtype=jnp.int32), topk, n_ctas=n_ctas, interpret=interpret
    )
    positions = jnp.take_along_axis(positions, jnp.maximum(columns, 0), axis=1)
    return jnp.where(columns >= 0, positions, -1), count
