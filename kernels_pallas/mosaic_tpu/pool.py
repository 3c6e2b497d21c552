"""Mean key of each block, for caches that keep them.
    o[b, n] = mean over the tokens present in block n of k_scale[s] * k[s]         float32

Floor, 128K keys of dsv32 in bfloat16, v5e: 34 MB / 819 GB/s = 41 us. Bound by memory: the additions, 12 cycles a block,
hide under the copy of the next group, 60 cycles a block. Reads the blocks that hold a token and no others.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from hisa_jax.kernels_pallas.mosaic_tpu import launch
from hisa_jax.kernels_pallas.mosaic_tpu.config import GROUP, LANES
from hisa_jax.kernels_pallas.mosaic_tpu.pool_body import pool_body, pool_pages_body
from hisa_jax.kernels_pallas.mosaic_tpu.ragged import RaggedTiles
from hisa_jax.kernels_pallas.types import Interpret, Ref


def scratch(k: Array, has_scale: bool) -> dict[str, Ref]:
    """What `pool_sequence` needs."""
    _, _, block_size, D = k.shape
    refs: dict[str, Ref] = {
        "keys_vmem": pltpu.VMEM((2, GROUP, block_size, D), k.dtype),
        "sems": pltpu.SemaphoreType.DMA((2, 2)),
    }
    if has_scale:
        refs["scale_vmem"] = pltpu.VMEM((2, GROUP, block_size), jnp.float32)
    return refs


def vmem_bytes(block_size: int, D: int, itemsize: int) -> int:
    """Of that scratch, at most."""
    return 2 * GROUP * block_size * (max(D, LANES) * itemsize + 4)


def sums_scratch(per_block: int, D: int) -> dict[str, Ref]:
    """What `add_pages` needs."""
    return {
        "sums_vmem": pltpu.VMEM((2, GROUP * per_block, D), jnp.float32),
        "sems": pltpu.SemaphoreType.DMA((2, 2)),
    }


def sums_vmem_bytes(per_block: int, D: int) -> int:
    """Of that scratch."""
    return 2 * GROUP * per_block * max(D, LANES) * 4


@functools.partial(jax.jit, static_argnames=("interpret",))
def pool(k: Array, k_scale: Array | None, n_tokens: Array, *, interpret: Interpret = False) -> Array:
    """[B, n, block_size, D], [B, n, block_size] or None, [B] int32 -> [B, n, D] float32; n a multiple of GROUP.

    Means of blocks without a token are not written.
    """
    B, n, block_size, D = k.shape
    operands = [k] if k_scale is None else [k, k_scale]
    return launch.call(
        pool_body,
        name="hisa_pool",
        grid=(1, B, 1),
        prefetch=[n_tokens],
        operands=operands,
        in_specs=launch.in_hbm(operands),
        out_specs=pl.BlockSpec((None, n, D), lambda core, b, t, _: (b, 0, 0)),
        out_shape=jax.ShapeDtypeStruct((B, n, D), jnp.float32),
        scratch=scratch(k, k_scale is not None),
        vmem_bytes=vmem_bytes(block_size, D, k.dtype.itemsize) + 2 * 4 * n * max(D, LANES),
        interpret=interpret,
    )


@functools.partial(jax.jit, static_argnames=("n", "block_size", "page_size", "mean_parts", "interpret"))
def pool_pages(
    page_sums: Array,
    n_tokens: Array,
    table: Array,
    *,
    n: int,
    block_size: int,
    page_size: int,
    mean_parts: int,
    interpret: Interpret = False,
) -> Array:
    """Means of full blocks from their pages' sums: [N, D] float32, [R], [R, P] -> [R, n, mean_parts * D] bfloat16.

    Args:
        n: blocks, a multiple of 128 that P pages fill at most; those without a token are not written.
        n_tokens: [R] int32 of each sequence, 0 where none are wanted.
    """
    R, D = n_tokens.shape[0], page_sums.shape[1]
    per_block = block_size // page_size
    sequences = RaggedTiles.of_sequences(n_tokens, table, page_size, per_block)
    out = (R, n, mean_parts * D)
    return launch.call_by_sequence(
        functools.partial(pool_pages_body, block_size, mean_parts),
        sequences,
        name="hisa_pool",
        grid=(1, 1, R),
        prefetch=[n_tokens],
        operands=[page_sums],
        in_specs=launch.in_hbm([page_sums]),
        out_specs=pl.BlockSpec(memory_space=pltpu.HBM),
        out_shape=jax.ShapeDtypeStruct(out, jnp.bfloat16),
        scratch={
            **sums_scratch(per_block, D),
            "means_vmem": pltpu.VMEM((2, GROUP, mean_parts * D), jnp.bfloat16),
            "out_sems": pltpu.SemaphoreType.DMA((2,)),
        },
        vmem_bytes=sums_vmem_bytes(per_block, D) + 4 * GROUP * mean_parts * max(D, LANES) * 2,
        interpret=interpret,
    )
