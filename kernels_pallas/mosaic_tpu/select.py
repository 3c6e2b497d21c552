"""The stages put together: the whole hierarchical indexer."""

import jax.numpy as jnp
from jax import Array

from kernels_pallas.mosaic_tpu import block_filter as block_filter_stage
from kernels_pallas.mosaic_tpu import refine as refine_stage
from kernels_pallas.mosaic_tpu.config import Chip
from kernels_pallas.types import Interpret


def hisa(
    q: Array,
    k: Array,
    k_scale: Array | None,
    w: Array,
    visible: Array,
    n_tokens: Array,
    *,
    topk: int,
    block_topk: int,
    keep_first: int,
    keep_last: int,
    chip: Chip,
    means: Array | None = None,
    interpret: Interpret = False,
) -> tuple[Array, Array, Array]:
    """[B, T, H, D], [B, n, block_size, D], [B, n, block_size], [B, T, H], [B, T], [B] -> indices, count, block ids.

    Args:
        k: n a multiple of GROUP; visible: tokens of its sequence that each query sees, at most n_tokens.
        means: [B, n, D] float32, kept means (see `pool`); pooled here if None.
    """
    (T, H), (n, block_size) = q.shape[1:3], k.shape[1:3]
    eligible = -(-visible // block_size)
    filter_config = block_filter_stage.heuristic(chip, T)
    refine_config = refine_stage.heuristic(chip, T, H)
    step = max(config.tile_t * config.n_cores for config in (filter_config, refine_config))
    q, w, visible, eligible = (_pad_queries(x, step) for x in (q, w, visible, eligible))
    if n <= block_topk:
        blocks = jnp.arange(block_topk, dtype=jnp.int32)
        blocks = jnp.where(blocks < eligible[..., None], blocks, -1)
    else:
        blocks = block_filter_stage.block_filter(
            q,
            w,
            k if means is None else None,
            k_scale if means is None else None,
            means,
            eligible,
            n_tokens,
            block_topk=block_topk,
            keep_first=keep_first,
            keep_last=keep_last,
            config=filter_config,
            interpret=interpret,
        )
    n_visible = candidates(blocks, visible, block_size)
    kept = blocks[..., : min(block_topk, n)]
    indices = refine_stage.refine(
        q, w, k, k_scale, kept, n_visible, n_tokens, topk=topk, config=refine_config, interpret=interpret
    )
    return indices[:, :T], jnp.minimum(n_visible, topk)[:, :T], blocks[:, :T]


def candidates(blocks: Array, visible: Array, block_size: int) -> Array:
    """[..., m] ascending block ids, then -1, and [...] visible tokens -> [...] tokens of those blocks that are visible.

    All of a query's blocks are whole but the last, so they come first among its candidates.
    """
    n_kept = jnp.sum(blocks >= 0, axis=-1, dtype=jnp.int32)
    last = jnp.max(blocks, axis=-1)
    return jnp.where(n_kept > 0, (n_kept - 1) * block_size + jnp.minimum(block_size, visible - last * block_size), 0)


def _pad_queries(x: Array, multiple: int) -> Array:
    """Queries that see nothing, to a multiple."""
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % multiple)) + ((0, 0),) * (x.ndim - 2))
