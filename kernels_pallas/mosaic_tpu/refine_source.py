"""Where the keys of a step of `refine` come from: the whole sequence in VMEM, or a ring that copies from HBM fill."""

import dataclasses
from collections.abc import Callable

from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from hisa_jax.kernels_pallas.mosaic_tpu import fetch
from hisa_jax.kernels_pallas.mosaic_tpu.config import GROUP, ROWS
from hisa_jax.kernels_pallas.mosaic_tpu.fetch import CopyGroup
from hisa_jax.kernels_pallas.mosaic_tpu.tiles import row_of
from hisa_jax.kernels_pallas.types import Ref


@dataclasses.dataclass(frozen=True)
class Step:
    """Eight lists side by side and where in them: `eight` of the tile, step `i` of it, `turn` of the tile."""

    eight: Array
    i: Array
    turn: Array


@dataclasses.dataclass(frozen=True)
class Source:
    """Keys of a step.

    Attributes:
        keys: (step, which of its eight lists, which of its slots) -> [block_size, D], or [D, block_size].
        scale: the same -> [1, block_size] float32; None without scales.
        start, wait: copies of a step's keys into the ring; `wait` before the keys are read.
    """

    keys: Callable[[Step, int, int], Array]
    scale: Callable[[Step, int, int], Array] | None
    start: Callable[[Step], None]
    wait: Callable[[Step], None]


def load_transposed(
    copy_group: CopyGroup, n_groups: Array, k_hbm: Ref, keys_vmem: Ref, staged_vmem: Ref, sems: Ref
) -> None:
    """Brings keys that lie transposed in VMEM, [n, D, block_size]; through [2, GROUP, block_size, D]."""

    def transpose(i: Array, slot: Array) -> None:
        for g in range(GROUP):
            keys_vmem[i * GROUP + g] = staged_vmem[slot, g].T

    fetch.in_turn(copy_group, n_groups, [(k_hbm, staged_vmem)], sems, transpose)


def resident(place: Callable, places_smem: Ref, keys_vmem: Ref, scale_vmem: Ref | None) -> Source:
    """Keys in VMEM whole.

    Args:
        place: (step, list, slot) -> where `places_smem` [tile_t, steps, slots] holds it.
        keys_vmem: [n, block_size, D] or [n, D, block_size]; scale_vmem: [n * per_block, page_size].
    """
    per_block = 1 if scale_vmem is None else scale_vmem.shape[0] // keys_vmem.shape[0]

    def nothing(step: Step) -> None:
        del step

    return Source(
        keys=lambda *at: keys_vmem[places_smem[place(*at)]],
        scale=None
        if scale_vmem is None
        else lambda *at: row_of(scale_vmem, places_smem[place(*at)] * per_block, per_block),
        start=nothing,
        wait=nothing,
    )


def ring(
    place: Callable, slots: int, per_block: int, places_smem: Ref, n_kept_smem: Ref, pairs: list, sems: Ref
) -> Source:
    """Keys in HBM: a ring of two steps, and only the blocks that a query keeps are copied.

    Args:
        places_smem: [tile_t, steps, slots * per_block], the pages of each block, or the block where those are one.
        n_kept_smem: [tile_t, 1], blocks that a query keeps.
        pairs: [N, page_size, D] in HBM and [2, 8, slots, block_size, D] in VMEM; with scales also [N, page_size] and
            [2, 8, slots, per_block, page_size].
        sems: [2, 2], by place in the ring and operand.
    """

    def each_copy(step: Step, act: Callable) -> None:
        turn = lax.rem(step.turn, 2)
        for r in range(ROWS):
            for s in range(slots):
                row, i, _ = place(step, r, s)

                @pl.when(i * slots + s < n_kept_smem[row, 0])
                def _copy(row=row, i=i, r=r, s=s):
                    def one_page(p: Array | int, _: None) -> None:
                        page = places_smem[row, i, s * per_block + p]
                        for j, (hbm, vmem) in enumerate(pairs):
                            # Rows of the slot: of keys a page, of scales one.
                            rows = vmem.shape[3] // per_block
                            source = hbm.at[page] if len(hbm.shape) == 3 else hbm.at[pl.ds(page, 1)]
                            target = vmem.at[turn, r, s, pl.ds(pl.multiple_of(p * rows, rows), rows)]
                            act(pltpu.make_async_copy(source, target, sems.at[turn, j]))

                    if per_block == 1:
                        one_page(0, None)
                    else:
                        lax.fori_loop(0, per_block, one_page, None)

    def slot_of(vmem: Ref, step: Step, r: int, s: int) -> Ref:
        return vmem.at[lax.rem(step.turn, 2), r, s]

    return Source(
        keys=lambda *at: slot_of(pairs[0][1], *at)[...],
        scale=None if len(pairs) == 1 else lambda *at: row_of(slot_of(pairs[1][1], *at), 0, per_block),
        start=lambda step: each_copy(step, lambda copy: copy.start()),
        wait=lambda step: each_copy(step, lambda copy: copy.wait()),
    )
