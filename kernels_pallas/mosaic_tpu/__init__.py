"""TPU kernels by Mosaic (`pl.pallas_call`), bfloat16, int8 and float8_e4m3fn. See ../README.md for the interface."""

import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from kernels_pallas.mosaic_tpu import config, local, select
from kernels_pallas.mosaic_tpu.config import GROUP
from kernels_pallas.mosaic_tpu.flat import select_flat
from kernels_pallas.mosaic_tpu.topk import MAX_K
from kernels_pallas.sequences import whole_blocks
from kernels_pallas.types import Interpret

__all__ = ["local", "select_flat", "select_hisa", "why_not"]


def why_not(
    device_kind: str,
    H: int,
    D: int,
    q_dtype: DTypeLike,
    k_dtype: DTypeLike,
    *,
    topk: int,
    block_size: int = 128,
    block_topk: int = 64,
) -> str | None:
    """None if a TPU kernel can run this, or the sentence that says why not.

    Args:
        device_kind: as JAX reports it, "TPU v5 lite" for instance.
    """
    if topk > MAX_K:
        return f"needs topk at most {MAX_K}, not {topk}"
    return config.why_not(device_kind, H, D, q_dtype, k_dtype, block_size=block_size)


def select_hisa(
    q: Array,
    k: Array,
    k_scale: Array | None,
    w: Array,
    visible: Array,
    *,
    topk: int,
    block_size: int,
    block_topk: int,
    keep_first: int = 1,
    keep_last: int = 1,
    lengths: Array | None = None,
    is_masked: bool = False,
    interpret: Interpret = False,
) -> tuple[Array, Array, Array]:
    """The hierarchical indexer.

    Args:
        q: [B, T, H, D]; k: [B, S, D], both bfloat16, int8 or float8_e4m3fn; k_scale: [B, S] float32 or None.
        w: [B, T, H] float32; visible: [B, T] int32, tokens each query sees, 0 for padding.
        lengths: [B] int32, tokens present in each sequence; S if None.
        is_masked: whether to return a mask in place of the positions: [B, T, m, block_size] float32, 1 where a token of
            the kept blocks is chosen, m at most block_topk. `sparse_mla_blocks` takes it as it is.

    Returns: [B, T, topk] int32 positions, ascending, then -1; [B, T] int32 count; [B, T, block_topk] block ids.
    """
    B, S, D = k.shape
    n_tokens = jnp.full((B,), S, jnp.int32) if lengths is None else jnp.clip(lengths, 0, S)
    k, k_scale = whole_blocks(k, k_scale, GROUP * block_size)
    return select.hisa(
        q,
        k.reshape(B, -1, block_size, D),
        None if k_scale is None else k_scale.reshape(B, -1, block_size),
        w,
        jnp.minimum(visible, n_tokens[:, None]),
        n_tokens,
        topk=topk,
        block_topk=block_topk,
        keep_first=keep_first,
        keep_last=keep_last,
        chip=config.chip(),
        is_masked=is_masked,
        interpret=interpret,
    )
