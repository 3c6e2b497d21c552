"""Device code of `refine_shared`: eight queries side by side score one list of units, all eight the whole list.

    k_hbm -- all of a sequence, at its first tile --> keys_vmem                (`refine_shared_body`, `ragged_body`)
    keys_vmem -- unit after unit of the list --> even_vmem or odd_vmem, under the products of the step before
    q x keys --> partial_vmem --> sort_keys_vmem --> top-k --> chosen

A row of 32 bits in VMEM holds two tokens side by side, so that a unit of g tokens is g / 2 rows. A unit is copied as
eight rows, one load and one store; what comes after the unit the next one overwrites. A step scores `columns` tokens
of a list. The lists of a tile's eights follow one another, then the top-k of all its queries is found together.
"""

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from hisa_jax.kernels_pallas.mosaic_tpu import fetch, flat_body, topk_body
from hisa_jax.kernels_pallas.mosaic_tpu.config import GROUP, LANES, SUBLANES, Choice
from hisa_jax.kernels_pallas.mosaic_tpu.launch import Tile
from hisa_jax.kernels_pallas.mosaic_tpu.look_up_body import look_up
from hisa_jax.kernels_pallas.mosaic_tpu.pairs_body import copy_pairs
from hisa_jax.kernels_pallas.mosaic_tpu.score_body import spread_weights
from hisa_jax.kernels_pallas.sort_key import INVISIBLE
from hisa_jax.kernels_pallas.types import Ref


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """The static numbers of a launch.

    Attributes:
        tiles: of queries, of a sequence, or of all ragged ones, on one core.
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
    k_hbm: Ref  # [B, S, D]; of ragged sequences [N, page_size, D]
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
    sem: Ref  # [1]
    n_tokens_smem: Ref = None  # [R], of ragged sequences


class ScoreRefs(NamedTuple):
    """What `flat_body.score_keys` works on: eight queries and their list."""

    q: Ref
    w_vmem: Ref
    visible: Ref
    partial_vmem: Ref
    sort_keys_vmem: Ref


def refine_shared_body(plan: Plan, refs: Refs) -> None:
    """On a grid of (cores, sequences, tiles): the best tokens of a tile of queries."""

    @pl.when(pl.program_id(2) == 0)
    def _load():
        keys, whole = refs.k_hbm.at[pl.program_id(1)], pl.ds(0, refs.k_hbm.shape[1])
        copy = pltpu.make_async_copy(keys, refs.keys_vmem.at[whole], refs.sem.at[0])
        copy.start()
        copy.wait()

    refine_tile(plan, refs)


def ragged_body(plan: Plan, block_size: int, tile: Tile, refs: Refs) -> None:
    """The same of ragged sequences, on a grid of (cores, 1, tiles); their keys come in groups of blocks."""

    @pl.when(tile.is_first)
    def _load():
        rows = GROUP * block_size
        n_groups = pl.cdiv(refs.n_tokens_smem[tile.sequence], rows)
        fetch.all_at_once(tile.copy_group, n_groups, [(refs.k_hbm, refs.keys_vmem, rows)], refs.sem)

    refine_tile(plan, refs)


def refine_tile(plan: Plan, refs: Refs) -> None:
    """The best tokens of a tile of queries, whose sequence's keys are in VMEM."""
    core, b, t = (pl.program_id(axis) for axis in range(3))
    n_eights = refs.pairs_smem.shape[0]
    first = ((b * pl.num_programs(0) + core) * plan.tiles + t) * n_eights
    spread_weights(refs.w, refs.w_vmem)

    def one_eight(eight: Array, most: Array) -> Array:
        n_steps = pl.cdiv(refs.counts_smem[first + eight], plan.units)
        own = eight_of(eight, refs)

        def score(i: Array, staged: Ref) -> None:
            keys = lambda first: staged[pl.ds(first, flat_body.COLUMNS)]  # noqa: E731
            flat_body.score_keys(SUBLANES, flat_body.Step(i, plan.columns, keys, None), own)

        def two_steps(turn: Array, _: None) -> None:
            # One after the other in the program, side by side in the schedule.
            i = 2 * turn
            gather(plan, eight, i + 1, refs.odd_vmem, refs)
            score(i, refs.even_vmem)

            @pl.when(i + 1 < n_steps)
            def _odd():
                gather(plan, eight, i + 2, refs.even_vmem, refs)
                score(i + 1, refs.odd_vmem)

        pl.when(n_steps > 0)(lambda: gather(plan, eight, jnp.int32(0), refs.even_vmem, refs))
        lax.fori_loop(0, lax.div(n_steps + 1, 2), two_steps, None)
        return jnp.maximum(most, n_steps)

    n_steps = lax.fori_loop(0, n_eights, one_eight, jnp.int32(0))
    n_groups = n_steps * (plan.columns // LANES)
    parts, groups = (jnp.maximum(pl.cdiv(n_groups, x), 1) * x for x in (plan.part, plan.span))

    def fill(eight: Array, _: None) -> None:
        n = pl.cdiv(refs.counts_smem[first + eight], plan.units) * (plan.columns // LANES)

        def one_group(group: Array, _: None) -> None:
            at = pl.ds(pl.multiple_of(group * SUBLANES, SUBLANES), SUBLANES)
            refs.sort_keys_vmem[eight, at] = jnp.full((SUBLANES, LANES), INVISIBLE, jnp.int32)

        lax.fori_loop(n, groups, one_group, None)

    lax.fori_loop(0, n_eights, fill, None)
    n = jnp.broadcast_to(refs.n_visible[...].reshape(-1, SUBLANES, 1), refs.thresholds_vmem.shape)
    topk_body.select(
        refs.sort_keys_vmem, n, plan.choice.k, refs.thresholds_vmem, refs.table_vmem, refs.chosen_vmem, groups, parts
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


def gather(plan: Plan, eight: Array, i: Array, staged_vmem: Ref, refs: Refs) -> None:
    """Copies the units of a step to where they stand side by side. After the last step: of the last again."""
    _, n_rows, in_row = refs.pairs_smem.shape
    per_step = plan.units // in_row
    first = jnp.minimum(i, n_rows // per_step - 1) * per_step
    for part in range(per_step):
        for lane in range(in_row):
            # Every number is where the program says: the scalar core has two additions a copy.
            pair = refs.pairs_smem[eight, first + part, lane]
            at = (part * in_row + lane) * (plan.unit // 2)
            copy_pairs(refs.keys_vmem, pair, staged_vmem, at, plan.choice.interpret)


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
