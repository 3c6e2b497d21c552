"""The stages put together: the whole hierarchical indexer."""

import jax.numpy as jnp
from jax import Array

from hisa_jax.kernels_pallas.mosaic_tpu import block_filter as block_filter_stage
from hisa_jax.kernels_pallas.mosaic_tpu import decode
from hisa_jax.kernels_pallas.mosaic_tpu import pool as pool_stage
from hisa_jax.kernels_pallas.mosaic_tpu import refine as refine_stage
from hisa_jax.kernels_pallas.mosaic_tpu.config import ROWS, Chip
from hisa_jax.kernels_pallas.types import Interpret


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
    is_masked: bool = False,
    interpret: Interpret = False,
) -> tuple[Array, Array, Array]:
    """[B, T, H, D], [B, n, block_size, D], [B, n, block_size], [B, T, H], [B, T], [B] -> indices, count, block ids.

    Args:
        k: n a multiple of GROUP; visible: tokens of its sequence that each query sees, at most n_tokens.
        means: [B, n, D] float32, kept means (see `pool`); pooled here if None.
        is_masked: whether a mask of the chosen tokens of the kept blocks takes the place of the indices (see `refine`).
    """
    n, block_size = k.shape[1:3]
    eligible = -(-visible // block_size)
    blocks = kept_blocks(
        q,
        k,
        k_scale,
        w,
        eligible,
        n_tokens,
        means,
        block_topk=block_topk,
        keep_first=keep_first,
        keep_last=keep_last,
        chip=chip,
        interpret=interpret,
    )
    n_visible = candidates(blocks, visible, block_size)
    kept = blocks[..., : min(block_topk, n)]
    (B, T, H, D), m = q.shape, kept.shape[2]
    config = refine_stage.heuristic(chip, B, T, H, D, n, m, block_size, k.dtype.itemsize)
    (chosen,) = refine_stage.refine(
        q, w, k, k_scale, kept, n_visible, n_tokens, topk=topk, config=config, is_masked=is_masked, interpret=interpret
    )
    return chosen, jnp.minimum(n_visible, topk), blocks


def kept_blocks(
    q: Array,
    k: Array,
    k_scale: Array | None,
    w: Array,
    eligible: Array,
    n_tokens: Array,
    means: Array | None,
    *,
    block_topk: int,
    keep_first: int,
    keep_last: int,
    chip: Chip,
    interpret: Interpret,
) -> Array:
    """[B, T, block_topk] int32, ascending, then -1; arguments as in `hisa`."""
    T, n = q.shape[1], k.shape[1]
    if n <= block_topk:
        every = jnp.arange(block_topk, dtype=jnp.int32)
        return jnp.where(every < eligible[..., None], every, -1)
    config = block_filter_stage.heuristic(chip, T)
    if T < ROWS:
        if means is None:
            means = pool_stage.pool(k, k_scale, n_tokens, interpret=interpret)
        (blocks,) = decode.block_filter(
            q,
            w,
            means,
            eligible,
            mean_parts=config.mean_parts,
            block_topk=block_topk,
            keep_first=keep_first,
            keep_last=keep_last,
            chip=chip,
            interpret=interpret,
        )
        return blocks
    (blocks,) = block_filter_stage.block_filter(
        q,
        w,
        k if means is None else means,
        k_scale if means is None else None,
        eligible,
        n_tokens,
        block_topk=block_topk,
        keep_first=keep_first,
        keep_last=keep_last,
        config=config,
        interpret=interpret,
    )
    return blocks


def candidates(blocks: Array, visible: Array, block_size: int) -> Array:
    """[..., m] ascending block ids, then -1, and [...] visible tokens -> [...] tokens of those blocks that are visible.

    All of a query's blocks are whole but the last, so they come first among its candidates.
    """
    n_kept = jnp.sum(blocks >= 0, axis=-1, dtype=jnp.int32)
    last = jnp.max(blocks, axis=-1)
    return jnp.where(n_kept > 0, (n_kept - 1) * block_size + jnp.minimum(block_size, visible - last * block_size), 0)
