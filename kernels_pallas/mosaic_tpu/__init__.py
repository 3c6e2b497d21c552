"""TPU kernels by Mosaic (`pl.pallas_call`), bfloat16, int8 and float8_e4m3fn. See ../README.md for the interface."""

from hisa_jax.kernels_pallas.mosaic_tpu import select_shard
from hisa_jax.kernels_pallas.mosaic_tpu.limits import why_not
from hisa_jax.kernels_pallas.mosaic_tpu.scan_stages import select_scan
from hisa_jax.kernels_pallas.mosaic_tpu.scan_stages import why_not as why_not_scan
from hisa_jax.kernels_pallas.mosaic_tpu.select import select_blocks, select_flat, select_hisa

__all__ = ["select_blocks", "select_flat", "select_hisa", "select_scan", "select_shard", "why_not", "why_not_scan"]
