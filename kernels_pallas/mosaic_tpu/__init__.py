"""TPU kernels by Mosaic (`pl.pallas_call`), bfloat16, int8 and float8_e4m3fn. See ../README.md for the interface."""

from hisa_jax.kernels_pallas.mosaic_tpu import select_shard as local
from hisa_jax.kernels_pallas.mosaic_tpu.api import (
    select_blocks,
    select_blocks_paged,
    select_flat,
    select_flat_paged,
    select_hisa,
    select_hisa_paged,
    why_not,
)

__all__ = [
    "local",
    "select_blocks",
    "select_blocks_paged",
    "select_flat",
    "select_flat_paged",
    "select_hisa",
    "select_hisa_paged",
    "why_not",
]
