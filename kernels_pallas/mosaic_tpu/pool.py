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

from kernels_pallas.mosaic_tpu import launch
from kernels_pallas.mosaic_tpu.config import GROUP, LANES
from kernels_pallas.mosaic_tpu.pool_body import pool_body
from kernels_pallas.types import Interpret, Ref


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
