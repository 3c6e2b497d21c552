"""Where the keys of a step of `refine` come from: the whole sequence in VMEM, or a ring that copies from HBM fill."""

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
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
        keys: (step, which of its eight lists, which of its slots) -> [block_size, D], or [D, block_size].
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
    if not pairs:
        return
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


def load_transposed(b: Array, n_tokens: Array, k_hbm: Ref, keys_vmem: Ref, staged_vmem: Ref, sems: Ref) -> None:
    """The same for keys that lie transposed in VMEM, [n, D, block_size]; through [2, GROUP, block_size, D]."""
    n_groups = pl.cdiv(n_tokens, GROUP * k_hbm.shape[2])

    def copy(i: Array) -> Ref:
        blocks, slot = pl.ds(pl.multiple_of(i * GROUP, GROUP), GROUP), lax.rem(i, 2)
        return pltpu.make_async_copy(k_hbm.at[b, blocks], staged_vmem.at[slot], sems.at[slot])

    pl.when(n_groups > 0)(lambda: copy(jnp.int32(0)).start())

    def one_group(i: Array, _: None) -> None:
        pl.when(i + 1 < n_groups)(lambda: copy(i + 1).start())
        copy(i).wait()
        for g in range(GROUP):
            keys_vmem[i * GROUP + g] = staged_vmem[lax.rem(i, 2), g].T

    lax.fori_loop(0, n_groups, one_group, None)


def resident(place: Callable, places_smem: Ref, keys_vmem: Ref, scale_vmem: Ref | None) -> Source:
    """Keys in VMEM whole.

    Args:
        place: (step, list, slot) -> where `places_smem` [tile_t, steps, slots] holds it.
        keys_vmem: [n, block_size, D] or [n, D, block_size]; scale_vmem: [n, block_size].
    """

    def nothing(step: Step) -> None:
        del step

    return Source(
        keys=lambda *at: keys_vmem[places_smem[place(*at)]],
        scale=None if scale_vmem is None else lambda *at: scale_vmem[pl.ds(places_smem[place(*at)], 1)],
        start=nothing,
        wait=nothing,
    )


def ring(place: Callable, slots: int, places_smem: Ref, n_kept_smem: Ref, pairs: list, sems: Ref) -> Source:
    """Keys in HBM: a ring of two steps, and only the blocks that a query keeps are copied.

    Args:
        places_smem: [tile_t, steps, slots]; n_kept_smem: [tile_t, 1], blocks that a query keeps.
        pairs: [N, block_size, D] in HBM and [2, 8, slots, block_size, D] in VMEM; with scales also [N, 1, block_size]
            and [2, 8, slots, 1, block_size].
        sems: [2, 2], by place in the ring and operand.
    """

    def each_copy(step: Step, act: Callable) -> None:
        turn = lax.rem(step.turn, 2)
        for r in range(ROWS):
            for s in range(slots):
                row, i, _ = place(step, r, s)

                @pl.when(i * slots + s < n_kept_smem[row, 0])
                def _copy(r=r, s=s):
                    block = places_smem[place(step, r, s)]
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
