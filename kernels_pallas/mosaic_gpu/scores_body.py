"""Device code of `scores`: one warp-group loads, the others score, each its own tile of keys."""

import dataclasses
import functools
from collections.abc import Callable
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

    def slots(self, n: Array) -> Array:
        """Of the ring for so many queries."""
        return n if self.loop.together == 1 else lax.div(n + (self.loop.together - 1), jnp.int32(self.loop.together))

    @property
    def n_copies(self) -> int:
        """What arrives at a barrier for an item: its copies."""
        if self.gathers:
            return 1
        return self.n_score * (self.loop.n_parts + self.loop.has_scale) * (KEYS_PER_WARPGROUP // self.part)


class Inputs(NamedTuple):
    """Arrays in device memory, whole. T counts what a slot of the ring holds: queries, or groups of them."""

    tiles: Ref | None  # [n_tiles, 4]; None: each query is one, of the only sequence
    limit: Ref | None  # [T]; None for groups, whose w have it
    first_column: Ref | None  # [1]; None: 0
    q: Ref  # [T, H, D]
    w: Ref  # [T, H], or for groups [T, Shape.w_words]
    table: Ref | None  # [n], for keys in pages
    k: Ref  # [S, parts, D]
    k_scale: Ref | None  # [S]
    threshold: Ref | None  # [T]


class Outputs(NamedTuple):
    """Arrays in device memory."""

    sort_keys: Ref | None  # [queries, width] int32; None where groups are filtered
    masks: Ref | None  # [queries, width // 32] int32, with a threshold
    maxima: Ref | None = None  # [queries, width // Shape.maxima_of] int32, if they are wanted


def scores_body(plan: Plan, gmem: Inputs, out: Outputs, smem: Smem) -> None:
    #                  a span of keys          ring of queries
    #   loader  ---->  k_full[slot]            q_full[slot]    ---->  n_score warp-groups, each with a tile of the span
    #   (1 warp)       k_free[slot]            q_free[slot]           in registers: product, relu, head sum, store
    #           <----  as soon as loaded       as soon as read <----
    #
    # CTAs are persistent: each has some items, a span of keys for a tile of queries. The loader runs ahead of the
    # others by `ring` queries and `n_keys` spans, across items, so that no item starts with an empty pipeline. Keys go
    # back as soon as they are in registers: the next span is on its way while queries stream past this one.
    role = lax.axis_index("warpgroup")
    # Two branches of one condition: only so does ptxas give each role the registers that it asks for.
    lax.cond(
        role < plan.n_score,
        lambda: score(plan, gmem, role, PerQuery(gmem.limit, gmem.threshold, *out), smem),
        lambda: load(plan, gmem, smem),
    )


class Work(NamedTuple):
    """An item: a span of keys for a tile of queries that see some of it."""

    first: Array  # query
    n: Array  # queries, at least 1
    column: Array  # of the result, where the span's first key goes
    candidate: Array  # what limits call that key
    key_row: Array  # of the span's first key


_LAST_WARP = 3  # of the loader, a warp-group
Carry = tuple[Array, Array]  # items, and slots of queries, that this CTA has met so far


def each_item(plan: Plan, gmem: Inputs, f: Callable[[Work, Carry], None]) -> Carry:
    """Runs f for every item of this CTA: of all items in order, tile by tile, each CTA has every `n_ctas`th.

    Spans that no query of a tile sees are not counted: else some CTAs would meet more of them than others, at 8K with
    as many queries as half of the keys a quarter of the time.
    """
    cta, width = lax.axis_index("cta"), KEYS_PER_WARPGROUP * plan.n_score
    n_tiles = gmem.q.shape[0] if gmem.tiles is None else gmem.tiles.shape[0]
    first_column = jnp.int32(0) if gmem.first_column is None else gmem.first_column[0]

    def fields_of(tile: Array | int) -> tuple:
        if gmem.tiles is not None:
            return tuple(gmem.tiles[tile, field] for field in range(4))
        assert gmem.limit is not None
        return jnp.asarray(tile, jnp.int32), jnp.int32(1), jnp.int32(0), gmem.limit[tile]

    def one_tile(tile: Array, state: tuple[Array, Carry, tuple]) -> tuple[Array, Carry, tuple]:
        begin, carry, (first, n, key_row, most) = state
        # On its way meanwhile: of few queries a tile is a few items, which take no longer than to wait for it.
        following = fields_of(jnp.minimum(tile + 1, n_tiles - 1))
        n_seen = lax.div(jnp.maximum(most - first_column, 0) + (width - 1), jnp.int32(width))
        n_seen = jnp.where(n > 0, jnp.minimum(n_seen, plan.n_spans), 0)

        def one_span(i: Array, carry: Carry) -> Carry:
            # Spans of one tile of queries are neighbours, so CTAs that run together read the same queries from L2.
            column = (begin + i * plan.n_ctas) * width
            f(Work(first, n, column, first_column + column, key_row + first_column + column), carry)
            return carry[0] + 1, carry[1] + plan.slots(n)

        n_mine = lax.div(jnp.maximum(n_seen - begin, 0) + (plan.n_ctas - 1), jnp.int32(plan.n_ctas))
        carry = lax.fori_loop(0, n_mine, one_span, carry)
        # The next tile's first span is for the CTA after the one that has this tile's last.
        begin = begin - lax.rem(n_seen, jnp.int32(plan.n_ctas))
        return jnp.where(begin < 0, begin + plan.n_ctas, begin), carry, following

    nothing = jnp.int32(0), jnp.int32(0)
    if plan.n_ctas < n_tiles * plan.n_spans:
        return lax.fori_loop(0, n_tiles, one_tile, (cta, nothing, fields_of(0)))[1]
    # A CTA has one item at most, and need not look for it.
    tile = lax.div(cta, jnp.int32(plan.n_spans))
    return one_tile(tile, (lax.rem(cta, jnp.int32(plan.n_spans)), nothing, fields_of(tile)))[1]


def load(plan: Plan, gmem: Inputs, smem: Smem) -> None:
    """Brings each item's span of keys, and its queries one by one."""
    plgpu.set_max_registers(LOADER_REGISTERS, action="decrease")
    if plan.gathers:
        # A store by the whole warp-group stands for what only PTX can do.
        everything = functools.partial(_load_items, plan, gmem, smem, None)
        everything() if plan.interpret else one_warp(everything)
    else:
        plgpu.warp_map(functools.partial(_load_items, plan, gmem, smem))


def _load_items(plan: Plan, gmem: Inputs, smem: Smem, warp: Array | None) -> None:
    """What one warp of the loader brings: the keys of a slot, and the last one queries. None: all of it.

    One warp for all slots would be the limit of few queries: from an item to the next it takes some 230 instructions,
    most of which wait for the one before, and a look-up of pages.
    """
    by = lambda who: (lambda body: body()) if warp is None else pl.when(warp == who)  # noqa: E731

    def one_item(work: Work, met: Carry) -> None:
        slot = lax.rem(met[0], jnp.int32(plan.n_keys))

        @by(slot)
        def _keys():
            # Pages are looked up while the slot is still in use.
            rows = [] if plan.gathers else _rows_of_copies(plan, gmem.table, work.key_row)
            plgpu.barrier_wait(smem.k_free.at[slot])
            if not plan.gathers:
                _copy_keys(plan, gmem, smem, slot, rows)
            elif plan.interpret:
                _gather_keys_interpreted(plan, gmem, smem, slot, work.key_row)
            else:
                source, target = Source(gmem.k, gmem.k_scale, gmem.table), Target(smem.k, smem.scale, smem.k_full)
                copy_rows(source, target, slot, work.key_row)

        def one_slot(j, _):
            slot = (met[1] + j) % plan.loop.ring
            plgpu.barrier_wait(smem.q_free.at[slot])
            for i in range(plan.loop.together):
                # A slot that is not full ends with any query: its scores are not written.
                t = jnp.minimum(work.first + j * plan.loop.together + i, gmem.q.shape[0] - 1)
                heads, words = (pl.ds(i * n, n) for n in (plan.loop.H, gmem.w.shape[1]))
                plgpu.copy_gmem_to_smem(gmem.q.at[t], smem.q.at[slot, heads], smem.q_full.at[slot])
                plgpu.copy_gmem_to_smem(gmem.w.at[t], smem.w.at[slot, words], smem.q_full.at[slot])
            return _

        by(_LAST_WARP)(lambda: lax.fori_loop(0, plan.slots(work.n), one_slot, None) and None)

    each_item(plan, gmem, one_item)
    for slot in range(plan.n_keys):
        by(slot)(functools.partial(plgpu.barrier_wait, smem.k_free.at[slot]))
    by(_LAST_WARP)(lambda: wait_all(smem.q_free, plan.loop.ring))


def _copy_keys(plan: Plan, gmem: Inputs, smem: Smem, slot: Array, rows: list[Ref]) -> None:
    """A span of keys in runs of rows, each a copy: whole tiles, or what is in one page."""
    per_tile = KEYS_PER_WARPGROUP // plan.part
    for i, copy in enumerate(rows):
        tile, there = slot * plan.n_score + i // per_tile, pl.ds(i % per_tile * plan.part, plan.part)
        for part in range(plan.loop.n_parts):
            plgpu.copy_gmem_to_smem(gmem.k.at[copy, part], smem.k.at[tile, part, there], smem.k_full.at[slot])
        if gmem.k_scale is not None and smem.scale is not None:
            plgpu.copy_gmem_to_smem(gmem.k_scale.at[copy], smem.scale.at[tile, there], smem.k_full.at[slot])


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


def _rows_of_copies(plan: Plan, table_gmem: Ref, key_row: Array) -> list[Ref]:
    """Where the rows of each copy of a span are in k. A visible multiple of 8: tiled copies must know."""
    offsets = range(0, KEYS_PER_WARPGROUP * plan.n_score, plan.part)
    if plan.pages is None:
        return [pl.ds((key_row // 8 + offset // 8) * 8, plan.part) for offset in offsets]
    size, n_pages = plan.pages

    def rows(offset: int) -> Ref:
        row = key_row + offset
        # The last tile reaches beyond the table: no query sees what is read there.
        page = table_gmem[jnp.minimum(row // size, table_gmem.shape[0] - 1)]
        page = jnp.minimum(jnp.maximum(page, 0), n_pages - 1)
        return pl.ds((page * (size // plan.part) + row % size // plan.part) * plan.part, plan.part)

    return [rows(offset) for offset in offsets]


def score(plan: Plan, gmem: Inputs, group: Array, per_query: PerQuery, smem: Smem) -> None:
    """Sort keys of this warp-group's tile of each span."""
    plgpu.set_max_registers(share_registers(plan.n_score, LOADER_REGISTERS), action="increase")
    # Nothing is in use yet: every buffer is handed to the loader once.
    for slot in range(plan.n_keys):
        plgpu.barrier_arrive(smem.k_free.at[slot])
    for slot in range(plan.loop.ring):
        plgpu.barrier_arrive(smem.q_free.at[slot])

    def one_item(work: Work, met: Carry) -> None:
        slot = lax.rem(met[0], jnp.int32(plan.n_keys))
        column = work.column + group * KEYS_PER_WARPGROUP
        plgpu.barrier_wait(smem.k_full.at[slot])
        item = Item(
            group=group,
            key_slot=slot,
            tile=slot * plan.n_score + group,
            n=work.n,
            n_before=met[1],
            first=work.first,
            column=column,
            candidate=work.candidate + group * KEYS_PER_WARPGROUP,
        )
        if plan.interpret:
            score_queries_reference(plan.loop, item, smem, per_query, plan.interpret)
        else:
            score_queries(plan.loop, item, smem, per_query, plan.tile_transforms)

    each_item(plan, gmem, one_item)
