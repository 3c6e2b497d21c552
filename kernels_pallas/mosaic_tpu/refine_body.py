"""Device code of `refine`: eight lists of blocks side by side, each scored by its own query.

    k_hbm -- all of a sequence, at its first tile --> keys_vmem [n, ...]                        (`resident_body`)
    k_hbm -- the blocks of the next step, under this one's products --> keys_vmem, a ring of 2  (`gathered_body`)
    q x keys --> partial_vmem --> sort_keys_vmem, of all candidates of a tile --> top-k --> chosen

A step scores `columns` candidates of each list: one product a list and 256 candidates, all unrolled, so that the
matrix units load the keys of one product while the rows of another pass. The sort keys of a tile of queries stay in
VMEM, where their top-k is found at the end.

The eight lists are those of eight queries; or, where queries are few, eighths of one query's list (`is_split`).
"""

import dataclasses
import functools
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

from hisa_jax.kernels_pallas.mosaic_tpu import fetch, refine_source, topk_body
from hisa_jax.kernels_pallas.mosaic_tpu.config import GROUP, LANES, SUBLANES, Choice
from hisa_jax.kernels_pallas.mosaic_tpu.launch import Tile
from hisa_jax.kernels_pallas.mosaic_tpu.look_up_body import write_sort_keys
from hisa_jax.kernels_pallas.mosaic_tpu.refine_source import Source, Step
from hisa_jax.kernels_pallas.mosaic_tpu.score_body import (
    fill,
    products,
    sort_keys_of_rows,
    splat,
    spread_weights,
    sum_to_sublanes,
)
from hisa_jax.kernels_pallas.sort_key import FORCED, INVISIBLE
from hisa_jax.kernels_pallas.types import Ref

_PRODUCT = 256  # candidates a product: a side of the larger matrix unit


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """The static numbers of a launch."""

    tiles: int  # of a sequence, on one core
    eights: int  # of a tile: eight queries, or one if is_split
    is_split: bool
    is_transposed: bool
    m: int  # blocks of a query, padded to whole steps
    block_size: int
    per_block: int  # pages of a block, as the keys lie in HBM
    columns: int  # candidates of a list a step
    choice: Choice

    @property
    def blocks_per_step(self) -> int:
        """Blocks of a list."""
        return self.columns // self.block_size

    @property
    def blocks_per_list(self) -> int:
        return self.m // SUBLANES if self.is_split else self.m

    @property
    def blocks_per_product(self) -> int:
        return max(1, _PRODUCT // self.block_size)

    def query(self, step: Step, r: int) -> Array:
        """Row of the tile whose list number r of a step is."""
        return step.eight if self.is_split else step.eight * SUBLANES + r

    @property
    def steps_per_list(self) -> int:
        return self.blocks_per_list // self.blocks_per_step

    def at(self, step: Step, r: int, s: int) -> tuple[Array, Array, int]:
        """Where `page_index_smem` [tile_t, steps, slots] has block s, of a step, of list r."""
        return self.query(step, r), step.i + (r * self.steps_per_list if self.is_split else 0), s


class Refs(NamedTuple):
    """The buffers."""

    n_steps_smem: Ref  # [tiles of the grid * eights], steps that each eight needs
    # Windows of the grid, of one tile of queries.
    page_index_smem: (
        Ref  # [tile_t, steps, blocks_per_step], blocks in VMEM; or their pages in HBM, a block's side by side
    )
    n_kept_smem: Ref  # [tile_t, 1], blocks that each query keeps
    block_ids: Ref  # [tile_t // 8, 8, m]
    n_visible: Ref  # [tile_t // 8, 8, 1], candidates of each query
    q: Ref  # [tile_t, H, D]
    w: Ref  # [tile_t, H]
    chosen: Ref  # out: [tile_t // 8, 8, k padded], positions, ascending, then -1
    # In HBM.
    k_hbm: Ref  # [N, page_size, D]
    # Scratch.
    keys_vmem: (
        Ref  # resident: [n, block_size, D] or [n, D, block_size]; gathered: [2, 8, blocks_per_step, block_size, D]
    )
    sems: Ref  # [2, 2], by slot of a ring and operand
    w_vmem: Ref  # [tile_t, H, LANES]
    partial_vmem: Ref  # [columns // LANES * 64, LANES], score sums but for eight rows
    sort_keys_vmem: Ref  # [tile_t // 8, groups * 8, LANES]; this and the next three as in `topk_body.select`
    thresholds_vmem: Ref
    table_vmem: Ref
    chosen_vmem: Ref
    n_tokens_smem: Ref = None  # [R], where keys are resident
    sort_keys: Ref = None  # out, maybe: [tile_t // 8, 8, k padded], of the chosen
    scale_hbm: Ref = None  # [N, page_size] float32
    scale_vmem: Ref = (
        None  # resident: [n * per_block, page_size]; gathered: [2, 8, blocks_per_step, per_block, page_size]
    )
    staged_vmem: Ref = None  # [2, GROUP, block_size, D], keys that are still to be transposed


def resident_body(plan: Plan, tile: Tile, refs: Refs) -> None:
    """The best tokens of a tile of queries, whose sequence's keys are all in VMEM."""

    @pl.when(tile.is_first)
    def _load():
        n_groups = pl.cdiv(refs.n_tokens_smem[tile.sequence], GROUP * plan.block_size)
        pairs = []
        if refs.scale_hbm is not None:
            pairs.append((refs.scale_hbm, refs.scale_vmem, GROUP * plan.per_block))
        if plan.is_transposed:
            refine_source.load_transposed(tile.copy_group, n_groups, refs)
        else:
            pairs.append((refs.k_hbm, refs.keys_vmem, GROUP))
        fetch.all_at_once(tile.copy_group, n_groups, pairs, refs.sems.at[0])

    refine_tile(plan, refine_source.resident(plan.at, refs), refs)


def gathered_body(plan: Plan, refs: Refs) -> None:
    """The best tokens of a tile of queries, each of which copies the pages of its own blocks."""
    refine_tile(plan, refine_source.ring(plan.at, plan.blocks_per_step, plan.per_block, refs), refs)


def refine_tile(plan: Plan, source: Source, refs: Refs) -> None:
    """The best tokens of a tile of queries: a loop over the steps of all its eights, then the selection."""
    core, b, t = (pl.program_id(axis) for axis in range(3))
    first = ((b * pl.num_programs(0) + core) * plan.tiles + t) * plan.eights
    n_steps = [refs.n_steps_smem[first + e] for e in range(plan.eights)]
    spread_weights(refs.w, refs.w_vmem)
    fill(refs.sort_keys_vmem, splat(refs.n_visible))

    def following(step: Step) -> Step:
        """The next step of the eight, or the first of the next eight that has one."""
        eight, more = jnp.int32(plan.eights), jnp.int32(0)
        for e in reversed(range(plan.eights)):
            eight = jnp.where((e > step.eight) & (n_steps[e] > 0), e, eight)
            more = jnp.where(e == step.eight, n_steps[e], more)
        is_last = step.i + 1 >= more
        return Step(jnp.where(is_last, eight, step.eight), jnp.where(is_last, 0, step.i + 1), step.turn + 1)

    total = sum(n_steps[1:], n_steps[0])
    step = following(Step(jnp.int32(-1), jnp.int32(0), jnp.int32(-1)))
    pl.when(total > 0)(lambda: source.start(step))

    def one_step(turn: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        step = Step(*carry, turn)
        after = following(step)
        # The copies of the next step go out before the products of this one.
        pl.when(turn + 1 < total)(lambda: source.start(after))
        source.wait(step)
        score_step(plan, source, step, refs)
        return after.eight, after.i

    lax.fori_loop(0, total, one_step, (step.eight, step.i))
    select = functools.partial(topk_body.select, refs.sort_keys_vmem, splat(refs.n_visible), plan.choice.k)
    select(refs.thresholds_vmem, refs.table_vmem, refs.chosen_vmem)
    write_positions(plan, refs)
    if plan.choice.has_sort_keys:
        write_sort_keys(refs.sort_keys_vmem, refs.chosen_vmem, refs.sort_keys)


def score_step(plan: Plan, source: Source, step: Step, refs: Refs) -> None:
    """Sort keys of `columns` candidates of eight lists."""
    W, lanes, transposed = plan.blocks_per_product, plan.blocks_per_product * plan.block_size, plan.is_transposed
    for s in range(0, plan.blocks_per_step, W):
        for r in range(SUBLANES):
            query = plan.query(step, r)
            keys = [source.keys(step, r, s + j) for j in range(W)]
            x = products(refs.q[query], jnp.concatenate(keys, axis=1 if transposed else 0), transposed)
            if source.scale is not None:
                scale = jnp.concatenate([source.scale(step, r, s + j) for j in range(W)], axis=1)
            for c in range(0, lanes, LANES):
                rows = sum_to_sublanes(x[:, c : c + LANES], refs.w_vmem[query])
                if source.scale is not None:
                    rows = rows * scale[:, c : c + LANES]
                at = (s * plan.block_size + c) // LANES * SUBLANES * SUBLANES + r * SUBLANES
                refs.partial_vmem[pl.ds(at, SUBLANES)] = rows
    # Which candidate of its query each lane of a register is, and how many there are.
    column = step.i * plan.columns + lax.broadcasted_iota(jnp.int32, (SUBLANES, LANES), 1)
    groups_per_list = plan.blocks_per_list * plan.block_size // LANES
    if plan.is_split:
        column += lax.broadcasted_iota(jnp.int32, (SUBLANES, LANES), 0) * (groups_per_list * LANES)
        n_visible = refs.n_visible[lax.div(step.eight, SUBLANES), pl.ds(lax.rem(step.eight, SUBLANES), 1)]
    else:
        n_visible = refs.n_visible[step.eight]
    n_visible = jnp.broadcast_to(n_visible, (SUBLANES, LANES))
    keep_first, keep_last = plan.choice.keep_first, plan.choice.keep_last
    for c in range(0, plan.columns, LANES):
        sort_key = sort_keys_of_rows(refs.partial_vmem, c // LANES * SUBLANES * SUBLANES)
        if keep_first or keep_last:
            is_forced = (column + c < keep_first) | (column + c >= n_visible - keep_last)
            sort_key = jnp.where(is_forced, FORCED, sort_key)
        sort_key = jnp.where(column + c < n_visible, sort_key, INVISIBLE)
        group = lax.div(step.i * plan.columns + c, LANES)
        if plan.is_split:
            # A register holds one group of each eighth: eight groups of one row, strided.
            tile, sublane = lax.div(step.eight, SUBLANES), lax.rem(step.eight, SUBLANES)
            groups = pl.ds(group * SUBLANES + sublane, SUBLANES, stride=groups_per_list * SUBLANES)
            refs.sort_keys_vmem[tile, groups] = sort_key
        else:
            refs.sort_keys_vmem[step.eight, pl.ds(pl.multiple_of(group * SUBLANES, SUBLANES), SUBLANES)] = sort_key


def write_positions(plan: Plan, refs: Refs) -> None:
    """Columns of the candidates to positions in the sequence."""

    def one_tile(tile: Array, _: None) -> None:
        for first in range(0, refs.chosen.shape[2], LANES):
            columns = refs.chosen_vmem[tile, pl.ds(first // LANES * SUBLANES, SUBLANES)]
            parts = [refs.block_ids[tile, :, c : c + LANES] for c in range(0, refs.block_ids.shape[2], LANES)]
            refs.chosen[tile, :, first : first + LANES] = positions_of(columns, parts, plan.block_size)

    lax.fori_loop(0, refs.chosen.shape[0], one_tile, None)


def positions_of(columns: Array, block_ids: list[Array], block_size: int) -> Array:
    """[8, 128] columns of the tokens of kept blocks, -1 for none -> [8, 128] positions; `block_ids`: 128 a part."""
    slot = lax.div(jnp.maximum(columns, 0), block_size)
    block = jnp.zeros_like(slot)
    for part, ids in enumerate(block_ids):
        # A gather reaches the lanes of one register.
        found = jnp.take_along_axis(ids, slot % LANES, axis=1, mode="promise_in_bounds")
        block = jnp.where(lax.div(slot, LANES) == part, found, block)
    positions = block * block_size + columns % block_size
    return jnp.where(columns < 0, -1, positions)
