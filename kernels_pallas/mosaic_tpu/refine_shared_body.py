"""Device code of `refine_shared`: eight queries side by side score one list of units, all eight the whole list.

    k_hbm -- all of a sequence, at its first tile --> keys_vmem
    keys_vmem -- unit after unit of the list --> even_vmem or odd_vmem, under the products of the step before
    q x keys --> partial_vmem --> sort_keys_vmem --> top-k --> chosen

A row of 32 bits in VMEM holds two tokens side by side, so that a unit of g tokens is g / 2 rows. A unit is copied as
eight rows, one load and one store; what comes after the unit the next one overwrites. A step scores `columns` tokens
of a list, one or more a list. The steps of a tile's eights follow one another, so that the first units of an eight are
copied under the products of the one before; then the top-k of all queries of the tile is found together.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from hisa_jax.kernels_pallas.mosaic_tpu import flat_body, topk_body
from hisa_jax.kernels_pallas.mosaic_tpu.config import LANES, SUBLANES, Choice
from hisa_jax.kernels_pallas.mosaic_tpu.look_up_body import look_up
from hisa_jax.kernels_pallas.mosaic_tpu.pairs_body import copy_pairs
from hisa_jax.kernels_pallas.mosaic_tpu.score_body import spread_weights
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
        tiles: of queries, of a sequence, on one core.
        unit: tokens, a power of two from 2 to 16; columns: tokens a step.
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
    pairs_smem: Ref  # [E, slots // n, n], the pairs of tokens that the lists' units begin with
    units: Ref  # [E, slots // LANES, LANES], the lists
    n_visible: Ref  # [tile_t, 1], tokens of its list that each query sees, the first
    q: Ref  # [tile_t, H, D]
    w: Ref  # [tile_t, H]
    chosen: Ref  # out: [E, 8, k padded], positions, ascending, then -1
    k_hbm: Ref  # [B, S, D]
    # Scratch.
    keys_vmem: Ref  # [S + 16, D]
    even_vmem: Ref  # [columns + 16, D], the keys of a step with an even number
    odd_vmem: Ref  # the same of an odd one
    w_vmem: Ref  # [tile_t, H, LANES]
    partial_vmem: Ref  # see `flat_body.products_a_step`
    sort_keys_vmem: Ref  # [E, groups * 8, LANES]; this and the next three as in `topk_body.select`
    thresholds_vmem: Ref
    table_vmem: Ref
    chosen_vmem: Ref
    sem: Ref


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


def refine_shared_body(plan: Plan, refs: Refs) -> None:
    """On a grid of (cores, sequences, tiles): the best tokens of a tile of queries."""
    core, b, t = (pl.program_id(axis) for axis in range(3))

    @pl.when(t == 0)
    def _load():
        copy = pltpu.make_async_copy(refs.k_hbm.at[b], refs.keys_vmem.at[pl.ds(0, refs.k_hbm.shape[1])], refs.sem)
        copy.start()
        copy.wait()

    n_eights = refs.pairs_smem.shape[0]
    first = ((b * pl.num_programs(0) + core) * plan.tiles + t) * n_eights
    spread_weights(refs.w, refs.w_vmem)

    def steps_of(eight: Array | int) -> Array:
        return jnp.maximum(pl.cdiv(refs.counts_smem[first + eight], plan.units), 1)

    def after(at: Step) -> Step:
        is_last = at.i + 1 >= steps_of(at.eight)
        next_eight = jnp.minimum(at.eight + 1, n_eights - 1)
        return Step(jnp.where(is_last, next_eight, at.eight), jnp.where(is_last, 0, at.i + 1))

    def score(at: Step, staged: Ref) -> None:
        keys = lambda first: staged[pl.ds(first, flat_body.COLUMNS)]  # noqa: E731
        flat_body.score_keys(SUBLANES, flat_body.Step(at.i, plan.columns, keys, None), eight_of(at.eight, refs))

    n_steps = [steps_of(eight) for eight in range(n_eights)]
    total, most = functools.reduce(jnp.add, n_steps), functools.reduce(jnp.maximum, n_steps)

    def two_steps(turn: Array, even: Step) -> Step:
        # One after the other in the program, side by side in the schedule.
        odd = after(even)
        gather(plan, odd, refs.odd_vmem, refs)
        score(even, refs.even_vmem)
        even = after(odd)

        def second() -> None:
            gather(plan, even, refs.even_vmem, refs)
            score(odd, refs.odd_vmem)

        if plan.units > _MOST_COPIES:
            pl.when(2 * turn + 1 < total)(second)
        else:
            # If the steps are odd in number, the last eight's first one comes once more.
            second()
        return even

    start = Step(jnp.int32(0), jnp.int32(0))
    gather(plan, start, refs.even_vmem, refs)
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


def gather(plan: Plan, at: Step, staged_vmem: Ref, refs: Refs) -> None:
    """Copies the units of a step to where they stand side by side. After the last step: of one of the last eight's."""
    _, n_rows, in_row = refs.pairs_smem.shape
    per_step = plan.units // in_row
    first = jnp.minimum(at.i, n_rows // per_step - 1) * per_step
    for part in range(per_step):
        for lane in range(in_row):
            # Every number is where the program says: the scalar core has two additions a copy.
            pair = refs.pairs_smem[at.eight, first + part, lane]
            to = (part * in_row + lane) * (plan.unit // 2)
            copy_pairs(refs.keys_vmem, pair, staged_vmem, to, plan.choice.interpret)


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
