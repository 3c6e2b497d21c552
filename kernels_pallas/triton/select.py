"""The stages put together: whole indexers over flat arrays of queries and keys."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from kernels_pallas.image import INVISIBLE
from kernels_pallas.triton import pool as pool_stage
from kernels_pallas.triton import refine as refine_stage
from kernels_pallas.triton import scores as scores_stage
from kernels_pallas.triton import topk as topk_stage

_FLAT_WIDTH = 8192  # images that a step of the streaming top-k adds to the best so far, less those
_REFINE_ROWS = 4096  # queries whose images are in memory at a time


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
    interpret: bool = False,
) -> Array:
    """[T, H, D], [T, H], [parts, n, D], [n], [T] -> [T, block_topk] int32 block ids, ascending, then -1."""
    eligible = -(-visible // block_size)
    images = scores_stage.scores(
        q,
        w,
        means,
        mean_scale,
        eligible,
        jnp.zeros((1,), jnp.int32),
        n_sequences=n_sequences,
        n_columns=means.shape[1] // n_sequences,
        config=scores_stage.heuristic(q.shape[1]),
        keep_first=keep_first,
        keep_last=keep_last,
        interpret=interpret,
    )
    return topk_stage.topk(images, eligible, block_topk, interpret=interpret)[0]


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
    means: tuple[Array, Array | None] | None = None,
    interpret: bool = False,
) -> tuple[Array, Array, Array]:
    """The hierarchical indexer; arguments and results as in `mosaic_gpu.select.hisa`."""
    T, per_sequence = q.shape[0], k.shape[0] // block_size // n_sequences
    if per_sequence <= block_topk:
        blocks = jnp.arange(block_topk, dtype=jnp.int32)
        blocks = jnp.where(blocks < -(-visible // block_size)[:, None], blocks, -1)
    else:
        if means is None:
            means = pool_stage.pool(k, k_scale, counts, block_size=block_size, interpret=interpret)
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
            interpret=interpret,
        )
    first_block = jnp.arange(T, dtype=jnp.int32) // (T // n_sequences) * per_sequence
    kept = blocks[:, : min(block_topk, per_sequence)]
    indices, count = refine(
        q, w, k, k_scale, kept, visible, first_block, topk=topk, block_size=block_size, interpret=interpret
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
    interpret: bool = False,
) -> tuple[Array, Array]:
    """Token scores in the kept blocks and the best of them: [T, topk] int32, [T] count."""
    config = refine_stage.heuristic(q.shape[1], block_size)

    def some(rows: tuple[Array, ...]) -> tuple[Array, Array]:
        q, w, block_ids, visible, first_block = rows
        images = refine_stage.refine_scores(
            q, w, k, k_scale, block_ids, visible, first_block, block_size=block_size, config=config, interpret=interpret
        )
        limit = jnp.sum(block_ids >= 0, axis=1, dtype=jnp.int32) * block_size
        return topk_stage.topk(images, limit, topk, block_ids, block_size, interpret=interpret)

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
    interpret: bool = False,
) -> tuple[Array, Array]:
    """The flat indexer with a streaming top-k: [T, topk] positions and [T] count, as `hisa` without blocks."""
    T, per_sequence = q.shape[0], k.shape[0] // n_sequences
    config = scores_stage.heuristic(q.shape[1])
    width = next(width for width in (_FLAT_WIDTH, topk_stage.MAX_WIDTH) if width >= 2 * topk)

    def images(first_column: Array, n_columns: int) -> Array:
        return scores_stage.scores(
            q,
            w,
            k[None],
            k_scale,
            visible,
            first_column,
            n_sequences=n_sequences,
            n_columns=n_columns,
            config=config,
            interpret=interpret,
        )

    if per_sequence <= width:
        return topk_stage.topk(images(jnp.zeros((1,), jnp.int32), per_sequence), visible, topk, interpret=interpret)
    step = (width - topk) // config.tile_s * config.tile_s

    def one_tile(i: Array, best: tuple[Array, Array]) -> tuple[Array, Array]:
        start = jnp.full((1,), i * step, jnp.int32)
        return tuple(topk_stage.merge_topk(*best, images(start, step), start, visible, interpret=interpret))

    nothing = jnp.full((T, topk), INVISIBLE, jnp.int32), jnp.full((T, topk), -1, jnp.int32)
    _, positions = lax.fori_loop(0, -(-per_sequence // step), one_tile, nothing)
    return positions, jnp.sum(positions >= 0, axis=1, dtype=jnp.int32)


def map_rows(f: Callable, rows: tuple[Array, ...], size: int) -> tuple[Array, Array]:
    """f over `size` rows at a time, the last ones padded with rows that see nothing."""
    T = rows[0].shape[0]
    if size >= T:
        return f(rows)
    n = -(-T // size)
    padded = [jnp.pad(x, ((0, n * size - T),) + ((0, 0),) * (x.ndim - 1)) for x in rows]
    out = lax.map(f, tuple(x.reshape(n, size, *x.shape[1:]) for x in padded))
    return jax.tree.map(lambda x: x.reshape(n * size, *x.shape[2:])[:T], out)
