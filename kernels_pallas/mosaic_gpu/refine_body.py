"""Device code of `refine`: the roles of the warp-groups.

q_full -> n tiles of k_full -> sort_keys_full -> result, and each buffer goes back by its `_free` barrier.
"""

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from hisa_jax.kernels_pallas.mosaic_gpu.ptx import select_row as select_rows
from hisa_jax.kernels_pallas.mosaic_gpu.ptx.lanes import (
    keys_of_lanes,
    load_lanes,
    load_word,
    multiply_and_sum,
    store_lanes,
)
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
from hisa_jax.kernels_pallas.types import Interpret, Ref

META = 4  # behind the block ids of a query: number of tiles, visible, first block of the sequence, 0
PAGES_A_COPY = 256  # the most elements an axis that a copy takes
_NOWHERE = 2**30  # a position nobody sees


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
    block_size: int
    rows: int
    n_score: int
    columns: int
    ring: int
    n_sort_keys: int
    width: int
    n_ctas: int
    interpret: object
    page_size: int | None  # None: blocks lie in one piece, one behind the other
    n_listed: int  # pages a query lists, padded

    @classmethod
    def of(
        cls,
        q: Ref,
        k: Ref,
        k_scale: Ref,
        block_ids: Ref,
        k_top: Ref,
        block_size: Ref,
        config: Ref,
        n_ctas: Ref,
        interpret: Interpret,
        places: Ref,
        pages: Ref,
    ) -> "Plan":
        _, H, D = q.shape
        T, m = block_ids.shape
        return cls(
            T=T,
            n_parts=T // q.shape[0],
            H=H,
            D=D,
            m=-(-(m + META) // 32) * 32 - META,
            dtype=k.dtype,
            has_scale=k_scale is not None,
            k_top=k_top,
            block_size=block_size,
            rows=config.rows,
            n_score=config.n_score,
            columns=config.columns,
            ring=config.ring,
            n_sort_keys=config.n_sort_keys,
            width=-(-m * block_size // config.columns) * config.columns,
            n_ctas=n_ctas,
            interpret=interpret,
            page_size=None if pages is None else pages.size,
            n_listed=places[0].shape[1] if places else 0,
        )

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
        return min(self.rows, self.page_size or self.block_size)

    @property
    def n_copies(self) -> int:
        return self.rows // self.part

    @property
    def n_page_copies(self) -> int:
        return -(-self.n_listed // PAGES_A_COPY)

    @property
    def tile_transforms(self) -> tuple:
        return tiled(self.D, self.dtype)

    def queries(self, cta: Array) -> Array:
        """How many queries this CTA has: cta, cta + n_ctas, ..."""
        return (self.T - cta + self.n_ctas - 1) // self.n_ctas


def refine_body(plan: Plan, *refs: Ref, **scratch: Ref) -> None:
    *operands, o_gmem, count_gmem = refs
    role = lax.axis_index("warpgroup")
    pl.when(role < plan.n_score)(lambda: score(plan, role, None, **scratch))
    pl.when(role == plan.n_score)(lambda: load_keys(plan, *operands, **scratch))
    pl.when(role == plan.n_score + 1)(lambda: select(plan, o_gmem, count_gmem, **scratch))


def refine_scores_body(plan: Plan, *refs: Ref, **scratch: Ref) -> None:
    *operands, sort_keys_gmem = refs
    role = lax.axis_index("warpgroup")
    pl.when(role < plan.n_score)(lambda: score(plan, role, sort_keys_gmem, **scratch))
    pl.when(role == plan.n_score)(lambda: load_keys(plan, *operands, **scratch))


def load_keys(
    plan: Plan,
    meta_gmem: Ref,
    *refs: Ref,
    meta_smem: Ref,
    q_smem: Ref,
    w_smem: Ref,
    k_smem: Ref,
    q_full: Ref,
    q_free: Ref,
    k_full: Ref,
    k_free: Ref,
    scale_smem: Ref = None,
    pages_smem: Ref = None,
    **_: Ref,
) -> None:
    *pages_gmem, q_gmem, w_gmem, k_gmem = refs[: len(refs) - plan.has_scale]
    scale_gmem = refs[-1]
    plgpu.set_max_registers(LOADER_REGISTERS, action="decrease")
    cta = lax.axis_index("cta")
    n_queries = plan.queries(cta)

    def one_query(i, _):
        t, at = cta + i * plan.n_ctas, i % 2
        plgpu.barrier_wait(q_free.at[at])
        plgpu.copy_gmem_to_smem(meta_gmem.at[t], meta_smem.at[at], q_full.at[at])
        for first in range(0, plan.n_listed, PAGES_A_COPY):
            some = pl.ds(first, min(plan.n_listed, PAGES_A_COPY))
            plgpu.copy_gmem_to_smem(pages_gmem[0].at[t, some], pages_smem.at[at, some], q_full.at[at])
        whole = t // plan.n_parts
        plgpu.copy_gmem_to_smem(q_gmem.at[whole], q_smem.at[at], q_full.at[at])
        plgpu.copy_gmem_to_smem(w_gmem.at[whole], w_smem.at[at, pl.ds(0, plan.H)], q_full.at[at])
        plgpu.barrier_wait(q_full.at[at])
        meta = lambda column: load_word(meta_smem, at, column, plan.interpret)  # noqa: E731
        page = lambda column: load_word(pages_smem, at, column, plan.interpret)  # noqa: E731
        n_tiles, first_block = meta(plan.m), meta(plan.m + 2)

        def one_tile(j, _):
            slot = j % plan.ring
            plgpu.barrier_wait(k_free.at[slot])
            for part in range(plan.n_copies):
                place = _place_of(plan, meta, page, first_block, j * plan.rows + part * plan.part)
                rows = pl.ds(place * plan.part, plan.part)  # a visible multiple: tiled copies need to know
                there = pl.ds(part * plan.part, plan.part)
                plgpu.copy_gmem_to_smem(k_gmem.at[rows], k_smem.at[slot, there], k_full.at[slot])
                if plan.has_scale:
                    plgpu.copy_gmem_to_smem(scale_gmem.at[rows], scale_smem.at[slot, there], k_full.at[slot])
            return _

        lax.fori_loop(0, n_tiles, one_tile, None)
        if plan.interpret:
            plgpu.commit_smem()  # as in `release`: this warp read `meta`, and a later copy of its own overwrites it
        return _

    @one_warp
    def _all_queries():
        lax.fori_loop(0, n_queries, one_query, None)
        wait_all(k_free, plan.ring)
        wait_all(q_free, 2)


def score(
    plan: Plan,
    group: Array,
    sort_keys_gmem: Ref,
    *,
    meta_smem: Ref,
    q_smem: Ref,
    w_smem: Ref,
    k_smem: Ref,
    q_full: Ref,
    q_free: Ref,
    k_full: Ref,
    k_free: Ref,
    scale_smem: Ref = None,
    sort_keys_smem: Ref = None,
    sort_keys_full: Ref = None,
    sort_keys_free: Ref = None,
    **_: Ref,
) -> None:
    plgpu.set_max_registers(plan.score_registers, action="increase")
    cta = lax.axis_index("cta")
    for turn in range(plan.ring // plan.n_score):
        plgpu.barrier_arrive(k_free.at[turn * plan.n_score + group])
    for at in range(2):
        plgpu.barrier_arrive(q_free.at[at])
    key = keys_of_lanes(plan.rows, plan.interpret)

    def one_query(i, _):
        t, at, sort_key_slot = cta + i * plan.n_ctas, i % 2, i % plan.n_sort_keys
        plgpu.barrier_wait(q_full.at[at])
        n_tiles, visible = meta_smem[at, plan.m], meta_smem[at, plan.m + 1]
        w = plgpu.load(w_smem.at[at, pl.ds(0, plan.H)], layout=HEAD_COLUMN)
        if plan.selects:
            plgpu.barrier_wait(sort_keys_free.at[sort_key_slot])

        def one_tile(turn, _):
            j = turn * plan.n_score + group
            slot = j % plan.ring
            plgpu.barrier_wait(k_full.at[slot])
            if plan.has_scale:
                scale = load_lanes(scale_smem, slot, plan.rows, plan.interpret)
            scores = multiply_and_sum(
                [k_smem.at[slot]], q_smem.at[at], w, lambda: release(plan, k_free.at[slot]), plan.interpret
            )
            # One scale a key, after the sum: 2 instructions a product (maximum, multiply-add) instead of 3.
            if plan.has_scale:
                scores = scores * scale
            sort_key = jnp.where(_positions(plan, meta_smem, at, j, key) < visible, sort_key_of(scores), INVISIBLE)
            if plan.selects:
                store_lanes(sort_keys_smem, sort_key_slot, j * plan.rows, plan.rows, sort_key, plan.interpret)
            else:
                store_lanes(sort_keys_gmem, t, j * plan.rows, plan.rows, sort_key, plan.interpret)
            return _

        lax.fori_loop(0, n_tiles // plan.n_score, one_tile, None)
        release(plan, q_free.at[at])
        if plan.selects:
            plgpu.barrier_arrive(sort_keys_full.at[sort_key_slot])
        return _

    lax.fori_loop(0, plan.queries(cta), one_query, None)
    if plan.selects:
        wait_all(sort_keys_free, plan.n_sort_keys)


def select(
    plan: Plan,
    o_gmem: Ref,
    count_gmem: Ref,
    *,
    meta_smem: Ref,
    sort_keys_smem: Ref,
    counts_smem: Ref,
    q_full: Ref,
    q_free: Ref,
    sort_keys_full: Ref,
    sort_keys_free: Ref,
    **_: Ref,
) -> None:
    plgpu.set_max_registers(SELECT_REGISTERS, action="decrease")
    cta = lax.axis_index("cta")
    for at in range(2):
        plgpu.barrier_arrive(q_free.at[at])
    for sort_key_slot in range(plan.n_sort_keys):
        plgpu.barrier_arrive(sort_keys_free.at[sort_key_slot])

    def one_query(i, _):
        t, at, sort_key_slot = cta + i * plan.n_ctas, i % 2, i % plan.n_sort_keys
        plgpu.barrier_wait(q_full.at[at])
        plgpu.barrier_wait(sort_keys_full.at[sort_key_slot])
        n_tiles, visible = meta_smem[at, plan.m], meta_smem[at, plan.m + 1]

        @pl.when(n_tiles == 0)
        def _keep_all():
            select_rows.write_prefix(o_gmem, count_gmem, t, visible, plan.interpret)

        @pl.when(n_tiles > 0)
        def _keep_best():
            assert plan.k_top is not None
            n_columns = n_tiles * plan.rows
            if plan.interpret:
                columns = jnp.arange(plan.width, dtype=jnp.int32)
                sort_keys = jnp.where(columns < n_columns, sort_keys_smem[sort_key_slot], INVISIBLE)
                block_ids = meta_smem[at][jnp.minimum(columns // plan.block_size, plan.m - 1)]
                positions = block_ids * plan.block_size + columns % plan.block_size
                threshold = select_rows.threshold_reference(sort_keys, plan.k_top)
                select_rows.compact_reference(sort_keys, positions, threshold, plan.k_top, t, o_gmem, count_gmem)
                return
            first = jnp.int32(0)
            threshold = select_rows.threshold_of(
                sort_keys_smem, sort_key_slot, plan.width, n_columns, plan.k_top, counts_smem, first
            )
            select_rows.compact(
                sort_keys_smem,
                sort_key_slot,
                plan.width,
                n_columns,
                threshold,
                plan.k_top,
                counts_smem,
                first,
                meta_smem,
                at,
                plan.m + META,
                select_rows.block_positions(plan.block_size),
                t,
                o_gmem,
                count_gmem,
            )

        release(plan, q_free.at[at])
        plgpu.barrier_arrive(sort_keys_free.at[sort_key_slot])
        return _

    lax.fori_loop(0, plan.queries(cta), one_query, None)


def _block_of(plan: Plan, meta: Callable[[Array], Array], column: Array) -> tuple[Array, Array]:
    """Which block a column belongs to (-1: none), and the column's offset in it."""
    place = column // plan.block_size
    block_id = meta(jnp.minimum(place, plan.m - 1))
    return jnp.where(place < plan.m, block_id, -1), column % plan.block_size


def _place_of(
    plan: Plan, meta: Callable[[Array], Array], page: Callable[[Array], Array], first_block: Array, column: Array
) -> Array:
    """Where the keys of a column on are in k, in copies."""
    if plan.page_size is not None:
        nth = jnp.minimum(column // plan.page_size, plan.n_listed - 1)
        return page(nth) * (plan.page_size // plan.part) + column % plan.page_size // plan.part
    block_id, offset = _block_of(plan, meta, column)
    return (first_block + jnp.maximum(block_id, 0)) * (plan.block_size // plan.part) + offset // plan.part


def _positions(plan: Plan, meta_smem: Ref, at: Array, j: Array, key: Array) -> Array:
    """Token positions of the keys of tile j, [rows] int32."""
    size = min(plan.rows, plan.block_size)

    def from_key(first: int) -> Array:
        block_id, offset = _block_of(plan, lambda column: meta_smem[at, column], j * plan.rows + first)
        return key + jnp.where(block_id >= 0, block_id * plan.block_size + offset - first, _NOWHERE)

    positions = from_key(0)
    for first in range(size, plan.rows, size):
        positions = jnp.where(key >= first, from_key(first), positions)
    return positions
