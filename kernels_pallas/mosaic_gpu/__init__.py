"""Hopper kernels by Mosaic GPU (`plgpu.kernel`), bfloat16 and float8_e4m3fn. See ../README.md for the interface."""

from jax.typing import DTypeLike

from hisa_jax.kernels_pallas.indexer import Indexer
from hisa_jax.kernels_pallas.mosaic_gpu import refine, stages
from hisa_jax.kernels_pallas.select_shard import SelectShard

__all__ = ["select_blocks", "select_flat", "select_hisa", "select_scan", "select_shard", "why_not"]

# On an H200, 4096 queries, 8192 candidates, ms: flat 1.28 and scan 1.56 at 16K, 2.77 and 1.78 at 32K.
_indexer = Indexer(
    stages,
    flat_up_to=2.5,
    way_of_scan=stages.way_of_scan,
    is_flat_where_all_kept=stages.is_flat_where_all_kept,
)
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
    """None if a Hopper kernel can run this, or the sentence that says why not.

    Args:
        compute_capability: of the device, "9.0" for instance; "" if it is no NVIDIA GPU.
        dtype: of queries and keys.
        topk: tokens that are selected; None: blocks alone.
        n_blocks: most blocks of a sequence.
        page_size: of keys in pages.
    """
    if compute_capability != "9.0":
        return f"needs compute capability 9.0 (Hopper), this device has {compute_capability or 'none'}"
    shape = refine.why_not(H, D, block_size, dtype, page_size)
    return shape or stages.why_not(topk, n_blocks, block_topk * block_size)
