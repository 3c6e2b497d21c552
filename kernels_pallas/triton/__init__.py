"""Portable NVIDIA kernels by Pallas' Triton lowering: compute capability 8.0 and newer. See ../README.md.

JAX has deprecated this lowering (it warns when such a kernel is compiled), so it serves what Mosaic GPU cannot.
"""

from jax import Array
from jax.typing import DTypeLike

from kernels_pallas.flatten import over_batch, tokens_present, whole_blocks
from kernels_pallas.triton import refine, select, sparse_mla, topk

__all__ = ["refine", "select", "select_flat", "select_hisa", "sparse_mla", "topk", "why_not"]


def why_not(
    compute_capability: str, H: int, D: int, dtype: DTypeLike, *, topk: int, block_size: int = 128, block_topk: int = 64
) -> str | None:
    """None if a Triton kernel can run this, or the sentence that says why not; arguments as in mosaic_gpu."""
    major, _, minor = compute_capability.partition(".")
    if not major.isdigit() or int(major) < 8:
        return f"needs compute capability 8.0, this device has {compute_capability or 'none'}"
    if topk > _MAX_TOPK:
        return f"needs topk at most {_MAX_TOPK}, not {topk}"
    if block_topk * block_size > _MAX_WIDTH:
        return f"needs at most {_MAX_WIDTH} candidates, not {block_topk} blocks of {block_size}"
    return refine.why_not(H, D, block_size, dtype, (int(major), int(minor or 0)))


_MAX_WIDTH = topk.MAX_WIDTH
_MAX_TOPK = topk.MAX_WIDTH // 2


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
    interpret: bool = False,
) -> tuple[Array, Array, Array]:
    """The hierarchical indexer; arguments and results as in `mosaic_gpu.select_hisa`."""
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
        interpret=interpret,
    )


def select_flat(
    q: Array, k: Array, k_scale: Array | None, w: Array, visible: Array, *, topk: int, interpret: bool = False
) -> tuple[Array, Array]:
    """The flat indexer; arguments and results as in `select_hisa`, without blocks."""
    return over_batch(select.flat, q, k, k_scale, w, visible, topk=topk, interpret=interpret)
