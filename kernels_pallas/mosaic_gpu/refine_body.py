"""Device code of `refine`: the roles of the warp-groups."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from hisa_jax.kernels_pallas.mosaic_gpu.ptx import select_row
from hisa_jax.kernels_pallas.mosaic_gpu.ptx.inline import Row
from hisa_jax.kernels_pallas.mosaic_gpu.ptx.lanes import (
    keys_of_lanes,
    load_lanes,
    load_word,
    multiply_and_sum,
    store_lanes,
)
from hisa_jax.kernels_pallas.mosaic_gpu.ptx.list_blocks import Lists, list_blocks
from hisa_jax.kernels_pallas.mosaic_gpu.topk_body import Outputs
from hisa_jax.kernels_pallas.mosaic_gpu.warpgroups import (
    HEAD_COLUMN,
    LOADER_REGISTERS,
    SELECT_REGISTERS,
    one_warp,
    release,
    share_registers,
    tiled,
    wait_all,
)
from hisa_jax.kernels_pallas.sort_key import INVISIBLE, sort_key_of
from hisa_jax.kernels_pallas.types import Ref

META = 4  # words after the block ids of a query: number of tiles, visible, first block of the sequence, 0
WORDS_A_COPY = 256  # at most
_NOWHERE = 2**30  # a position beyond what any query sees

# Puts sort keys of query t, in lane order, from a column on where they belong: (t, column, sort keys).
Store = Callable[[Array, Array, Array], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """The static numbers of a launch."""

    T: int  # queries, or parts of queries
    n_parts: int  # parts of a query: they share its heads and weights
    H: int
    D: int
    m: int  # block ids a query, padded so that a query's row of `meta` is a multiple of 128 bytes, as copies need it
    dtype: jnp.dtype
    has_scale: bool
    k_top: int | None  # None: sort keys out, no selection
    keeps_all: int  # a query that sees as few tokens keeps all of them, and needs no scores
    block_size: int
    tile_s: int
    n_score: int
    columns: int
    ring: int
    n_sort_keys: int
    width: int
    n_ctas: int
    interpret: object
    page_size: int | None  # None: the blocks of a sequence follow each other
    n_listed: int  # pages a query lists, padded
    gathers: bool = False  # listed tokens, row by row: refine_tokens_body.py
    lists: Lists | None = None  # how the loader makes the lists of a part; None: they are arrays

    @property
    def selects(self) -> bool:
        return self.k_top is not None

    @property
    def score_registers(self) -> int:
        others = (LOADER_REGISTERS, SELECT_REGISTERS) if self.selects else (LOADER_REGISTERS,)
        return share_registers(self.n_score, *others)

    @property
    def part(self) -> int:
        """Keys a copy: a tile holds several blocks or pages, or one of those several tiles."""
        return min(self.tile_s, self.page_size or self.block_size)

    @property
    def n_copies(self) -> int:
        return self.tile_s // self.part

    @property
    def n_list_copies(self) -> int:
        """Of what a query lists: its blocks with what is known of it, and its pages."""
        if self.lists is not None:
            return 0
        return -(-(self.m + META) // WORDS_A_COPY) + -(-self.n_listed // WORDS_A_COPY)

    @property
    def tile_transforms(self) -> tuple:
        return tiled(self.D, self.dtype)

    def queries(self, cta: Array) -> Array:
        """How many queries this CTA has: cta, cta + n_ctas, ..."""
        return (self.T - cta + self.n_ctas - 1) // self.n_ctas


class Inputs(NamedTuple):
    """Arrays in device memory, whole; T counts parts of queries, too."""

    meta: Ref  # [T, m + META + n_listed] int32: what is known of a query, then its pages; or `Kept`, to make them of
    q: Ref  # [T / n_parts, H, D]
    w: Ref  # [T / n_parts, H]
    k: Ref  # [S, D]
    k_scale: Ref | None  # [S]
    tokens: Ref = None  # [T, width] int32, listed in place of blocks, then -1
    rows: Ref = None  # [T, width] int32, where those are in k; None: that many after the sequence's first


class Smem(NamedTuple):
    """Shared memory of a CTA: two queries, a ring of tiles, rows of sort keys. Barriers are one a slot."""

    counts: Ref = None  # [1, SCRATCH_WORDS], of the selection; None, as sort keys, without a selector
    k_free: Ref = None  # of the warp-group that scored the tile
    k_full: Ref = None  # of a tile's copies
    k: Ref = None  # [ring, tile_s, D]
    landed: Ref = None  # [ring, BARRIER_WORDS], in place of `k_full` where rows are gathered
    meta: Ref = None  # [2, m + META]
    pages: Ref | None = None  # [2, n_listed]
    pin: Ref | None = None  # [n_score, 128] float32, never read
    q_free: Ref = None  # of those that score, and of the one that selects
    q_full: Ref = None  # of a query's copies: meta, pages, q, w
    q: Ref = None  # [2, H, D]
    ready: Ref = None  # `landed` has been made
    row: Ref = None  # words, the sort keys of a query among them, that all who score select from
    scale: Ref = None  # [ring, tile_s]
    scored: Ref = None  # of those that score: their sort keys are in `row`
    sort_keys_free: Ref = None  # of the warp-group that selects
    sort_keys_full: Ref = None  # of those that score
    sort_keys: Ref = None  # [n_sort_keys, width]
    w: Ref = None  # [2, H, at least 32]


def refine_body(plan: Plan, gmem: Inputs, o_gmem: Ref, count_gmem: Ref, smem: Smem) -> None:
    #              2 queries   ring of tiles                              1 or 2 rows
    #   loader  ->  q_full      k_full  ->  n_score warp-groups  ->  sort_keys_full  ->  selector  ->  o, count
    #   (1 warp)    q_free  <-  k_free  <-  in turns, a tile each <-  sort_keys_free  <-
    #
    # CTAs are persistent: queries cta, cta + n_ctas, ... Two are in flight: while one is scored, the best of the one
    # before are selected. As soon as that is done its slot is free, and the loader goes on to the next query, as far as
    # the ring of tiles goes. A query without tiles (it keeps all it sees) passes through all roles in the same way, so
    # that they count the same phases.
    #
    # A warp-group meets every `n_score`th tile. The ring is a multiple of that, so its slots repeat with its turns, and
    # it sees every phase of those slots.
    role, cta = lax.axis_index("warpgroup"), lax.axis_index("cta")
    pl.when(role < plan.n_score)(lambda: score(plan, cta, role, smem))
    pl.when(role == plan.n_score)(lambda: load_keys(plan, cta, gmem, smem))
    out = Outputs(o_gmem, count_gmem, None)
    pl.when(role == plan.n_score + 1)(lambda: select(plan, cta, None, out, smem))


def refine_scores_body(plan: Plan, gmem: Inputs, sort_keys_gmem: Ref, smem: Smem) -> None:
    # As `refine_body` without the selector: sort keys go to device memory.
    role, cta = lax.axis_index("warpgroup"), lax.axis_index("cta")

    def store(t: Array, first: Array, sort_key: Array) -> None:
        store_lanes(sort_keys_gmem, t, first, plan.tile_s, sort_key, plan.interpret)

    pl.when(role < plan.n_score)(lambda: score(plan, cta, role, smem, store))
    pl.when(role == plan.n_score)(lambda: load_keys(plan, cta, gmem, smem))


def load_keys(plan: Plan, cta: Array, gmem: Inputs, smem: Smem) -> None:
    """Brings each query with its lists, then the tiles of its blocks."""
    plgpu.set_max_registers(LOADER_REGISTERS, action="decrease")
    n_queries = plan.queries(cta)

    def one_query(i, _):
        t, slot = cta + i * plan.n_ctas, i % 2
        plgpu.barrier_wait(smem.q_free.at[slot])
        if plan.lists is not None:
            # Before the copies, which the other roles wait for.
            meta_row = Row(smem.meta, slot, plan.m + META)
            pages_row = None if smem.pages is None else Row(smem.pages, slot, plan.n_listed)
            list_blocks(plan.lists, gmem.meta, t // plan.n_parts, t % plan.n_parts, meta_row, pages_row)
        copy_query(plan, gmem, smem, t, slot)
        if plan.lists is None:
            # The loader reads what it has just copied: which blocks, and so which keys come next.
            plgpu.barrier_wait(smem.q_full.at[slot])
        meta = lambda column: load_word(smem.meta, slot, column, plan.interpret)  # noqa: E731
        page = lambda column: load_word(smem.pages, slot, column, plan.interpret)  # noqa: E731
        n_tiles, first_block = meta(plan.m), meta(plan.m + 2)

        def one_tile(j, _):
            slot = j % plan.ring
            plgpu.barrier_wait(smem.k_free.at[slot])
            for part in range(plan.n_copies):
                copy = _copy_of(plan, meta, page, first_block, j * plan.tile_s + part * plan.part)
                keys = pl.ds(copy * plan.part, plan.part)  # a visible multiple: tiled copies need to know
                there = pl.ds(part * plan.part, plan.part)
                plgpu.copy_gmem_to_smem(gmem.k.at[keys], smem.k.at[slot, there], smem.k_full.at[slot])
                if gmem.k_scale is not None and smem.scale is not None:
                    plgpu.copy_gmem_to_smem(gmem.k_scale.at[keys], smem.scale.at[slot, there], smem.k_full.at[slot])
            return _

        lax.fori_loop(0, n_tiles, one_tile, None)
        if plan.interpret:
            plgpu.commit_smem()  # as in `release`: this warp read `meta`, and a later copy of its own overwrites it
        return _

    @one_warp
    def _all_queries():
        lax.fori_loop(0, n_queries, one_query, None)
        wait_all(smem.k_free, plan.ring)
        wait_all(smem.q_free, 2)


def copy_query(plan: Plan, gmem: Inputs, smem: Smem, t: Array, slot: Array) -> None:
    """All that is known of query t, to one barrier: block ids, pages, heads, weights."""
    full = smem.q_full.at[slot]
    listed: list[tuple[Ref, int, int]] = [(smem.meta, 0, plan.m + META), (smem.pages, plan.m + META, plan.n_listed)]
    for target, begin, n in listed if plan.lists is None else []:
        for first in range(0, n, WORDS_A_COPY):
            size = min(n - first, WORDS_A_COPY)
            source = gmem.meta.at[t, pl.ds(begin + first, size)]
            plgpu.copy_gmem_to_smem(source, target.at[slot, pl.ds(first, size)], full)
    whole = t // plan.n_parts
    plgpu.copy_gmem_to_smem(gmem.q.at[whole], smem.q.at[slot], full)
    plgpu.copy_gmem_to_smem(gmem.w.at[whole], smem.w.at[slot, pl.ds(0, plan.H)], full)


def score(
    plan: Plan,
    cta: Array,
    group: Array,
    smem: Smem,
    store: Store | None = None,
    wait: Callable[[Array, Array], None] | None = None,
) -> None:
    """Sort keys of this warp-group's tiles.

    Args:
        store: None: sort keys go to the selector's row.
        wait: for a slot of the ring to be filled, for the n-th time.
    """
    plgpu.set_max_registers(plan.score_registers, action="increase")
    # Nothing is in use yet: every buffer is handed to the loader once.
    for turn in range(plan.ring // plan.n_score):
        plgpu.barrier_arrive(smem.k_free.at[turn * plan.n_score + group])
    for slot in range(2):
        plgpu.barrier_arrive(smem.q_free.at[slot])
    if smem.ready is not None:
        plgpu.barrier_wait(smem.ready)
    key = keys_of_lanes(plan.tile_s, plan.interpret)

    def one_query(i, laps):
        t, query_slot, sort_key_slot = cta + i * plan.n_ctas, i % 2, i % max(plan.n_sort_keys, 1)
        plgpu.barrier_wait(smem.q_full.at[query_slot])
        n_tiles, visible = smem.meta[query_slot, plan.m], smem.meta[query_slot, plan.m + 1]
        w = plgpu.load(smem.w.at[query_slot, pl.ds(0, plan.H)], layout=HEAD_COLUMN)
        if plan.selects:
            plgpu.barrier_wait(smem.sort_keys_free.at[sort_key_slot])

        def one_tile(turn, _):
            j = turn * plan.n_score + group
            slot = j % plan.ring
            if wait is None:
                plgpu.barrier_wait(smem.k_full.at[slot])
            else:
                wait(slot, laps + j // plan.ring)
            if smem.scale is not None:
                scale = load_lanes(smem.scale, slot, plan.tile_s, plan.interpret)

            def pin_scale() -> None:
                # An arrival is not ordered after the thread's own loads, which could read what is copied next. A store
                # of what was loaded is not moved beyond the wait for the product, and waits for the load itself.
                if smem.pin is not None and not plan.interpret:
                    store_lanes(smem.pin, group, jnp.int32(0), plan.tile_s, scale, plan.interpret)

            # The tile goes back as soon as the product has read it; the head sum needs registers alone.
            give_back = lambda: release(plan, smem.k_free.at[slot])  # noqa: E731
            operands = [smem.k.at[slot]], smem.q.at[query_slot], w
            scores = multiply_and_sum(*operands, give_back, plan.interpret, meanwhile=pin_scale)
            # One scale a key, after the sum: 2 instructions a product (maximum, multiply-add) instead of 3.
            if smem.scale is not None:
                scores = scores * scale
            is_visible = _positions(plan, smem.meta, query_slot, j, key) < visible
            sort_key = jnp.where(is_visible, sort_key_of(scores), INVISIBLE)
            if store is None:
                row, first = sort_key_slot, j * plan.tile_s
                store_lanes(smem.sort_keys, row, first, plan.tile_s, sort_key, plan.interpret)
            else:
                store(t, j * plan.tile_s, sort_key)
            return _

        lax.fori_loop(0, n_tiles // plan.n_score, one_tile, None)
        release(plan, smem.q_free.at[query_slot])
        if plan.selects:
            plgpu.barrier_arrive(smem.sort_keys_full.at[sort_key_slot])
        return laps if wait is None else laps + n_tiles // plan.ring

    lax.fori_loop(0, plan.queries(cta), one_query, None if wait is None else jnp.int32(0))
    if plan.selects:
        wait_all(smem.sort_keys_free, plan.n_sort_keys)


def select(plan: Plan, cta: Array, tokens_gmem: Ref | None, outputs: Outputs, smem: Smem) -> None:
    """The best of each query's sort keys, while the other warp-groups score the next query."""
    plgpu.set_max_registers(SELECT_REGISTERS, action="decrease")
    for slot in range(2):
        plgpu.barrier_arrive(smem.q_free.at[slot])
    for sort_key_slot in range(plan.n_sort_keys):
        plgpu.barrier_arrive(smem.sort_keys_free.at[sort_key_slot])

    def one_query(i, _):
        t, query_slot, sort_key_slot = cta + i * plan.n_ctas, i % 2, i % plan.n_sort_keys
        plgpu.barrier_wait(smem.q_full.at[query_slot])
        plgpu.barrier_wait(smem.sort_keys_full.at[sort_key_slot])
        n_tiles, visible = smem.meta[query_slot, plan.m], smem.meta[query_slot, plan.m + 1]
        out = select_row.Output(t, *outputs)

        @pl.when(n_tiles == 0)
        def _keep_all():
            select_row.write_prefix(out, visible, plan.interpret)

        @pl.when(n_tiles > 0)
        def _keep_best():
            n_columns = n_tiles * plan.tile_s
            if plan.interpret:
                columns = jnp.arange(plan.width, dtype=jnp.int32)
                sort_keys = jnp.where(columns < n_columns, smem.sort_keys[sort_key_slot], INVISIBLE)
                if tokens_gmem is None:
                    block_ids = smem.meta[query_slot][jnp.minimum(columns // plan.block_size, plan.m - 1)]
                    positions = block_ids * plan.block_size + columns % plan.block_size
                else:
                    positions = tokens_gmem[t]
                select_row.choose_reference(sort_keys, positions, out)
                return
            scratch = Row(smem.counts, jnp.int32(0), select_row.SCRATCH_WORDS)
            if tokens_gmem is None:
                ids = Row(smem.meta, query_slot, plan.m + META)
                positions = select_row.block_positions(plan.block_size, ids)
            else:
                positions = select_row.positions_in_memory(Row(tokens_gmem, t, plan.width))
            row = Row(smem.sort_keys, sort_key_slot, plan.width)
            select_row.choose(row, n_columns, scratch, positions, out)

        # The block ids are read until here, so the query's slot goes back only now.
        release(plan, smem.q_free.at[query_slot])
        plgpu.barrier_arrive(smem.sort_keys_free.at[sort_key_slot])
        return _

    lax.fori_loop(0, plan.queries(cta), one_query, None)


def _block_of(plan: Plan, meta: Callable[[Array], Array], column: Array) -> tuple[Array, Array]:
    """Which block a column belongs to (-1: none), and the column's offset in it."""
    j = column // plan.block_size
    # The last lap of the ring may reach beyond the list.
    block_id = meta(jnp.minimum(j, plan.m - 1))
    return jnp.where(j < plan.m, block_id, -1), column % plan.block_size


def _copy_of(
    plan: Plan, meta: Callable[[Array], Array], page: Callable[[Array], Array], first_block: Array, column: Array
) -> Array:
    """Where in k the copy is that brings the keys of a column on, in units of a copy."""
    if plan.page_size is not None:
        nth = jnp.minimum(column // plan.page_size, plan.n_listed - 1)
        return page(nth) * (plan.page_size // plan.part) + column % plan.page_size // plan.part
    block_id, offset = _block_of(plan, meta, column)
    return (first_block + jnp.maximum(block_id, 0)) * (plan.block_size // plan.part) + offset // plan.part


def _positions(plan: Plan, meta_smem: Ref, slot: Array, j: Array, key: Array) -> Array:
    """Token positions of the keys of tile j, [tile_s] int32; of listed tokens their places in the list."""
    if plan.gathers:
        return key + j * plan.tile_s
    size = min(plan.tile_s, plan.block_size)

    def from_key(first: int) -> Array:
        """Of a block that begins with key `first` of the tile: positions there are its own plus a constant."""
        block_id, offset = _block_of(plan, lambda column: meta_smem[slot, column], j * plan.tile_s + first)
        return key + jnp.where(block_id >= 0, block_id * plan.block_size + offset - first, _NOWHERE)

    positions = from_key(0)
    for first in range(size, plan.tile_s, size):
        positions = jnp.where(key >= first, from_key(first), positions)
    return positions
