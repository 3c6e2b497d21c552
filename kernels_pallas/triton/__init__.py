"""Portable NVIDIA kernels by Pallas' Triton lowering: compute capability 8.0 and newer. See ../README.md.

JAX has deprecated this lowering (it warns when such a kernel is compiled), so it serves what Mosaic GPU cannot.
"""

from jax.typing import DTypeLike

from hisa_jax.kernels_pallas.indexer import Indexer
from hisa_jax.kernels_pallas.select_shard import SelectShard
from hisa_jax.kernels_pallas.triton import capability, refine, stages
from hisa_jax.kernels_pallas.triton.topk import MAX_WIDTH
from hisa_jax.kernels_pallas.triton.topk import why_not as why_not_width

__all__ = ["select_blocks", "select_flat", "select_hisa", "select_scan", "select_shard", "why_not"]

_MAX_TOPK = MAX_WIDTH // 2

_indexer = Indexer(stages)
select_hisa, select_flat, select_blocks = _indexer.select_hisa, _indexer.select_flat, _indexer.select_blocks
select_scan, select_shard = _indexer.select_scan, SelectShard(_indexer)


def why_not(
    compute_capability: str,
    H: int,
    D: int,
    dtype: DTypeLike,
    *,
    topk: int | None = None,
    block_size: int = 128,
    block_topk: int = 64,
    n_blocks: int = 0,
    page_size: int | None = None,
) -> str | None:
    """None if a Triton kernel can run this, or the sentence that says why not; arguments as in mosaic_gpu."""
    if reason := capability.why_not(compute_capability, dtype):
        return reason
    if topk is not None:
        if topk > _MAX_TOPK:
            return f"needs topk at most {_MAX_TOPK}, not {topk}"
        if reason := why_not_width(block_topk * block_size):
            return reason
    if page_size is not None and page_size < 16:  # the fewest rows of a product
        return f"needs pages of 16 tokens or more, not {page_size}"
    return why_not_width(n_blocks) or refine.why_not(H, D, block_size, dtype)
