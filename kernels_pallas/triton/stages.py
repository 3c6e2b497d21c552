"""The stages of `indexer.Stages`, by Triton kernels."""

import dataclasses

import jax.numpy as jnp
from jax import Array, lax

from hisa_jax.kernels_pallas.flat_call import FlatCall
from hisa_jax.kernels_pallas.indexer import Means
from hisa_jax.kernels_pallas.operands import Columns, KeptBlocks, Operands
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
    config, T = scores_stage.heuristic(q.shape[1]), q.shape[0]
    columns = Columns(limit=eligible, n=sequences.max_keys, keep_first=method.keep_first, keep_last=method.keep_last)
    if isinstance(means, PageSums):
        sort_keys = page_scores(q, w, means, sequences.key_start_of_queries(T), columns, interpret=interpret)
    else:
        parts = (means.means, means.scales, means.rows) if isinstance(means, PageMeans) else means
        columns = dataclasses.replace(columns, tiles=sequences.query_tiles(T, config.tile_t, eligible))
        sort_keys = scores_stage.scores(Operands(q, w, *parts), columns, config=config, interpret=interpret)
    return topk_stage.topk(sort_keys, eligible, method.block_topk, interpret=interpret)[0]


def refine(call: FlatCall, block_ids: Array, method: Hisa, interpret: Interpret = False) -> tuple[Array, Array]:
    (_, H, D), itemsize, block_size, pages = call.q.shape, call.k.dtype.itemsize, method.block_size, call.pages
    config = tuned(
        refine_stage.Config, "triton.refine", H=H, D=D, block_size=block_size, itemsize=itemsize
    ) or refine_stage.heuristic(H, block_size)
    if pages is not None:
        config = dataclasses.replace(config, tile_s=min(config.tile_s, pages.size))
    kept = KeptBlocks(ids=block_ids, visible=call.visible, first=call.first_blocks(block_size), size=block_size)
    sort_keys = refine_stage.refine_scores(call.operands, kept, config=config, interpret=interpret)
    limit = jnp.sum(block_ids >= 0, axis=1, dtype=jnp.int32) * block_size
    return topk_stage.topk(sort_keys, limit, method.topk, kept, interpret=interpret)


def flat(call: FlatCall, topk: int, interpret: Interpret = False) -> tuple[Array, Array]:
    """A streaming top-k over tiles of tokens."""
    (T, H, _), sequences, visible = call.q.shape, call.sequences, call.visible
    config = scores_stage.heuristic(H)
    tiles = sequences.query_tiles(T, config.tile_t, visible)
    width = next(width for width in (_FLAT_WIDTH, topk_stage.MAX_WIDTH) if width >= 2 * topk)

    operands = call.operands._replace(k=call.k[:, None])

    def sort_keys(first: Array, n: int) -> Array:
        columns = Columns(limit=visible, tiles=tiles, first=first, n=n)
        return scores_stage.scores(operands, columns, config=config, interpret=interpret)

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
