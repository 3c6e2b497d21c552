"""Device code that brings the blocks of a sequence, `GROUP` at a time: from a row of them, or page by page.

Two ways to use what comes: `in_turn`, a ring of two slots whose next group is under way while one is used, and
`all_at_once`, into a place for each. A semaphore counts the bytes of one operand in one slot.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from hisa_jax.kernels_pallas.mosaic_tpu.config import GROUP, LANES
from hisa_jax.kernels_pallas.types import Ref

# (group, operand in HBM, its place in VMEM, semaphore, what to do with each copy: start it, or wait for it)
CopyGroup = Callable[[Array, Ref, Ref, Ref, Callable[[Ref], None]], None]


def in_a_row(first: Array, multiple: int = 1) -> CopyGroup:
    """Blocks of [N, ...] from block `first` on, a multiple of `multiple`.

    They go to [GROUP, ...], or in rows to [GROUP * block_size, D].
    """

    def copy_group(i: Array, hbm: Ref, vmem: Ref, sem: Ref, act: Callable) -> None:
        at = first + i * GROUP
        if len(vmem.shape) < len(hbm.shape):
            for block in range(GROUP):
                rows = vmem.at[pl.ds(block * hbm.shape[1], hbm.shape[1])]
                act(pltpu.make_async_copy(hbm.at[at + block], rows, sem))
            return
        # Sequences of a batch begin with a group, those of a packed batch anywhere.
        at = pl.multiple_of(at, GROUP) if multiple == GROUP else at
        act(pltpu.make_async_copy(hbm.at[pl.ds(at, GROUP)], vmem, sem))

    return copy_group


def by_pages(table_smem: Ref, n_pages: Array, per_block: int) -> CopyGroup:
    """Pages of a sequence, `per_block` to a block, that hold a token.

    Of keys [N, page_size, D] they go to [GROUP, block_size, D], or in rows to [GROUP * block_size, D]; a row a page,
    [N, x], goes to [GROUP * per_block, x].

    Args:
        table_smem: [1, P] int32, where each page of the sequence is; n_pages: how many hold a token.
    """

    def copy_group(i: Array, hbm: Ref, vmem: Ref, sem: Ref, act: Callable) -> None:
        first = i * (GROUP * per_block)

        def one_page(x: Array, _: None) -> None:
            page = table_smem[0, first + x]
            if len(hbm.shape) == 2:
                act(pltpu.make_async_copy(hbm.at[pl.ds(page, 1)], vmem.at[pl.ds(x, 1)], sem))
                return
            page_size = hbm.shape[1]
            if len(vmem.shape) == 2:
                rows = pl.ds(pl.multiple_of(x * page_size, page_size), page_size)
                act(pltpu.make_async_copy(hbm.at[page], vmem.at[rows], sem))
                return
            at = pl.ds(pl.multiple_of(lax.rem(x, per_block) * page_size, page_size), page_size)
            act(pltpu.make_async_copy(hbm.at[page], vmem.at[lax.div(x, per_block), at], sem))

        n, full = jnp.clip(n_pages - first, 0, GROUP * per_block), GROUP * per_block

        @pl.when(n == full)
        def _whole_group():
            # Semaphores count bytes: one wait for all pages takes 5 cycles, where each page's own would.
            if act is wait and vmem.shape[-1] % LANES == 0:
                wait(pltpu.make_async_copy(vmem, vmem, sem))
            else:
                lax.fori_loop(0, full, one_page, None, unroll=8)

        @pl.when(n < full)
        def _last_group():
            lax.fori_loop(0, n, one_page, None)

    return copy_group


def start(copy: Ref) -> None:
    copy.start()


def wait(copy: Ref) -> None:
    copy.wait()


def in_turn(
    copy_group: CopyGroup, n_groups: Array, pairs: list[tuple[Ref, Ref]], sems: Ref, use: Callable[[Array, Array], None]
) -> None:
    """Calls use(group, slot) for each group in turn, while the next one is under way.

    Args:
        pairs: operands in HBM and their rings [2, ...] in VMEM; sems: [2, operands].
    """

    def each(i: Array, act: Callable) -> None:
        slot = lax.rem(i, 2)
        for j, (hbm, ring) in enumerate(pairs):
            copy_group(i, hbm, ring.at[slot], sems.at[slot, j], act)

    pl.when(n_groups > 0)(lambda: each(jnp.int32(0), start))

    def one_group(i: Array, _: None) -> None:
        pl.when(i + 1 < n_groups)(lambda: each(i + 1, start))
        each(i, wait)
        use(i, lax.rem(i, 2))

    lax.fori_loop(0, n_groups, one_group, None)


def all_at_once(copy_group: CopyGroup, n_groups: Array, pairs: list[tuple[Ref, Ref, int]], sems: Ref) -> None:
    """Brings all groups to where they stay: starts every copy, then waits for every one.

    Args:
        pairs: operands in HBM, their places in VMEM, and how many rows of those a group takes; sems: [operands].
    """
    if not pairs:
        return

    def each(act: Callable) -> None:
        def one_group(i: Array, _: None) -> None:
            for j, (hbm, vmem, n_rows) in enumerate(pairs):
                at = pl.ds(pl.multiple_of(i * n_rows, GROUP), n_rows)
                copy_group(i, hbm, vmem.at[at], sems.at[j], act)

        lax.fori_loop(0, n_groups, one_group, None)

    each(start)
    each(wait)
