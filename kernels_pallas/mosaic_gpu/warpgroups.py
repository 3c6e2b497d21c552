"""What the warp-groups of every kernel here share: layouts, registers, and how buffers and barriers are used."""

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike

from hisa_jax.kernels_pallas.types import Ref

HEAD_COLUMN = plgpu.Layout.WGMMA.reduce(0)  # a value a head: its columns
SMEM_BYTES = 227 * 1024  # of a CTA, at most
RESERVED_BYTES = 4096  # of those, for barriers and alignment
# Registers a thread.
LOADER_REGISTERS = 40
SELECT_REGISTERS = 56


def share_registers(n_score: int, *others: int) -> int:
    """Registers a thread of the scoring warp-groups: what the launch gave less what the others keep.

    Asking for more than that hangs the kernel: 4 warp-groups at 104 beside a loader run, at 112 they do not.
    """
    # A launch divides the 65,536 evenly; counts are multiples of 8, of which 232 is the greatest.
    n_groups = n_score + len(others)
    given = 65536 // (128 * n_groups) // 8 * 8 * n_groups
    return min((given - sum(others)) // n_score // 8 * 8, 232)


def tiled(D: int, dtype: DTypeLike) -> tuple[Ref, ...]:
    """How the tensor core wants rows of D values in shared memory."""
    itemsize = jnp.dtype(dtype).itemsize
    swizzle = min(128, D * itemsize)
    tiling: Ref = plgpu.TilingTransform
    swizzling: Ref = plgpu.SwizzleTransform
    return tiling((8, swizzle // itemsize)), swizzling(swizzle)


def one_warp(body: Ref) -> None:
    """Runs `body` on one warp of the warp-group: copies need one thread, and idle warps take no issue slots."""
    plgpu.warp_map(lambda warp: pl.when(warp == 0)(body))


def release(plan: Ref, barrier: Ref) -> None:
    """Hands a buffer back to the copy engine after plain reads."""
    if plan.interpret:
        # The race detector wants a proxy fence between a read and the copy that overwrites what was read. On the chip
        # the barrier orders them, and the fence would cost a barrier of the warp-group a tile.
        plgpu.commit_smem()
    plgpu.barrier_arrive(barrier)


def wait_all(barriers: Ref, n: int) -> None:
    """Waits for the last phase of each barrier: whoever waits at a barrier must do so for every phase."""
    for i in range(n):
        plgpu.barrier_wait(barriers.at[i])
