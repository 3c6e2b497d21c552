"""Where the keys of a step of `refine` come from: the whole sequence in VMEM, or a ring that copies from HBM fill.

`refs` are those of `refine_body`. Of a ring, one semaphore a slot and operand counts the bytes of all its copies.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from hisa_jax.kernels_pallas.mosaic_tpu import fetch
from hisa_jax.kernels_pallas.mosaic_tpu.config import GROUP, SUBLANES
from hisa_jax.kernels_pallas.mosaic_tpu.fetch import CopyGroup
from hisa_jax.kernels_pallas.mosaic_tpu.score_body import row_of
from hisa_jax.kernels_pallas.types import Ref


@dataclasses.dataclass(frozen=True)
class Step:
    """Eight lists side by side and where in them: `eight` of the tile, step `i` of it, `turn` of the tile."""

    eight: Array
    i: Array
    turn: Array


At = Callable[[Step, int, int], tuple[Array, Array, int]]  # see `refine_body.Plan.at`


@dataclasses.dataclass(frozen=True)
class Source:
    """Keys of a step.

    Attributes:
        keys: (step, which of its eight lists, which of its blocks) -> [block_size, D], or [D, block_size].
        scale: the same -> [1, block_size] float32; None without scales.
        start, wait: copies of a step's keys into the ring; `wait` before the keys are read.
    """

    keys: Callable[[Step, int, int], Array]
    scale: Callable[[Step, int, int], Array] | None
    start: Callable[[Step], None]
    wait: Callable[[Step], None]


def load_transposed(copy_group: CopyGroup, n_groups: Array, refs: Any) -> None:
    """Brings keys that lie transposed in VMEM, [n, D, block_size]; through [2, GROUP, block_size, D]."""

    def transpose(i: Array, slot: Array) -> None:
        for g in range(GROUP):
            refs.keys_vmem[i * GROUP + g] = refs.staged_vmem[slot, g].T

    fetch.in_turn(copy_group, n_groups, [(refs.k_hbm, refs.staged_vmem)], refs.sems, transpose)


def resident(at: At, refs: Any) -> Source:
    """Keys in VMEM whole: nothing is copied during the steps."""
    keys_vmem, scale_vmem, page_index_smem = refs.keys_vmem, refs.scale_vmem, refs.page_index_smem
    per_block = 1 if scale_vmem is None else scale_vmem.shape[0] // keys_vmem.shape[0]

    def nothing(step: Step) -> None:
        del step

    def scale(step: Step, r: int, s: int) -> Array:
        return row_of(scale_vmem, page_index_smem[at(step, r, s)] * per_block, per_block)

    return Source(
        keys=lambda step, r, s: keys_vmem[page_index_smem[at(step, r, s)]],
        scale=None if scale_vmem is None else scale,
        start=nothing,
        wait=nothing,
    )


def ring(at: At, blocks_per_step: int, per_block: int, refs: Any) -> Source:
    """Keys in HBM: a ring of two steps, and only the blocks that a query keeps are copied."""
    pairs = [(refs.k_hbm, refs.keys_vmem)]
    if refs.scale_hbm is not None:
        pairs.append((refs.scale_hbm, refs.scale_vmem))

    def each_copy(step: Step, act: Callable) -> None:
        turn = lax.rem(step.turn, 2)
        for r in range(SUBLANES):
            for s in range(blocks_per_step):
                row, i, _ = at(step, r, s)

                @pl.when(i * blocks_per_step + s < refs.n_kept_smem[row, 0])
                def _copy(row=row, i=i, r=r, s=s):
                    def one_page(p: Array | int, _: None) -> None:
                        page = refs.page_index_smem[row, i, s * per_block + p]
                        for j, (hbm, vmem) in enumerate(pairs):
                            # Rows of the block: of keys a page, of scales one.
                            rows = vmem.shape[3] // per_block
                            source = hbm.at[page] if len(hbm.shape) == 3 else hbm.at[pl.ds(page, 1)]
                            target = vmem.at[turn, r, s, pl.ds(pl.multiple_of(p * rows, rows), rows)]
                            act(pltpu.make_async_copy(source, target, refs.sems.at[turn, j]))

                    if per_block == 1:
                        one_page(0, None)
                    else:
                        lax.fori_loop(0, per_block, one_page, None)

    def block_of(vmem: Ref, step: Step, r: int, s: int) -> Ref:
        return vmem.at[lax.rem(step.turn, 2), r, s]

    return Source(
        keys=lambda *where: block_of(refs.keys_vmem, *where)[...],
        scale=None if len(pairs) == 1 else lambda *where: row_of(block_of(refs.scale_vmem, *where), 0, per_block),
        start=lambda step: each_copy(step, fetch.start),
        wait=lambda step: each_copy(step, fetch.wait),
    )
