"""Where the keys of a step of `refine` come from: the whole sequence in VMEM, or a ring that copies from HBM fill."""

import dataclasses
from collections.abc import Callable

from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.mosaic_tpu.config import GROUP, ROWS
from kernels_pallas.types import Ref


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
        keys: (step, which of its eight lists, which of its slots) -> [block_size, D].
        scale: the same -> [1, block_size] float32; None without scales.
        start, wait: copies of a step's keys into the ring; `wait` before the keys are read.
    """

    keys: Callable[[Step, int, int], Array]
    scale: Callable[[Step, int, int], Array] | None
    start: Callable[[Step], None]
    wait: Callable[[Step], None]


def load_sequence(b: Array, n_tokens: Array, pairs: list[tuple[Ref, Ref]], sems: Ref) -> None:
    """Brings the blocks of sequence b that hold a token.

    Args:
        pairs: [B, n, block_size, ...] in HBM, [n, block_size, ...] in VMEM.
    """
    n_groups = pl.cdiv(n_tokens, GROUP * pairs[0][0].shape[2])

    def copies(i: Array) -> list:
        blocks = pl.ds(pl.multiple_of(i * GROUP, GROUP), GROUP)
        return [
            pltpu.make_async_copy(hbm.at[b, blocks], vmem.at[blocks], sems.at[j]) for j, (hbm, vmem) in enumerate(pairs)
        ]

    def start(i: Array, _: None) -> None:
        for copy in copies(i):
            copy.start()

    def wait(i: Array, _: None) -> None:
        for copy in copies(i):
            copy.wait()

    lax.fori_loop(0, n_groups, start, None)
    lax.fori_loop(0, n_groups, wait, None)


def resident(place: Callable, blocks_smem: Ref, keys_vmem: Ref, scale_vmem: Ref | None) -> Source:
    """Keys in VMEM whole.

    Args:
        place: (step, list, slot) -> row and column of `blocks_smem`, [tile_t, m]; keys_vmem: [n, block_size, D].
    """

    def nothing(step: Step) -> None:
        del step

    return Source(
        keys=lambda *at: keys_vmem[blocks_smem[place(*at)]],
        scale=None if scale_vmem is None else lambda *at: scale_vmem[pl.ds(blocks_smem[place(*at)], 1)],
        start=nothing,
        wait=nothing,
    )


def ring(place: Callable, slots: int, blocks_smem: Ref, pairs: list[tuple[Ref, Ref]], sems: Ref) -> Source:
    """Keys in HBM: a ring of two steps, and only the blocks that a query keeps are copied.

    Args:
        blocks_smem: [tile_t, m + 1]; its last column counts the blocks that a query keeps.
        pairs: [N, block_size, D] in HBM and [2, 8, slots, block_size, D] in VMEM; with scales also [N, 1, block_size]
            and [2, 8, slots, 1, block_size].
        sems: [2, 2], by place in the ring and operand.
    """
    n_kept = blocks_smem.shape[1] - 1

    def each_copy(step: Step, act: Callable) -> None:
        turn = lax.rem(step.turn, 2)
        for r in range(ROWS):
            for s in range(slots):
                row, slot = place(step, r, s)

                @pl.when(slot < blocks_smem[row, n_kept])
                def _(r=r, s=s, row=row, slot=slot):
                    block = blocks_smem[row, slot]
                    for j, (hbm, vmem) in enumerate(pairs):
                        act(pltpu.make_async_copy(hbm.at[block], vmem.at[turn, r, s], sems.at[turn, j]))

    def slot_of(vmem: Ref, step: Step, r: int, s: int) -> Array:
        return vmem[lax.rem(step.turn, 2), r, s]

    return Source(
        keys=lambda *at: slot_of(pairs[0][1], *at),
        scale=None if len(pairs) == 1 else lambda *at: slot_of(pairs[1][1], *at),
        start=lambda step: each_copy(step, lambda copy: copy.start()),
        wait=lambda step: each_copy(step, lambda copy: copy.wait()),
    )
