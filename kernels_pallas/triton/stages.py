"""The stages of `indexer.Stages`, by Triton kernels."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from hisa_jax.kernels_pallas.flat_call import FlatCall
from hisa_jax.kernels_pallas.indexer import Means
from hisa_jax.kernels_pallas.pages import PageMeans, PageSums
from hisa_jax.kernels_pallas.sort_key import INVISIBLE
from hisa_jax.kernels_pallas.triton import refine as refine_stage
from hisa_jax.kernels_pallas.triton import scores as scores_stage
from hisa_jax.kernels_pallas.triton import topk as topk_stage
from hisa_jax.kernels_pallas.triton.page_means import page_scores, pool_pages
from hisa_jax.kernels_pallas.triton.pool import pool
from hisa_jax.kernels_pallas.tuning import tuned
from hisa_jax.kernels_pallas.types import Interpret
from hisa_jax.methods import BlockSparse, Hisa

__all__ = ["block_filter", "flat", "pool", "pool_pages", "refine"]

_FLAT_WIDTH = 8192  # sort keys that a step of the streaming top-k adds to the best so far, less those


def block_filter(
    call: FlatCall,
    means: Means | PageSums | PageMeans,
    eligible: Array,
    method: Hisa | BlockSparse,
    interpret: Interpret = False,
) -> Array:
    q, w, sequences = call.q, call.w, call.sequences.blocks(method.block_size)
    forced: Any = dict(keep_first=method.keep_first, keep_last=method.keep_last)
    options: Any = dict(n_columns=sequences.max_keys, interpret=interpret, **forced)
    if isinstance(means, PageSums):
        sort_keys = page_scores(q, w, means, eligible, sequences.key_start_of_queries(q.shape[0]), **options)
    else:
        config = scores_stage.heuristic(q.shape[1])
        tiles = sequences.query_tiles(q.shape[0], config.tile_t, eligible)
        first = jnp.zeros((1,), jnp.int32)
        operands = (means.means, means.scales) if isinstance(means, PageMeans) else means
        rows = means.rows if isinstance(means, PageMeans) else None
        sort_keys = scores_stage.scores(q, w, *operands, eligible, tiles, first, rows, config=config, **options)
    return topk_stage.topk(sort_keys, eligible, method.block_topk, interpret=interpret)[0]


def refine(call: FlatCall, block_ids: Array, method: Hisa, interpret: Interpret = False) -> tuple[Array, Array]:
    (_, H, D), itemsize, block_size, pages = call.q.shape, call.k.dtype.itemsize, method.block_size, call.pages
    config = tuned(
        refine_stage.Config, "triton.refine", H=H, D=D, block_size=block_size, itemsize=itemsize
    ) or refine_stage.heuristic(H, block_size)
    if pages is not None:
        config = dataclasses.replace(config, tile_s=min(config.tile_s, pages.size))
    sort_keys = refine_stage.refine_scores(
        call.q,
        call.w,
        call.k,
        call.k_scale,
        block_ids,
        call.visible,
        call.first_blocks(block_size),
        pages,
        block_size=block_size,
        config=config,
        interpret=interpret,
    )
    limit = jnp.sum(block_ids >= 0, axis=1, dtype=jnp.int32) * block_size
    return topk_stage.topk(sort_keys, limit, method.topk, block_ids, block_size, interpret=interpret)


def flat(call: FlatCall, topk: int, interpret: Interpret = False) -> tuple[Array, Array]:
    """A streaming top-k over tiles of tokens."""
    (T, H, _), sequences, visible = call.q.shape, call.sequences, call.visible
    config = scores_stage.heuristic(H)
    tiles = sequences.query_tiles(T, config.tile_t, visible)
    width = next(width for width in (_FLAT_WIDTH, topk_stage.MAX_WIDTH) if width >= 2 * topk)

    def sort_keys(first_column: Array, n_columns: int) -> Array:
        return scores_stage.scores(
            call.q,
            call.w,
            call.k[:, None],
            call.k_scale,
            visible,
            tiles,
            first_column,
            call.pages,
            n_columns=n_columns,
            config=config,
            interpret=interpret,
        )

    if sequences.max_keys <= width:
        x = sort_keys(jnp.zeros((1,), jnp.int32), sequences.max_keys)
        return topk_stage.topk(x, visible, topk, interpret=interpret)
    step = (width - topk) // config.tile_s * config.tile_s

    def one_tile(i: Array, best: tuple[Array, Array]) -> tuple[Array, Array]:
        start = jnp.full((1,), i * step, jnp.int32)
        return tuple(topk_stage.merge_topk(*best, sort_keys(start, step), start, visible, interpret=interpret))

    nothing = jnp.full((T, topk), INVISIBLE, jnp.int32), jnp.full((T, topk), -1, jnp.int32)
    _, positions = lax.fori_loop(0, (jnp.max(visible) + step - 1) // step, one_tile, nothing)
    return positions, jnp.sum(positions >= 0, axis=1, dtype=jnp.int32)
