"""Device code of `flat`: keys stream past a tile of queries, whose sort keys stay in VMEM until all are there.

    k, scale -- a step at a time, the next one under way --> q x keys --> partial_vmem --> sort_keys_vmem, of all keys
    after the last step: top-k of sort_keys_vmem --> chosen

A batch's keys come by the grid, a tile of keys a step (`flat_body`). Those of ragged sequences are copied by the
kernel, 16 blocks at a time into a ring of two slots (`ragged_body`). Keys that no query of the tile sees are neither
copied nor scored; the sort keys of what is left of the last span are set to `INVISIBLE`.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

from hisa_jax.kernels_pallas.mosaic_tpu import fetch, topk_body
from hisa_jax.kernels_pallas.mosaic_tpu.config import GROUP, LANES, SUBLANES
from hisa_jax.kernels_pallas.mosaic_tpu.launch import Tile
from hisa_jax.kernels_pallas.mosaic_tpu.look_up_body import write_sort_keys
from hisa_jax.kernels_pallas.mosaic_tpu.score_body import (
    products,
    row_of,
    scores_of_rows,
    spread_weights,
    sum_to_sublanes,
)
from hisa_jax.kernels_pallas.sort_key import INVISIBLE, sort_key_of
from hisa_jax.kernels_pallas.types import Ref

COLUMNS = 256  # keys a product: a side of the larger matrix unit
Put = Callable[[int, Array, list[Array]], None]  # see `score_keys`


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """The static numbers of a launch."""

    k: int
    tiles: int  # of queries: of a sequence, or of a core
    rows: int  # of eight queries side by side, those that there are: fewer than 8 in decoding
    span: int  # groups of sort keys that the selection looks at in one go


class Refs(NamedTuple):
    """The buffers."""

    furthest_smem: Ref  # [tiles of the grid], the most keys that a query of the tile sees
    # Windows of the grid, of one tile of queries.
    q: Ref  # [tile_t, H, D]
    w: Ref  # [tile_t, H]
    visible: Ref  # [tile_t, 1]
    k: Ref  # of a batch a window [tile_s, D]; else [N, page_size, D] in HBM
    chosen: Ref  # out: [tile_t // 8, slots // 16, LANES], positions as sort keys lie, ascending, then -1
    # Scratch.
    sort_keys_vmem: Ref  # [tile_t // 8, groups * 8, LANES]; this, thresholds and table as in `topk_body.select`
    w_vmem: Ref  # [tile_t, H, LANES]
    partial_vmem: Ref  # see `products_a_step`; score sums but for eight rows
    thresholds_vmem: Ref
    table_vmem: Ref
    scale: Ref = None  # of a batch a window [1, tile_s]; else [N, page_size] in HBM
    sort_keys: Ref = None  # out, maybe: [tile_t // 8, 8, slots], of the chosen
    # The ring of ragged sequences, of blocks of `unit` keys.
    keys_vmem: Ref = None  # [2, GROUP, unit, D]
    scale_vmem: Ref = None  # [2, GROUP * per_block, unit / per_block]
    sems: Ref = None  # [2, 2], by slot and operand


@dataclasses.dataclass(frozen=True)
class Step:
    """Keys that are scored in one go.

    Attributes:
        i: which step; size: keys of one.
        keys_of: first of `COLUMNS` keys of the step -> [COLUMNS, D]; scale_of: the same -> [1, COLUMNS]; None for 1.
    """

    i: Array
    size: int
    keys_of: Callable[[Array], Array]
    scale_of: Callable[[Array], Array] | None


def flat_body(plan: Plan, refs: Refs) -> None:
    """On a grid of (sequences, tiles of queries, tiles of keys): one tile of keys."""
    b, t, s = (pl.program_id(axis) for axis in range(3))
    tile_s = refs.k.shape[0]
    n_steps = pl.cdiv(refs.furthest_smem[b * plan.tiles + t], tile_s)

    @pl.when(s == 0)
    def _start():
        spread_weights(refs.w, refs.w_vmem)

    @pl.when(s < n_steps)
    def _score():
        keys_of = lambda first: refs.k[pl.ds(first, COLUMNS)]  # noqa: E731
        scale_of = None if refs.scale is None else lambda first: refs.scale[:, pl.ds(first, COLUMNS)]
        score_keys(plan.rows, Step(s, tile_s, keys_of, scale_of), refs)

    # A tile that sees nothing selects at its first step, too.
    @pl.when(s == jnp.maximum(n_steps - 1, 0))
    def _select():
        select_scored(plan, n_steps * tile_s, refs)


def ragged_body(plan: Plan, tile: Tile, refs: Refs) -> None:
    """On a grid of (cores, 1, tiles): all keys that a tile of queries sees, in groups of blocks of `unit` keys."""
    tile_s = GROUP * refs.keys_vmem.shape[2]
    n_steps = pl.cdiv(refs.furthest_smem[pl.program_id(0) * plan.tiles + pl.program_id(2)], tile_s)
    spread_weights(refs.w, refs.w_vmem)

    def score(i: Array, slot: Array) -> None:
        score_keys(plan.rows, step_of_ring(i, slot, refs), refs)

    pairs = [(refs.k, refs.keys_vmem), *([(refs.scale, refs.scale_vmem)] if refs.scale is not None else [])]
    fetch.in_turn(tile.copy_group, n_steps, pairs, refs.sems, score)
    select_scored(plan, n_steps * tile_s, refs)


def step_of_ring(i: Array, slot: Array, refs: Any) -> Step:
    """The keys of a slot of the ring, which are those of step i."""
    unit = refs.keys_vmem.shape[2]
    units = COLUMNS // unit

    def keys_of(first: Array) -> Array:
        at = lax.div(first, unit)
        return jnp.concatenate([refs.keys_vmem[slot, at + u] for u in range(units)], axis=0)

    def scale_of(first: Array) -> Array:
        per_block = refs.scale_vmem.shape[1] // GROUP
        return row_of(refs.scale_vmem.at[slot], lax.div(first, unit) * per_block, units * per_block)

    return Step(i, GROUP * unit, keys_of, None if refs.scale is None else scale_of)


def select_scored(plan: Plan, n_scored: Array, refs: Refs) -> None:
    """The selection of a tile, whose first `n_scored` keys have sort keys."""
    sort_keys_vmem = refs.sort_keys_vmem
    # A tile that sees nothing, too: the selection always looks at the first span.
    groups = jnp.maximum(pl.cdiv(n_scored, plan.span * LANES), 1) * plan.span
    empty = jnp.full((sort_keys_vmem.shape[0], SUBLANES, LANES), INVISIBLE, jnp.int32)

    def fill(group: Array, _: None) -> None:
        sort_keys_vmem[:, pl.ds(pl.multiple_of(group * SUBLANES, SUBLANES), SUBLANES)] = empty

    lax.fori_loop(lax.div(n_scored, LANES), groups, fill, None)
    n = jnp.broadcast_to(refs.visible[...].reshape(-1, SUBLANES, 1), refs.thresholds_vmem.shape)
    select = functools.partial(topk_body.select, sort_keys_vmem, n, plan.k)
    select(refs.thresholds_vmem, refs.table_vmem, refs.chosen, groups)
    if refs.sort_keys is not None:
        write_sort_keys(sort_keys_vmem, refs.chosen, refs.sort_keys, groups)


def products_a_step(tile_t: int, tile_s: int) -> int:
    """Products of a turn of the scoring loop; each takes [tile_t * 16, 128] of the partial sums' scratch."""
    return math.gcd(max(1, 32 // tile_t), tile_s // COLUMNS)


def score_keys(n_rows: int, step: Step, refs: Any, put: Put | None = None) -> None:
    """Scores of all queries of the tile for the keys of a step; `refs` have what it reads and writes of `Refs`.

    Args:
        put: gets the scores of eight queries of the tile, from the first one on, for groups of 128 keys, likewise;
            None: `put_sort_keys`.
    """
    tile_t, H, D = refs.q.shape
    per_step, put = products_a_step(tile_t, step.size), put or put_sort_keys(refs)

    def one_step(i: Array, _: None) -> None:
        # Few queries are few rows a product: then more products a step, so that one's keys are loaded under another.
        for product in range(per_step):
            first = pl.multiple_of((i * per_step + product) * COLUMNS, COLUMNS)
            at = product * COLUMNS // LANES
            keys = step.keys_of(first)
            scales = [step.scale_of(first)] if step.scale_of else []
            # Eight queries a product: the keys stay in the matrix unit while their rows pass.
            for t in range(0, tile_t, SUBLANES):
                x = products(refs.q[pl.ds(t, n_rows)].reshape(n_rows * H, D), keys)
                for r in range(n_rows):
                    for c in range(COLUMNS // LANES):
                        some = slice(c * LANES, (c + 1) * LANES)
                        rows = sum_to_sublanes(x[r * H : (r + 1) * H, some], refs.w_vmem[t + r])
                        for scale in scales:
                            rows = rows * scale[:, some]
                        refs.partial_vmem[pl.ds(((at + c) * tile_t + t + r) * SUBLANES, SUBLANES)] = rows
        first = step.i * step.size + i * per_step * COLUMNS
        for t in range(0, tile_t, SUBLANES):
            rows_of = [(c * tile_t + t) * SUBLANES for c in range(per_step * COLUMNS // LANES)]
            put(t, first, [scores_of_rows(refs.partial_vmem, row) for row in rows_of])

    lax.fori_loop(0, step.size // (per_step * COLUMNS), one_step, None)


def put_sort_keys(refs: Any) -> Put:
    """Puts the sort keys of scores where the selection finds them."""
    tile_t = refs.q.shape[0]
    lane = lax.broadcasted_iota(jnp.int32, (SUBLANES, LANES), 1)
    visible = [
        jnp.broadcast_to(refs.visible[pl.ds(t, SUBLANES)], (SUBLANES, LANES)) for t in range(0, tile_t, SUBLANES)
    ]

    def put(t: int, first: Array, scores: list[Array]) -> None:
        for c, x in enumerate(scores):
            key = first + c * LANES
            sort_key = jnp.where(key + lane < visible[t // SUBLANES], sort_key_of(x), INVISIBLE)
            group = pl.multiple_of(lax.div(key, LANES) * SUBLANES, SUBLANES)
            refs.sort_keys_vmem[t // SUBLANES, pl.ds(group, SUBLANES)] = sort_key

    return put
