"""Device code of `scores`: one warp-group loads, the others score, each its own tile of keys."""

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from hisa_jax.kernels_pallas.mosaic_gpu.ptx.gather_keys import Source, Target, copy_rows
from hisa_jax.kernels_pallas.mosaic_gpu.ptx.score_loop import (
    Item,
    PerQuery,
    Smem,
    score_queries,
    score_queries_reference,
)
from hisa_jax.kernels_pallas.mosaic_gpu.ptx.score_shape import KEYS_PER_WARPGROUP, Shape
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

    D: int
    dtype: jnp.dtype
    pages: tuple[int, int] | None  # size, and how many; None: rows of a sequence follow each other
    n_spans: int
    n_ctas: int
    loop: Shape
    n_score: int
    n_keys: int
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
        return KEYS_PER_WARPGROUP if self.pages is None else min(KEYS_PER_WARPGROUP, self.pages[0])

    @property
    def n_copies(self) -> int:
        """What arrives at a barrier for an item: its copies."""
        if self.gathers:
            return 1
        return self.n_score * (self.loop.n_parts + self.loop.has_scale) * (KEYS_PER_WARPGROUP // self.part)


class Inputs(NamedTuple):
    """Arrays in device memory, whole. T counts what a slot of the ring holds: queries, or groups of them."""

    tiles: Ref  # [n_tiles, 4]
    limit: Ref | None  # [T]; None for groups, whose w have it
    first_column: Ref  # [1]
    q: Ref  # [T, H, D]
    w: Ref  # [T, H], or for groups [T, Shape.w_words]
    table: Ref | None  # [n], for keys in pages
    k: Ref  # [S, parts, D]
    k_scale: Ref | None  # [S]
    threshold: Ref | None  # [T]
    items: Ref | None  # [n, 2], tile and span of those that a query sees; None: of all tiles and spans
    n_items: Ref | None  # [1], how many


class Outputs(NamedTuple):
    """Arrays in device memory."""

    sort_keys: Ref | None  # [queries, width] int32; None where groups are filtered
    masks: Ref | None  # [queries, width // 32] int32, with a threshold


def scores_body(plan: Plan, gmem: Inputs, out: Outputs, smem: Smem) -> None:
    #                  a span of keys          ring of queries
    #   loader  ---->  k_full[slot]            q_full[slot]    ---->  n_score warp-groups, each with a tile of the span
    #   (1 warp)       k_free[slot]            q_free[slot]           in registers: product, relu, head sum, store
    #           <----  as soon as loaded       as soon as read <----
    #
    # CTAs are persistent: each has a list of items, a span of keys for a tile of queries. The loader runs ahead of the
    # others by `ring` queries and `n_keys` spans, across items, so that no item starts with an empty pipeline. Keys go
    # back as soon as they are in registers: the next span is on its way while queries stream past this one.
    role = lax.axis_index("warpgroup")
    items = _Items(plan, gmem)
    # Two branches of one condition: only so does ptxas give each role the registers that it asks for.
    lax.cond(
        role < plan.n_score,
        lambda: score(plan, items, role, PerQuery(gmem.limit, gmem.threshold, *out), smem),
        lambda: load(plan, items, gmem, smem),
    )


class _Items:
    """The work of a CTA: items cta, cta + n_ctas, ..., an item being a tile of queries and a span of keys."""

    def __init__(self, plan: Plan, gmem: Inputs) -> None:
        self.plan, self.tiles_gmem, self.items_gmem = plan, gmem.tiles, gmem.items
        self.cta = lax.axis_index("cta")
        n_items = gmem.tiles.shape[0] * plan.n_spans if gmem.n_items is None else gmem.n_items[0]
        self.n = (n_items - self.cta + plan.n_ctas - 1) // plan.n_ctas
        self.first_column = gmem.first_column[0]

    def __call__(self, i: Array) -> tuple[Array, Array, Array, Array]:
        """First query, how many (0 if none sees this span), column of the result and first key row."""
        item = self.cta + i * self.plan.n_ctas
        # Spans of one tile of queries are neighbours, so CTAs that run together read the same queries from L2.
        if self.items_gmem is None:
            tile, span = lax.div(item, self.plan.n_spans), lax.rem(item, self.plan.n_spans)
        else:
            tile, span = self.items_gmem[item, 0], self.items_gmem[item, 1]
        column = span * (KEYS_PER_WARPGROUP * self.plan.n_score)
        first, n, key_row, most = (self.tiles_gmem[tile, field] for field in range(4))
        n = jnp.where(self.first_column + column < most, n, 0)
        return first, n, column, key_row + self.first_column + column


def load(plan: Plan, items: _Items, gmem: Inputs, smem: Smem) -> None:
    """Brings each item's span of keys, then its queries one by one."""
    plgpu.set_max_registers(LOADER_REGISTERS, action="decrease")

    def one_item(i, n_before):
        first, n, _, key_row = items(i)
        slot = i % plan.n_keys
        plgpu.barrier_wait(smem.k_free.at[slot])
        if not plan.gathers:
            _copy_keys(plan, gmem, smem, slot, key_row)
        elif plan.interpret:
            _gather_keys_interpreted(plan, gmem, smem, slot, key_row)
        else:
            source, target = Source(gmem.k, gmem.k_scale, gmem.table), Target(smem.k, smem.scale, smem.k_full)
            copy_rows(source, target, slot, key_row, n)

        def one_query(j, _):
            slot, t = (n_before + j) % plan.loop.ring, first + j
            plgpu.barrier_wait(smem.q_free.at[slot])
            plgpu.copy_gmem_to_smem(gmem.q.at[t], smem.q.at[slot], smem.q_full.at[slot])
            plgpu.copy_gmem_to_smem(gmem.w.at[t], smem.w.at[slot, pl.ds(0, gmem.w.shape[1])], smem.q_full.at[slot])
            return _

        lax.fori_loop(0, n, one_query, None)
        return n_before + n

    def all_items() -> None:
        lax.fori_loop(0, items.n, one_item, jnp.int32(0))
        wait_all(smem.k_free, plan.n_keys)
        wait_all(smem.q_free, plan.loop.ring)

    # A store by the whole warp-group stands for what only PTX can do.
    all_items() if plan.gathers and plan.interpret else one_warp(all_items)


def _copy_keys(plan: Plan, gmem: Inputs, smem: Smem, slot: Array, key_row: Array) -> None:
    """A span of keys in runs of rows, each a copy: whole tiles, or what is in one page."""
    for group in range(plan.n_score):
        tile = slot * plan.n_score + group
        for first_of_copy in range(0, KEYS_PER_WARPGROUP, plan.part):
            rows = _key_rows(plan, gmem.table, key_row, group * KEYS_PER_WARPGROUP + first_of_copy)
            there = pl.ds(first_of_copy, plan.part)
            for part in range(plan.loop.n_parts):
                plgpu.copy_gmem_to_smem(gmem.k.at[rows, part], smem.k.at[tile, part, there], smem.k_full.at[slot])
            if gmem.k_scale is not None and smem.scale is not None:
                plgpu.copy_gmem_to_smem(gmem.k_scale.at[rows], smem.scale.at[tile, there], smem.k_full.at[slot])


def _gather_keys_interpreted(plan: Plan, gmem: Inputs, smem: Smem, slot: Array, key_row: Array) -> None:
    """`copy_rows` in jnp, for interpret mode, which cannot run PTX."""
    assert gmem.table is not None
    table, keys = gmem.table[...], gmem.k[...]
    for group in range(plan.n_score):
        row = key_row + group * KEYS_PER_WARPGROUP + jnp.arange(KEYS_PER_WARPGROUP, dtype=jnp.int32)
        rows = jnp.clip(table[jnp.minimum(row, table.shape[0] - 1)], 0, keys.shape[0] - 1)
        for part in range(plan.loop.n_parts):
            smem.k[slot * plan.n_score + group, part] = keys[rows, part]
        if gmem.k_scale is not None and smem.scale is not None:
            smem.scale[slot * plan.n_score + group] = gmem.k_scale[...][rows]
    plgpu.commit_smem()
    plgpu.barrier_arrive(smem.k_full.at[slot])


def _key_rows(plan: Plan, table_gmem: Ref, key_row: Array, offset: int) -> Ref:
    """Where a copy's rows are in k: those from key_row + offset on. A visible multiple of 8: tiled copies must know."""
    if plan.pages is None:
        return pl.ds((key_row // 8 + offset // 8) * 8, KEYS_PER_WARPGROUP)
    size, n_pages = plan.pages
    row = key_row + offset
    # The last tile reaches beyond the table: no query sees what is read there.
    page = table_gmem[jnp.minimum(row // size, table_gmem.shape[0] - 1)]
    page = jnp.minimum(jnp.maximum(page, 0), n_pages - 1)
    return pl.ds((page * (size // plan.part) + row % size // plan.part) * plan.part, plan.part)


def score(plan: Plan, items: _Items, group: Array, per_query: PerQuery, smem: Smem) -> None:
    """Sort keys of this warp-group's tile of each span."""
    plgpu.set_max_registers(share_registers(plan.n_score, LOADER_REGISTERS), action="increase")
    # Nothing is in use yet: every buffer is handed to the loader once.
    for slot in range(plan.n_keys):
        plgpu.barrier_arrive(smem.k_free.at[slot])
    for slot in range(plan.loop.ring):
        plgpu.barrier_arrive(smem.q_free.at[slot])

    def one_item(i, n_before):
        first, n, column, _ = items(i)
        slot = i % plan.n_keys
        column = column + group * KEYS_PER_WARPGROUP
        plgpu.barrier_wait(smem.k_full.at[slot])
        item = Item(
            group=group,
            key_slot=slot,
            tile=slot * plan.n_score + group,
            n=n,
            n_before=n_before,
            first=first,
            column=column,
            candidate=items.first_column + column,
        )

        @pl.when(n > 0)
        def _queries():
            if plan.interpret:
                score_queries_reference(plan.loop, item, smem, per_query, plan.interpret)
            else:
                score_queries(plan.loop, item, smem, per_query, plan.tile_transforms)

        # A span that no query of the tile sees is handed on all the same, so that every role counts the same phases.
        pl.when(n == 0)(lambda: release(plan, smem.k_free.at[slot]))
        return n_before + n

    lax.fori_loop(0, items.n, one_item, jnp.int32(0))
