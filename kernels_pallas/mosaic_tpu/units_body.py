"""Device code of `units`: keys stream past a tile of queries, of which the best score of each block is kept.

    k, scale -- 16 pieces of 128 keys or more, the next under way --> scores --> maxima of blocks --> sort_keys_vmem
    after the last step, 64 queries at a time: blocks that are always kept or not seen --> top-k --> chosen

Of several heads scores are made as those of `flat`, eight queries along sublanes and 128 keys along lanes. The maximum
of a block goes over lanes, by rotations, which is little beside the products of all heads. A head by itself has no
other work beside its product, so that there keys lie along sublanes: see `units_head_body.py`.

Nothing hides what cannot be chosen while keys are scored: a query's blocks before its last one are whole, those after
it are left out at the end, and where the last one is kept anyway (`keep_last`) its maximum does not matter.
"""

import functools

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from hisa_jax.kernels_pallas.mosaic_tpu import fetch, flat_body, topk_body, units_head_body
from hisa_jax.kernels_pallas.mosaic_tpu.config import GROUP, LANES, SUBLANES
from hisa_jax.kernels_pallas.mosaic_tpu.launch import Tile
from hisa_jax.kernels_pallas.mosaic_tpu.look_up_body import write_sort_keys
from hisa_jax.kernels_pallas.mosaic_tpu.score_body import spread_weights
from hisa_jax.kernels_pallas.mosaic_tpu.units_plan import Plan, Refs
from hisa_jax.kernels_pallas.sort_key import FORCED, INVISIBLE, sort_key_of


def units_body(plan: Plan, tile: Tile, refs: Refs) -> None:
    """The best blocks of a tile of queries."""
    core, b, t = (pl.program_id(axis) for axis in range(3))
    n_parts = refs.chosen.shape[0] * SUBLANES // plan.part
    first = ((b * pl.num_programs(0) + core) * plan.tiles + t) * n_parts
    seen = [refs.seen_smem[first + part] for part in range(n_parts)]
    tile_s = GROUP * refs.keys_vmem.shape[2]
    n_steps = pl.cdiv(functools.reduce(jnp.maximum, seen), tile_s)
    if not plan.has_one_head:
        spread_weights(refs.w, refs.w_vmem)

    def score(i: Array, slot: Array) -> None:
        if plan.has_one_head:
            units_head_body.score_step(plan, seen, i, slot, refs)
            units_head_body.flush(plan, i, n_steps, refs)
        else:
            step = flat_body.step_of_ring(i, slot, refs)
            flat_body.score_keys(SUBLANES, step, refs, functools.partial(put_scores, refs))
            put_maxima(plan, i, refs)

    pairs = [(refs.k, refs.keys_vmem), *([(refs.scale, refs.scale_vmem)] if refs.scale is not None else [])]
    fetch.in_turn(tile.copy_group, n_steps, pairs, refs.sems, score)
    n_scored = n_steps * (tile_s // plan.block_size)

    def one_part(part: Array, _: None) -> None:
        # A part without a query that looks for blocks gets none.
        pl.when(refs.seen_smem[first + part] > 0)(lambda: choose(plan, part, n_scored, refs))

    lax.fori_loop(0, n_parts, one_part, None)


def put_scores(refs: Refs, t: int, first: Array, scores: list[Array]) -> None:
    """Puts the scores of eight queries of a tile, from number t on, for groups of 128 keys of the step."""
    registers = refs.scores_vmem.shape[1] // SUBLANES
    for c, x in enumerate(scores):
        at = pl.multiple_of((lax.rem(lax.div(first, LANES), registers) + c) * SUBLANES, SUBLANES)
        # Else one such token would hide the others of its block.
        refs.scores_vmem[t // SUBLANES, pl.ds(at, SUBLANES)] = jnp.where(x == x, x, -jnp.inf)


def put_maxima(plan: Plan, i: Array, refs: Refs) -> None:
    """Puts the sort keys of the blocks of step i where the selection finds them."""
    tiles, rows, _ = refs.scores_vmem.shape
    lane = lax.broadcasted_iota(jnp.int32, (SUBLANES, LANES), 1)
    first_key, registers = i * (rows // SUBLANES * LANES), rows // SUBLANES
    block = lax.div(first_key, plan.block_size)
    n_groups = max(registers * LANES // plan.block_size // LANES, 1)

    def one_tile(tile: Array, _: None) -> None:
        scores = [refs.scores_vmem[tile, c * SUBLANES : (c + 1) * SUBLANES] for c in range(registers)]
        if plan.is_masked:
            visible = jnp.broadcast_to(refs.visible[pl.ds(tile * SUBLANES, SUBLANES)], (SUBLANES, LANES))
            scores = [jnp.where(first_key + c * LANES + lane < visible, x, -jnp.inf) for c, x in enumerate(scores)]
        at = pl.ds(pl.multiple_of(lax.div(block, LANES) * SUBLANES, SUBLANES), n_groups * SUBLANES)
        before = refs.sort_keys_vmem[tile, at].reshape(n_groups, SUBLANES, LANES)
        found = maxima(scores, plan.block_size, lax.rem(block, LANES), list(before))
        refs.sort_keys_vmem[tile, at] = jnp.concatenate(found, axis=0)

    # Unrolled, so that one tile's rotations do not wait for another's.
    lax.fori_loop(0, tiles, one_tile, None, unroll=True)


def maxima(scores: list[Array], block_size: int, first: Array | int, before: list[Array]) -> list[Array]:
    """Sort keys [8, 128] of groups of 128 blocks, of which some are the maxima of these scores.

    Args:
        scores: [8, 128] float32 of each 128 keys.
        first: place of their first block in the first group; `before`: what the groups had.
    """
    lane = lax.broadcasted_iota(jnp.int32, (SUBLANES, LANES), 1)
    registers, width = max(block_size // LANES, 1), min(block_size, LANES)
    per_register = LANES // width
    scores = [functools.reduce(jnp.maximum, scores[c : c + registers]) for c in range(0, len(scores), registers)]
    if width == LANES:
        scores = [jnp.broadcast_to(jnp.max(x, axis=1, keepdims=True), x.shape) for x in scores]
    for step in (1, 2, 4, 8, 16, 32):
        if step < width < LANES:
            scores = [jnp.maximum(x, pltpu.roll(x, LANES - step, 1)) for x in scores]
    # Each block's first lane has its maximum, which goes to the lane of the block among 128.
    groups = list(before)
    for c, x in enumerate(scores):
        place = lane - (first + c % width * per_register)
        own = x
        if width < LANES:
            own = jnp.take_along_axis(x, (place * width) & (LANES - 1), axis=1, mode="promise_in_bounds")
        is_own = (place >= 0) & (place < per_register)
        groups[c // width] = jnp.where(is_own, sort_key_of(own), groups[c // width])
    return groups


def choose(plan: Plan, part: Array, n_scored: Array, refs: Refs) -> None:
    """The selection of a part of a tile, of whose blocks the first `n_scored` have sort keys."""
    tiles = plan.part // SUBLANES
    some = pl.ds(part * tiles, tiles)
    eligible = jnp.broadcast_to(refs.eligible[some], refs.thresholds_vmem.shape)
    sort_keys_vmem = refs.sort_keys_vmem.at[some]
    lane = lax.broadcasted_iota(jnp.int32, eligible.shape, 2)
    # A tile that sees nothing, too: the selection always looks at the first span.
    groups = jnp.maximum(pl.cdiv(n_scored, plan.span * LANES), 1) * plan.span

    def finish(group: Array, _: None) -> None:
        at = pl.ds(pl.multiple_of(group * SUBLANES, SUBLANES), SUBLANES)
        block = group * LANES + lane
        is_forced = (block < plan.choice.keep_first) | (block >= eligible - plan.choice.keep_last)
        sort_key = jnp.where(is_forced, FORCED, sort_keys_vmem[:, at])
        sort_keys_vmem[:, at] = jnp.where(block < eligible, sort_key, INVISIBLE)

    lax.fori_loop(0, groups, finish, None)
    select = functools.partial(topk_body.select, sort_keys_vmem, eligible, plan.choice.k)
    select(refs.thresholds_vmem, refs.table_vmem, refs.chosen_vmem, groups)
    for register in range(refs.chosen.shape[2] // LANES):
        slots = slice(register * LANES, (register + 1) * LANES)
        refs.chosen[some, :, slots] = refs.chosen_vmem[:, pl.ds(register * SUBLANES, SUBLANES)]
    if plan.choice.has_sort_keys:
        write_sort_keys(sort_keys_vmem, refs.chosen_vmem, refs.sort_keys.at[some], groups)
