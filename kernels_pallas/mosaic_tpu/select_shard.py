"""The stages on one device's share of the keys: each result comes with its sort keys, for `merge`."""

from typing import Any

import jax.numpy as jnp
from jax import Array

from hisa_jax.kernels_pallas.bits import in_32_bits
from hisa_jax.kernels_pallas.mosaic_tpu import block_filter as block_filter_stage
from hisa_jax.kernels_pallas.mosaic_tpu import decode, flat
from hisa_jax.kernels_pallas.mosaic_tpu import pool as pool_stage
from hisa_jax.kernels_pallas.mosaic_tpu import refine as refine_stage
from hisa_jax.kernels_pallas.mosaic_tpu.config import GROUP, ROWS, chip
from hisa_jax.kernels_pallas.mosaic_tpu.merge import merge
from hisa_jax.kernels_pallas.mosaic_tpu.select import candidates
from hisa_jax.kernels_pallas.sequences import whole_blocks
from hisa_jax.kernels_pallas.sort_key import INVISIBLE
from hisa_jax.kernels_pallas.types import Interpret

__all__ = ["best_blocks", "best_in_blocks", "best_tokens", "in_blocks", "merge"]

Found = tuple[
    Array, Array
]  # [B, T, k] int32 each: sort keys, `INVISIBLE` where there is none; ids or positions, then -1


def in_blocks(k: Array, k_scale: Array | None, block_size: int) -> tuple[Array, Array | None]:
    """[B, S, D], [B, S] -> [B, n, block_size, D], [B, n, block_size], n a multiple of GROUP."""
    k, k_scale = whole_blocks(k, k_scale, GROUP * block_size)
    B, _, D = k.shape
    blocks = k.reshape(B, -1, block_size, D)
    return blocks, None if k_scale is None else k_scale.reshape(B, -1, block_size)


@in_32_bits
def best_blocks(
    q: Array,
    w: Array,
    k: Array,
    k_scale: Array | None,
    eligible: Array,
    n_tokens: Array,
    *,
    block_topk: int,
    interpret: Interpret = False,
) -> Found:
    """The best blocks by score alone, none forced; keys as `in_blocks` gives them, `eligible` [B, T] of them."""
    T = q.shape[1]
    config = block_filter_stage.heuristic(chip(), T)
    options: Any = dict(block_topk=block_topk, keep_first=0, keep_last=0, has_sort_keys=True, interpret=interpret)
    if T < ROWS:
        means = pool_stage.pool(k, k_scale, n_tokens, interpret=interpret)
        out = decode.block_filter(q, w, means, eligible, mean_parts=config.mean_parts, chip=chip(), **options)
    else:
        out = block_filter_stage.block_filter(q, w, k, k_scale, eligible, n_tokens, config=config, **options)
    return _found(*out)


@in_32_bits
def best_in_blocks(
    q: Array,
    w: Array,
    k: Array,
    k_scale: Array | None,
    block_ids: Array,
    visible: Array,
    n_tokens: Array,
    *,
    topk: int,
    interpret: Interpret = False,
) -> Found:
    """The best visible tokens of some blocks, `block_ids` [B, T, m] ascending, then -1."""
    (B, T, H, D), (n, block_size), m = q.shape, k.shape[1:3], block_ids.shape[2]
    config = refine_stage.heuristic(chip(), B, T, H, D, n, m, block_size, k.dtype.itemsize)
    n_visible = candidates(block_ids, visible, block_size)
    options: Any = dict(topk=topk, config=config, has_sort_keys=True, interpret=interpret)
    return _found(*refine_stage.refine(q, w, k, k_scale, block_ids, n_visible, n_tokens, **options))


@in_32_bits
def best_tokens(
    q: Array, w: Array, k: Array, k_scale: Array | None, visible: Array, *, topk: int, interpret: Interpret = False
) -> Found:
    """The best of all visible tokens; k: [B, S, D]."""
    indices, _, sort_keys = flat.select_flat(
        q, k, k_scale, w, visible, topk=topk, has_sort_keys=True, interpret=interpret
    )
    return _found(indices, sort_keys)


def _found(chosen: Array, sort_keys: Array) -> Found:
    return jnp.where(chosen >= 0, sort_keys, INVISIBLE), chosen
