"""Device code of `refine_shared`: eight queries side by side score one list of units, all eight the whole list.

    k_hbm -- all of a sequence, at its first tile --> keys_vmem                (`refine_shared_body`, `ragged_body`)
    keys_vmem -- unit after unit of the list --> even_vmem or odd_vmem, under the products of the step before
    q x keys --> partial_vmem --> sort_keys_vmem --> top-k --> chosen

A row of 32 bits in VMEM holds two tokens side by side, so that a unit of g tokens is g / 2 rows. A unit is copied as
eight rows, one load and one store; what comes after the unit the next one overwrites. A step scores `columns` tokens
of a list, one or more a list. The steps of a tile's eights follow one another, so that the first units of an eight are
copied under the products of the one before; then the top-k of all queries of the tile is found together.

Of 8-bit keys a row of 32 bits holds four tokens. When their sequence is brought to VMEM, each unit gets a row of its
scales over and over, s0 s1 s2 s3 s0 s1 ... for g = 4, which is copied with the unit. So in the rows of the units side
by side each lane has the scale of its column in the row of that column's unit: a choice and a sum over rows.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from hisa_jax.kernels_pallas.mosaic_tpu import fetch, flat_body, topk_body
from hisa_jax.kernels_pallas.mosaic_tpu.config import GROUP, LANES, SUBLANES, Choice
from hisa_jax.kernels_pallas.mosaic_tpu.launch import Tile
from hisa_jax.kernels_pallas.mosaic_tpu.look_up_body import look_up
from hisa_jax.kernels_pallas.mosaic_tpu.pairs_body import copy_pairs, tokens_a_row
from hisa_jax.kernels_pallas.mosaic_tpu.score_body import lanes_of, spread_weights
from hisa_jax.kernels_pallas.sort_key import INVISIBLE
from hisa_jax.kernels_pallas.types import Ref

# Units of a step up to which two steps are scheduled together. With 256 units a step both take 1472 cycles on v6e, 1732
# one after the other; with 512 units 2218 and 2125.
_MOST_COPIES = 256
_REGISTERS = 2  # of output slots at once: a list's best are often in one span of 128 groups


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """The static numbers of a launch.

    Attributes:
        tiles: of queries, of a sequence, or of all ragged ones, on one core.
        unit: tokens, a power of two up to 16; columns: tokens a step.
        span, part: groups of 128 tokens that the output is made of in one go, and that a threshold's search looks at.
    """

    choice: Choice
    tiles: int
    unit: int
    columns: int
    span: int
    part: int

    @property
    def units(self) -> int:
        """Of a step."""
        return self.columns // self.unit


class Refs(NamedTuple):
    """The buffers."""

    counts_smem: Ref  # [eights of the grid], units of each list
    # Windows of the grid, of one tile of queries, E eights of them.
    pairs_smem: Ref  # [E, slots // n, n], the pairs of tokens (of 8-bit keys fours) that the lists' units begin with
    units: Ref  # [E, slots // LANES, LANES], the lists
    n_visible: Ref  # [tile_t, 1], tokens of its list that each query sees, the first
    q: Ref  # [tile_t, H, D]
    w: Ref  # [tile_t, H]
    chosen: Ref  # out: [E, 8, k padded], positions, ascending, then -1
    k_hbm: Ref  # [B, S, D]; of ragged sequences [N, page_size, D]
    # Scratch.
    keys_vmem: Ref  # [S + eight rows of 32 bits, D]
    even_vmem: Ref  # [columns + eight rows, D], the keys of a step with an even number
    odd_vmem: Ref  # the same of an odd one
    w_vmem: Ref  # [tile_t, H, LANES]
    partial_vmem: Ref  # see `flat_body.products_a_step`
    sort_keys_vmem: Ref  # [E, groups * 8, LANES]; this and the next three as in `topk_body.select`
    thresholds_vmem: Ref
    table_vmem: Ref
    chosen_vmem: Ref
    sems: Ref  # [2], by operand
    n_tokens_smem: Ref = None  # [R], of ragged sequences
    # Of 8-bit keys.
    scale_hbm: Ref = None  # of a batch [B, S / 128, 128], else [N, page_size]
    scale_vmem: Ref = None  # the same of one sequence
    unit_scales_vmem: Ref = None  # [S / unit, 128]
    even_scales_vmem: Ref = None  # [units, 128], of a step's units
    odd_scales_vmem: Ref = None


class Step(NamedTuple):
    """What is scored in one go: `plan.columns` tokens of the list of an eight."""

    eight: Array
    i: Array


class ScoreRefs(NamedTuple):
    """What `flat_body.score_keys` works on: eight queries and their list."""

    q: Ref
    w_vmem: Ref
    visible: Ref
    partial_vmem: Ref
    sort_keys_vmem: Ref


class Staged(NamedTuple):
    """A step's units side by side, and their scales."""

    keys: Ref
    scales: Ref | None


def refine_shared_body(plan: Plan, refs: Refs) -> None:
    """On a grid of (cores, sequences, tiles): the best tokens of a tile of queries."""

    @pl.when(pl.program_id(2) == 0)
    def _load():
        pairs = [(refs.k_hbm, refs.keys_vmem)]
        if refs.scale_hbm is not None:
            pairs.append((refs.scale_hbm, refs.scale_vmem))
        for act in (fetch.start, fetch.wait):
            for j, (hbm, vmem) in enumerate(pairs):
                whole = pl.ds(0, hbm.shape[1])
                act(pltpu.make_async_copy(hbm.at[pl.program_id(1)], vmem.at[whole], refs.sems.at[j]))
        spread_scales(plan, refs.k_hbm.shape[1], refs)

    refine_tile(plan, refs)


def ragged_body(plan: Plan, block_size: int, tile: Tile, refs: Refs) -> None:
    """The same of ragged sequences, on a grid of (cores, 1, tiles); their keys come in groups of blocks."""

    @pl.when(tile.is_first)
    def _load():
        rows = GROUP * block_size
        n_groups = pl.cdiv(refs.n_tokens_smem[tile.sequence], rows)
        pairs = [(refs.k_hbm, refs.keys_vmem, rows)]
        if refs.scale_hbm is not None:
            pairs.append((refs.scale_hbm, refs.scale_vmem, rows // refs.scale_vmem.shape[1]))
        fetch.all_at_once(tile.copy_group, n_groups, pairs, refs.sems)
        spread_scales(plan, n_groups * rows, refs)

    refine_tile(plan, refs)


def refine_tile(plan: Plan, refs: Refs) -> None:
    """The best tokens of a tile of queries, whose sequence's keys are in VMEM."""
    core, b, t = (pl.program_id(axis) for axis in range(3))
    n_eights = refs.pairs_smem.shape[0]
    first = ((b * pl.num_programs(0) + core) * plan.tiles + t) * n_eights
    spread_weights(refs.w, refs.w_vmem)

    def steps_of(eight: Array | int) -> Array:
        return jnp.maximum(pl.cdiv(refs.counts_smem[first + eight], plan.units), 1)

    def after(at: Step) -> Step:
        is_last = at.i + 1 >= steps_of(at.eight)
        next_eight = jnp.minimum(at.eight + 1, n_eights - 1)
        return Step(jnp.where(is_last, next_eight, at.eight), jnp.where(is_last, 0, at.i + 1))

    even_staged, odd_staged = (
        Staged(*x) for x in ((refs.even_vmem, refs.even_scales_vmem), (refs.odd_vmem, refs.odd_scales_vmem))
    )

    def score(at: Step, staged: Staged) -> None:
        keys = lambda first: staged.keys[pl.ds(first, flat_body.COLUMNS)]  # noqa: E731
        scales = None if staged.scales is None else functools.partial(scales_of, plan, staged.scales)
        flat_body.score_keys(SUBLANES, flat_body.Step(at.i, plan.columns, keys, scales), eight_of(at.eight, refs))

    n_steps = [steps_of(eight) for eight in range(n_eights)]
    total, most = functools.reduce(jnp.add, n_steps), functools.reduce(jnp.maximum, n_steps)

    def two_steps(turn: Array, even: Step) -> Step:
        # One after the other in the program, side by side in the schedule.
        odd = after(even)
        gather(plan, odd, odd_staged, refs)
        score(even, even_staged)
        even = after(odd)

        def second() -> None:
            gather(plan, even, even_staged, refs)
            score(odd, odd_staged)

        if plan.units > _MOST_COPIES:
            pl.when(2 * turn + 1 < total)(second)
        else:
            # If the steps are odd in number, the last eight's first one comes once more.
            second()
        return even

    start = Step(jnp.int32(0), jnp.int32(0))
    gather(plan, start, even_staged, refs)
    lax.fori_loop(0, lax.div(total + 1, 2), two_steps, start)
    n_groups = most * (plan.columns // LANES)
    parts, groups = (jnp.maximum(pl.cdiv(n_groups, x), 1) * x for x in (plan.part, plan.span))

    def fill(eight: Array, _: None) -> None:
        def one_group(group: Array, _: None) -> None:
            at = pl.ds(pl.multiple_of(group * SUBLANES, SUBLANES), SUBLANES)
            refs.sort_keys_vmem[eight, at] = jnp.full((SUBLANES, LANES), INVISIBLE, jnp.int32)

        lax.fori_loop(steps_of(eight) * (plan.columns // LANES), groups, one_group, None)

    lax.fori_loop(0, n_eights, fill, None)
    n = jnp.broadcast_to(refs.n_visible[...].reshape(-1, SUBLANES, 1), refs.thresholds_vmem.shape)
    topk_body.select(
        refs.sort_keys_vmem,
        n,
        plan.choice.k,
        refs.thresholds_vmem,
        refs.table_vmem,
        refs.chosen_vmem,
        groups,
        parts,
        registers=_REGISTERS,
    )
    lax.fori_loop(0, n_eights, lambda eight, _: write_positions(plan, eight, n_groups, refs), None)


def eight_of(eight: Array, refs: Refs) -> ScoreRefs:
    """The queries of an eight and what belongs to them."""
    rows = pl.ds(pl.multiple_of(eight * SUBLANES, SUBLANES), SUBLANES)
    return ScoreRefs(
        refs.q.at[rows],
        refs.w_vmem.at[rows],
        refs.n_visible.at[rows],
        refs.partial_vmem,
        refs.sort_keys_vmem.at[pl.ds(eight, 1)],
    )


def spread_scales(plan: Plan, n_tokens: Array | int, refs: Refs) -> None:
    """Scales as they came, of the first tokens of a sequence, to a row for each unit."""
    if refs.scale_vmem is None:
        return
    unit = plan.unit
    row, lane = (lax.broadcasted_iota(jnp.int32, (SUBLANES, LANES), axis) for axis in range(2))

    def some(turn: Array, _: None) -> None:
        # 256 tokens: the most that a page has.
        for i in range(2):
            scales = jnp.broadcast_to(lanes_of(refs.scale_vmem, 2 * turn, i), (SUBLANES, LANES))
            for first in range(0, LANES // unit, SUBLANES):
                token = (first + row) * unit + (lane & (unit - 1))
                x = jnp.take_along_axis(scales, token, axis=1, mode="promise_in_bounds")
                at = pl.multiple_of((2 * turn + i) * (LANES // unit) + first, SUBLANES)
                refs.unit_scales_vmem[pl.ds(at, SUBLANES)] = x

    lax.fori_loop(0, pl.cdiv(n_tokens, 2 * LANES), some, None)


def scales_of(plan: Plan, scales: Ref, first: Array) -> Array:
    """[1, COLUMNS]: scales of a step's columns from `first` on, of which `scales` has a row for each unit."""
    units = LANES // plan.unit
    row, lane = (lax.broadcasted_iota(jnp.int32, (units, LANES), axis) for axis in range(2))
    own = row == lax.div(lane, plan.unit)

    def some(c: int) -> Array:
        at = pl.multiple_of(lax.div(first, plan.unit) + c * units, SUBLANES)
        return jnp.sum(jnp.where(own, scales[pl.ds(at, units)], 0.0), axis=0, keepdims=True)

    return jnp.concatenate([some(c) for c in range(flat_body.COLUMNS // LANES)], axis=1)


def gather(plan: Plan, at: Step, staged: Staged, refs: Refs) -> None:
    """Copies the units of a step to where they stand side by side. After the last step: of one of the last eight's."""
    _, n_rows, in_row = refs.pairs_smem.shape
    per_step = plan.units // in_row
    first = jnp.minimum(at.i, n_rows // per_step - 1) * per_step
    for part in range(per_step):
        for lane in range(in_row):
            # Every number is where the program says: the scalar core has two additions a copy.
            pair = refs.pairs_smem[at.eight, first + part, lane]
            unit, pairs = part * in_row + lane, plan.unit // tokens_a_row(refs.keys_vmem.dtype)
            copy_pairs(refs.keys_vmem, pair, staged.keys, unit * pairs, plan.choice.interpret)
            if staged.scales is not None:
                shift = pairs.bit_length() - 1
                staged.scales[pl.ds(unit, 1)] = refs.unit_scales_vmem[pl.ds(pair >> shift, 1)]


def write_positions(plan: Plan, eight: Array, n_groups: Array, refs: Refs) -> None:
    """Columns of an eight's lists to positions in the sequence."""
    shift = plan.unit.bit_length() - 1

    def units_of(part: Array) -> Array:
        return jnp.broadcast_to(refs.units[eight, pl.ds(part, 1)], (SUBLANES, LANES))

    def store(i: int, units: Array) -> None:
        columns = refs.chosen_vmem[eight, pl.ds(i * SUBLANES, SUBLANES)]
        positions = (units << shift) + (columns & (plan.unit - 1))
        refs.chosen[eight, :, i * LANES : (i + 1) * LANES] = jnp.where(columns < 0, -1, positions)

    parts = pl.cdiv(n_groups, plan.unit)
    look_up(units_of, parts, refs.chosen_vmem.at[eight], refs.chosen.shape[2], store, shift)
