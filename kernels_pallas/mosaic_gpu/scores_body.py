"""Device code of `scores`: one warp-group loads, the others score, each its own tile of keys."""

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from hisa_jax.kernels_pallas.mosaic_gpu.ptx.gather_keys import copy_rows
from hisa_jax.kernels_pallas.mosaic_gpu.ptx.score_loop import (
    ROWS,
    Buffers,
    Item,
    Shape,
    score_queries,
    score_queries_reference,
)
from hisa_jax.kernels_pallas.mosaic_gpu.warpgroups import (
    LOADER_REGISTERS,
    one_warp,
    release,
    share_registers,
    tiled,
    wait_all,
)
from hisa_jax.kernels_pallas.types import Ref


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """The static numbers of a launch."""

    T: int
    H: int
    D: int
    dtype: jnp.dtype
    has_scale: bool
    n_parts: int
    pages: tuple[int, int] | None  # size, and how many; None: rows of a sequence are one behind the other
    n_spans: int
    n_items: int
    n_ctas: int
    loop: Shape
    n_score: int
    n_keys: int
    ring: int
    interpret: object

    @property
    def tile_transforms(self) -> tuple:
        return tiled(self.D, self.dtype)

    @property
    def gathers(self) -> bool:
        """Whether every key is a page of its own, too small for a tiled copy."""
        return self.pages is not None and self.pages[0] == 1

    @property
    def part(self) -> int:
        """Keys a copy."""
        return ROWS if self.pages is None else min(ROWS, self.pages[0])

    @property
    def n_copies(self) -> int:
        """What arrives at a barrier for an item: its copies."""
        if self.gathers:
            return 1
        return self.n_score * (self.n_parts + self.has_scale) * (ROWS // self.part)


def scores_body(
    plan: Plan,
    tiles_gmem: Ref,
    limit_gmem: Ref,
    first_column_gmem: Ref,
    q_gmem: Ref,
    w_gmem: Ref,
    *refs: Ref,
    **scratch: Ref,
) -> None:
    table_gmem, refs = (None, refs) if plan.pages is None else (refs[0], refs[1:])
    n_keys = 1 + plan.has_scale
    keys_gmem, threshold_gmem, out = (
        refs[:n_keys],
        refs[n_keys : -1 - plan.loop.filters],
        refs[-1 - plan.loop.filters :],
    )
    role = lax.axis_index("warpgroup")
    items = _Items(plan, tiles_gmem, first_column_gmem)
    # Two branches of one condition: only so does ptxas give each role the registers that it asks for.
    lax.cond(
        role < plan.n_score,
        lambda: score(plan, items, role, limit_gmem, threshold_gmem, out, **scratch),
        lambda: load(plan, items, q_gmem, w_gmem, keys_gmem, table_gmem, **scratch),
    )


class _Items:
    """The work of a CTA: items cta, cta + n_ctas, ..., an item being a tile of queries and a span of keys."""

    def __init__(self, plan: Plan, tiles_gmem: Ref, first_column_gmem: Ref) -> None:
        self.plan, self.tiles_gmem = plan, tiles_gmem
        self.cta = lax.axis_index("cta")
        self.n = (plan.n_items - self.cta + plan.n_ctas - 1) // plan.n_ctas
        self.first_column = first_column_gmem[0]

    def __call__(self, i: Array) -> tuple[Array, Array, Array, Array]:
        """First query, how many (0 if none sees this span), column of the result and first key row."""
        item = self.cta + i * self.plan.n_ctas
        tile, span = item // self.plan.n_spans, item % self.plan.n_spans
        column = span * (ROWS * self.plan.n_score)
        first, n, key_row, most = (self.tiles_gmem[tile, field] for field in range(4))
        n = jnp.where(self.first_column + column < most, n, 0)
        return first, n, column, key_row + self.first_column + column


def load(
    plan: Plan,
    items: _Items,
    q_gmem: Ref,
    w_gmem: Ref,
    keys_gmem: Ref,
    table_gmem: Ref,
    *,
    q_smem: Ref,
    w_smem: Ref,
    k_smem: Ref,
    q_full: Ref,
    q_free: Ref,
    k_full: Ref,
    k_free: Ref,
    scale_smem: Ref = None,
) -> None:
    plgpu.set_max_registers(LOADER_REGISTERS, action="decrease")
    scale_gmem: Ref = keys_gmem[1] if plan.has_scale else None

    def copy_keys(at: Array, key_row: Array) -> None:
        for group in range(plan.n_score):
            tile = at * plan.n_score + group
            for first_of_copy in range(0, ROWS, plan.part):
                rows = _rows(plan, table_gmem, key_row, group * ROWS + first_of_copy)
                there = pl.ds(first_of_copy, plan.part)
                for part in range(plan.n_parts):
                    plgpu.copy_gmem_to_smem(keys_gmem[0].at[rows, part], k_smem.at[tile, part, there], k_full.at[at])
                if plan.has_scale:
                    plgpu.copy_gmem_to_smem(scale_gmem.at[rows], scale_smem.at[tile, there], k_full.at[at])

    def gather_keys_interpreted(at: Array, key_row: Array) -> None:
        table, keys = table_gmem[...], keys_gmem[0][...]
        for group in range(plan.n_score):
            place = jnp.minimum(key_row + group * ROWS + jnp.arange(ROWS, dtype=jnp.int32), table.shape[0] - 1)
            rows = jnp.clip(table[place], 0, keys.shape[0] - 1)
            for part in range(plan.n_parts):
                k_smem[at * plan.n_score + group, part] = keys[rows, part]
            if plan.has_scale:
                scale_smem[at * plan.n_score + group] = scale_gmem[...][rows]
        plgpu.commit_smem()
        plgpu.barrier_arrive(k_full.at[at])

    def one_item(i, n_before):
        first, n, _, key_row = items(i)
        at = i % plan.n_keys
        plgpu.barrier_wait(k_free.at[at])
        if not plan.gathers:
            copy_keys(at, key_row)
        elif plan.interpret:
            gather_keys_interpreted(at, key_row)
        else:
            copy_rows(keys_gmem[0], scale_gmem, table_gmem, key_row, n, k_smem, scale_smem, k_full, at)

        def one_query(j, _):
            slot, t = (n_before + j) % plan.ring, first + j
            plgpu.barrier_wait(q_free.at[slot])
            plgpu.copy_gmem_to_smem(q_gmem.at[t], q_smem.at[slot], q_full.at[slot])
            plgpu.copy_gmem_to_smem(w_gmem.at[t], w_smem.at[slot, pl.ds(0, plan.H)], q_full.at[slot])
            return _

        lax.fori_loop(0, n, one_query, None)
        return n_before + n

    def all_items() -> None:
        lax.fori_loop(0, items.n, one_item, jnp.int32(0))
        wait_all(k_free, plan.n_keys)
        wait_all(q_free, plan.ring)

    # A store by the whole warp-group stands for what only PTX can do.
    all_items() if plan.gathers and plan.interpret else one_warp(all_items)


def _rows(plan: Plan, table_gmem: Ref, key_row: Array, offset: int) -> Ref:
    """Where a copy's rows are in k: those from key_row + offset on. A visible multiple of 8: tiled copies must know."""
    if plan.pages is None:
        return pl.ds((key_row // 8 + offset // 8) * 8, ROWS)
    size, n_pages = plan.pages
    row = key_row + offset
    # The last tile reaches behind the table; what it reads there nobody sees.
    page = table_gmem[jnp.minimum(row // size, table_gmem.shape[0] - 1)]
    page = jnp.minimum(jnp.maximum(page, 0), n_pages - 1)
    return pl.ds((page * (size // plan.part) + row % size // plan.part) * plan.part, plan.part)


def score(
    plan: Plan,
    items: _Items,
    group: Array,
    limit_gmem: Ref,
    threshold_gmem: Sequence[Ref],
    out: Sequence[Ref],
    *,
    k_full: Ref,
    scale_smem: Ref = None,
    **refs: Ref,
) -> None:
    plgpu.set_max_registers(share_registers(plan.n_score, LOADER_REGISTERS), action="increase")
    threshold = threshold_gmem[0] if threshold_gmem else None
    buffers = Buffers(scale_smem=scale_smem, **refs)
    for at in range(plan.n_keys):
        plgpu.barrier_arrive(buffers.k_free.at[at])
    for slot in range(plan.ring):
        plgpu.barrier_arrive(buffers.q_free.at[slot])

    def one_item(i, n_before):
        first, n, column, _ = items(i)
        at = i % plan.n_keys
        column = column + group * ROWS
        plgpu.barrier_wait(k_full.at[at])
        item = Item(
            key_slot=at,
            tile=at * plan.n_score + group,
            n=n,
            n_before=n_before,
            first=first,
            column=column,
            candidate=items.first_column + column,
        )

        @pl.when(n > 0)
        def _queries():
            if plan.interpret:
                score_queries_reference(plan.loop, item, buffers, limit_gmem, out, threshold, plan.interpret)
            else:
                score_queries(plan.loop, item, buffers, limit_gmem, out, threshold, plan.tile_transforms)

        pl.when(n == 0)(lambda: release(plan, buffers.k_free.at[at]))
        return n_before + n

    lax.fori_loop(0, items.n, one_item, jnp.int32(0))
