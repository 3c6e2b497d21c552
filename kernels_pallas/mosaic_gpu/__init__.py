"""Hopper kernels by Mosaic GPU (`plgpu.kernel`), bfloat16 and float8_e4m3fn. See ../README.md for the interface."""

import jax
from jax import Array
from jax.typing import DTypeLike

from kernels_pallas.flatten import over_batch, tokens_present, whole_blocks
from kernels_pallas.mosaic_gpu import refine, scores, select, topk
from kernels_pallas.types import Interpret

__all__ = ["refine", "scores", "select", "select_flat", "select_hisa", "topk", "why_not"]

_DEFAULT_SMS = 132  # of every Hopper GPU sold as H100 SXM, H200 or GH200, where no GPU can be asked


def why_not(
    compute_capability: str, H: int, D: int, dtype: DTypeLike, *, topk: int, block_size: int = 128, block_topk: int = 64
) -> str | None:
    """None if a Hopper kernel can run this, or the sentence that says why not.

    Args:
        compute_capability: of the device, "9.0" for instance; "" if it is no NVIDIA GPU.
        dtype: of queries and keys.
    """
    if compute_capability != "9.0":
        return f"needs compute capability 9.0 (Hopper), this device has {compute_capability or 'none'}"
    return refine.why_not(H, D, block_topk, block_size, dtype) or select.why_not_topk(topk)


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
    interpret: Interpret = False,
) -> tuple[Array, Array, Array]:
    """The hierarchical indexer.

    Args:
        q: [B, T, H, D]; k: [B, S, D], both bfloat16 or both float8_e4m3fn; k_scale: [B, S] float32 or None.
        w: [B, T, H] float32; visible: [B, T] int32, tokens each query sees, 0 for padding.
        lengths: [B] int32, tokens present in each sequence; S if None.

    Returns: [B, T, topk] int32 positions, ascending, then -1; [B, T] int32 count; [B, T, block_topk] block ids.
    """
    k, k_scale = whole_blocks(k, k_scale, block_size)
    counts = tokens_present(lengths, k.shape[0], k.shape[1], block_size)
    return over_batch(
        select.hisa,
        q,
        k,
        k_scale,
        w,
        visible,
        counts=counts,
        topk=topk,
        block_size=block_size,
        block_topk=block_topk,
        keep_first=keep_first,
        keep_last=keep_last,
        n_ctas=n_sms(),
        interpret=interpret,
    )


def select_flat(
    q: Array, k: Array, k_scale: Array | None, w: Array, visible: Array, *, topk: int, interpret: Interpret = False
) -> tuple[Array, Array]:
    """The flat indexer; arguments and results as in `select_hisa`, without blocks."""
    k, k_scale = whole_blocks(k, k_scale, 8)  # tiled copies take 8 rows
    return over_batch(select.flat, q, k, k_scale, w, visible, topk=topk, n_ctas=n_sms(), interpret=interpret)


def n_sms() -> int:
    """Multiprocessors of the default GPU."""
    device = jax.devices()[0]
    return device.core_count if device.platform == "gpu" else _DEFAULT_SMS
