"""Device code of `refine`: eight lists of blocks side by side, each scored by its own query.

A step scores `columns` candidates of each list: one product a list and 256 candidates, all unrolled, so that the
matrix units load the keys of one product while the rows of another pass. The sort keys of a tile of queries stay in
VMEM, where their top-k is found at the end.

The eight lists are those of eight queries; or, where queries are few, eighths of one query's list (`is_split`).
"""

import dataclasses

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

from hisa_jax.kernels_pallas.mosaic_tpu import fetch, refine_source, topk_body
from hisa_jax.kernels_pallas.mosaic_tpu.config import GROUP, LANES, ROWS
from hisa_jax.kernels_pallas.mosaic_tpu.launch import Tile
from hisa_jax.kernels_pallas.mosaic_tpu.look_up_body import split_outputs, write_sort_keys
from hisa_jax.kernels_pallas.mosaic_tpu.refine_source import Source, Step
from hisa_jax.kernels_pallas.mosaic_tpu.tiles import (
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
    topk: int
    m: int  # blocks of a query, padded to whole steps
    block_size: int
    per_block: int  # pages of a block, as the keys lie in HBM
    columns: int  # candidates of a list a step
    keep_first: int  # candidates that are chosen whatever they score, of the first and of the last that are visible
    keep_last: int
    has_sort_keys: bool  # whether those of the chosen are a second output
    is_masked: bool  # whether a mask of the chosen candidates takes the place of their positions

    @property
    def slots(self) -> int:
        """Blocks of a list a step."""
        return self.columns // self.block_size

    @property
    def blocks_per_list(self) -> int:
        return self.m // ROWS if self.is_split else self.m

    @property
    def blocks_per_product(self) -> int:
        return max(1, _PRODUCT // self.block_size)

    def query(self, step: Step, r: int) -> Array:
        """Row of the tile whose list number r of a step is."""
        return step.eight if self.is_split else step.eight * ROWS + r

    @property
    def steps_per_list(self) -> int:
        return self.blocks_per_list // self.slots

    def place(self, step: Step, r: int, s: int) -> tuple[Array, Array, int]:
        """Where [tile_t, steps, slots] holds slot s of list r."""
        return self.query(step, r), step.i + (r * self.steps_per_list if self.is_split else 0), s


def resident_body(
    plan: Plan, tile: Tile, n_steps_smem: Ref, n_tokens_smem: Ref, places_smem: Ref, n_kept_smem: Ref, blocks_ref: Ref,
    n_visible_ref: Ref, q_ref: Ref, w_ref: Ref, k_hbm: Ref, *refs: Ref, keys_vmem: Ref, sems: Ref,
    staged_vmem: Ref = None, scale_vmem: Ref = None, **scratch: Ref
) -> None:  # fmt: skip
    scale_hbm, outs = split_outputs(refs, plan.has_sort_keys)

    @pl.when(tile.is_first)
    def _load():
        n_groups = pl.cdiv(n_tokens_smem[tile.sequence], GROUP * plan.block_size)
        pairs = [(scale, scale_vmem, GROUP * plan.per_block) for scale in scale_hbm]
        if plan.is_transposed:
            refine_source.load_transposed(tile.copy_group, n_groups, k_hbm, keys_vmem, staged_vmem, sems)
        else:
            pairs.append((k_hbm, keys_vmem, GROUP))
        fetch.all_at_once(tile.copy_group, n_groups, pairs, sems.at[0])

    source = refine_source.resident(plan.place, places_smem, keys_vmem, scale_vmem)
    refine_tile(plan, source, n_steps_smem, blocks_ref, n_visible_ref, q_ref, w_ref, outs, **scratch)


def gathered_body(
    plan: Plan, n_steps_smem: Ref, places_smem: Ref, n_kept_smem: Ref, blocks_ref: Ref, n_visible_ref: Ref, q_ref: Ref,
    w_ref: Ref, k_hbm: Ref, *refs: Ref, keys_vmem: Ref, sems: Ref, scale_vmem: Ref = None, **scratch: Ref
) -> None:  # fmt: skip
    scale_hbm, outs = split_outputs(refs, plan.has_sort_keys)
    pairs = [(k_hbm, keys_vmem), *((scale, scale_vmem) for scale in scale_hbm)]
    source = refine_source.ring(plan.place, plan.slots, plan.per_block, places_smem, n_kept_smem, pairs, sems)
    refine_tile(plan, source, n_steps_smem, blocks_ref, n_visible_ref, q_ref, w_ref, outs, **scratch)


def refine_tile(
    plan: Plan,
    source: Source,
    n_steps_smem: Ref,
    blocks_ref: Ref,
    n_visible_ref: Ref,
    q_ref: Ref,
    w_ref: Ref,
    outs: tuple[Ref, ...],
    *,
    w_vmem: Ref,
    partial_vmem: Ref,
    sort_keys_vmem: Ref,
    thresholds_vmem: Ref,
    table_vmem: Ref,
    chosen_vmem: Ref,
) -> None:
    """The best tokens of a tile of queries.

    Args:
        n_steps_smem: [all tiles * eights] int32, steps that each eight needs.
        blocks_ref: [tile_t // 8, 8, m] int32; n_visible_ref: [tile_t // 8, 8, 1] int32, candidates of each query.
        q_ref: [tile_t, H, D]; w_ref: [tile_t, H].
        outs: [tile_t // 8, 8, topk padded] int32, positions, ascending, then -1; maybe their sort keys. Or one mask,
            [tile_t, groups, LANES] float32, of the candidates as they lie in the list.
        w_vmem: [tile_t, H, LANES]; partial_vmem: [columns / LANES * 64, LANES]; the others as in `topk_body.select`.
    """
    core, b, t = (pl.program_id(axis) for axis in range(3))
    first = ((b * pl.num_programs(0) + core) * plan.tiles + t) * plan.eights
    n_steps = [n_steps_smem[first + e] for e in range(plan.eights)]
    spread_weights(w_ref, w_vmem)
    fill(sort_keys_vmem, splat(n_visible_ref))

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
        pl.when(turn + 1 < total)(lambda: source.start(after))
        source.wait(step)
        score_step(plan, source, step, n_visible_ref, q_ref, w_vmem, partial_vmem, sort_keys_vmem)
        return after.eight, after.i

    lax.fori_loop(0, total, one_step, (step.eight, step.i))
    if plan.is_masked:
        thresholds_vmem[...] = topk_body.find_exact_thresholds(sort_keys_vmem, splat(n_visible_ref), plan.topk)
        write_mask(sort_keys_vmem, thresholds_vmem, outs[0])
        return
    topk_body.select(sort_keys_vmem, splat(n_visible_ref), plan.topk, thresholds_vmem, table_vmem, chosen_vmem)
    write_positions(plan, blocks_ref, chosen_vmem, outs[0])
    for sort_keys_ref in outs[1:]:
        write_sort_keys(sort_keys_vmem, chosen_vmem, sort_keys_ref)


def score_step(
    plan: Plan,
    source: Source,
    step: Step,
    n_visible_ref: Ref,
    q_ref: Ref,
    w_vmem: Ref,
    partial_vmem: Ref,
    sort_keys_vmem: Ref,
) -> None:
    """Sort keys of `columns` candidates of eight lists."""
    W, lanes, transposed = plan.blocks_per_product, plan.blocks_per_product * plan.block_size, plan.is_transposed
    for s in range(0, plan.slots, W):
        for r in range(ROWS):
            query = plan.query(step, r)
            keys = [source.keys(step, r, s + j) for j in range(W)]
            x = products(q_ref[query], jnp.concatenate(keys, axis=1 if transposed else 0), transposed)
            if source.scale is not None:
                scale = jnp.concatenate([source.scale(step, r, s + j) for j in range(W)], axis=1)
            for c in range(0, lanes, LANES):
                rows = sum_to_sublanes(x[:, c : c + LANES], w_vmem[query])
                if source.scale is not None:
                    rows = rows * scale[:, c : c + LANES]
                at = (s * plan.block_size + c) // LANES * ROWS * ROWS + r * ROWS
                partial_vmem[pl.ds(at, ROWS)] = rows
    column = step.i * plan.columns + lax.broadcasted_iota(jnp.int32, (ROWS, LANES), 1)
    groups_per_list = plan.blocks_per_list * plan.block_size // LANES
    if plan.is_split:
        column += lax.broadcasted_iota(jnp.int32, (ROWS, LANES), 0) * (groups_per_list * LANES)
        n_visible = n_visible_ref[lax.div(step.eight, ROWS), pl.ds(lax.rem(step.eight, ROWS), 1)]
    else:
        n_visible = n_visible_ref[step.eight]
    n_visible = jnp.broadcast_to(n_visible, (ROWS, LANES))
    for c in range(0, plan.columns, LANES):
        sort_key = sort_keys_of_rows(partial_vmem, c // LANES * ROWS * ROWS)
        if plan.keep_first or plan.keep_last:
            is_forced = (column + c < plan.keep_first) | (column + c >= n_visible - plan.keep_last)
            sort_key = jnp.where(is_forced, FORCED, sort_key)
        sort_key = jnp.where(column + c < n_visible, sort_key, INVISIBLE)
        group = lax.div(step.i * plan.columns + c, LANES)
        if plan.is_split:
            tile, sublane = lax.div(step.eight, ROWS), lax.rem(step.eight, ROWS)
            sort_keys_vmem[tile, pl.ds(group * ROWS + sublane, ROWS, stride=groups_per_list * ROWS)] = sort_key
        else:
            sort_keys_vmem[step.eight, pl.ds(pl.multiple_of(group * ROWS, ROWS), ROWS)] = sort_key


def write_positions(plan: Plan, blocks_ref: Ref, chosen_vmem: Ref, o_ref: Ref) -> None:
    """Columns of the candidates to positions in the sequence."""

    def one_tile(tile: Array, _: None) -> None:
        for first in range(0, o_ref.shape[2], LANES):
            columns = chosen_vmem[tile, pl.ds(first // LANES * ROWS, ROWS)]
            slot = lax.div(jnp.maximum(columns, 0), plan.block_size)
            block = jnp.zeros_like(slot)
            for part in range(0, blocks_ref.shape[2], LANES):
                found = jnp.take_along_axis(
                    blocks_ref[tile, :, part : part + LANES], slot % LANES, axis=1, mode="promise_in_bounds"
                )
                block = jnp.where(lax.div(slot, LANES) == part // LANES, found, block)
            positions = block * plan.block_size + columns % plan.block_size
            o_ref[tile, :, first : first + LANES] = jnp.where(columns < 0, -1, positions)

    lax.fori_loop(0, o_ref.shape[0], one_tile, None)


def write_mask(sort_keys_vmem: Ref, thresholds_vmem: Ref, o_ref: Ref) -> None:
    """1.0 where an sort key reaches the threshold of its row: [tile_t, groups, LANES]."""
    groups = o_ref.shape[1]

    def one_tile(tile: Array, _: None) -> None:
        for row in range(ROWS):
            threshold = jnp.broadcast_to(thresholds_vmem[tile, row : row + 1], (ROWS, LANES))
            for first in range(0, groups, ROWS):
                # Eight groups of one row are one strided load.
                sort_key = sort_keys_vmem[tile, pl.ds(first * ROWS + row, ROWS, stride=ROWS)]
                some = min(ROWS, groups - first)
                o_ref[tile * ROWS + row, first : first + some] = jnp.where(sort_key >= threshold, 1.0, 0.0)[:some]

    lax.fori_loop(0, sort_keys_vmem.shape[0], one_tile, None)
