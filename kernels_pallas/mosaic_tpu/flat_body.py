"""Device code of `flat`: keys stream past a tile of queries, whose sort keys stay in VMEM until all are there."""

import dataclasses
import math
from collections.abc import Callable

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

from hisa_jax.kernels_pallas.mosaic_tpu import fetch, topk_body
from hisa_jax.kernels_pallas.mosaic_tpu.config import GROUP, LANES, ROWS
from hisa_jax.kernels_pallas.mosaic_tpu.launch import Tile
from hisa_jax.kernels_pallas.mosaic_tpu.look_up_body import split_outputs, write_sort_keys
from hisa_jax.kernels_pallas.mosaic_tpu.tiles import (
    products,
    row_of,
    sort_keys_of_rows,
    spread_weights,
    sum_to_sublanes,
)
from hisa_jax.kernels_pallas.sort_key import INVISIBLE
from hisa_jax.kernels_pallas.types import Ref

COLUMNS = 256  # keys a product: a side of the larger matrix unit


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """The static numbers of a launch."""

    topk: int
    tiles: int  # of queries in a sequence
    rows: int  # of eight queries side by side, those that there are: fewer than 8 in decoding
    span: int  # groups of sort keys that the selection looks at in one go
    has_sort_keys: bool  # whether those of the chosen are a second output


def flat_body(plan: Plan, furthest_smem: Ref, q_ref: Ref, w_ref: Ref, visible_ref: Ref, k_ref: Ref, *refs: Ref) -> None:
    """On a grid of (sequences, tiles of queries, tiles of keys); the shapes are those of the launch."""
    *rest, sort_keys_vmem, w_vmem, partial_vmem, thresholds_vmem, table_vmem = refs
    scale_ref, (o_ref, *sort_keys_refs) = split_outputs(tuple(rest), plan.has_sort_keys)
    b, t, s = (pl.program_id(axis) for axis in range(3))
    tile_s = k_ref.shape[0]
    furthest = furthest_smem[b * plan.tiles + t]  # of the tile's queries

    def keys_of(first: Array) -> Array:
        return k_ref[pl.ds(first, COLUMNS)]

    def scale_of(first: Array) -> Array:
        return scale_ref[0][:, pl.ds(first, COLUMNS)]

    n_steps = pl.cdiv(furthest, tile_s)

    @pl.when(s == 0)
    def _start():
        spread_weights(w_ref, w_vmem)

    @pl.when(s < n_steps)
    def _score():
        keys = tile_s, keys_of, scale_of if scale_ref else None
        score_keys(plan.rows, s, *keys, q_ref, visible_ref, sort_keys_vmem, w_vmem, partial_vmem)

    @pl.when(s == jnp.maximum(n_steps - 1, 0))
    def _select():
        scratch = sort_keys_vmem, thresholds_vmem, table_vmem
        select_scored(plan, n_steps * tile_s, visible_ref, *scratch, o_ref, *sort_keys_refs)


def ragged_body(
    plan: Plan, tile: Tile, furthest_smem: Ref, q_ref: Ref, w_ref: Ref, visible_ref: Ref, k_hbm: Ref, *refs: Ref,
    keys_vmem: Ref, sems: Ref, sort_keys_vmem: Ref, w_vmem: Ref, partial_vmem: Ref, thresholds_vmem: Ref,
    table_vmem: Ref, scale_vmem: Ref = None
) -> None:  # fmt: skip
    """On a grid of (cores, 1, tiles): the keys of a tile's sequence come in groups of blocks of `unit` keys.

    Args:
        keys_vmem: [2, GROUP, unit, D]; scale_vmem: [2, GROUP * per_block, unit / per_block].
    """
    *scale_hbm, o_ref = refs
    unit = keys_vmem.shape[2]
    tile_s, units = GROUP * unit, COLUMNS // unit
    furthest = furthest_smem[pl.program_id(0) * plan.tiles + pl.program_id(2)]
    n_steps = pl.cdiv(furthest, tile_s)
    spread_weights(w_ref, w_vmem)

    def score(i: Array, slot: Array) -> None:
        def keys_of(first: Array) -> Array:
            at = lax.div(first, unit)
            return jnp.concatenate([keys_vmem[slot, at + u] for u in range(units)], axis=0)

        def scale_of(first: Array) -> Array:
            per_block = scale_vmem.shape[1] // GROUP
            return row_of(scale_vmem.at[slot], lax.div(first, unit) * per_block, units * per_block)

        keys = tile_s, keys_of, scale_of if scale_hbm else None
        score_keys(plan.rows, i, *keys, q_ref, visible_ref, sort_keys_vmem, w_vmem, partial_vmem)

    pairs = [(k_hbm, keys_vmem), *((scale, scale_vmem) for scale in scale_hbm)]
    fetch.in_turn(tile.copy_group, n_steps, pairs, sems, score)
    select_scored(plan, n_steps * tile_s, visible_ref, sort_keys_vmem, thresholds_vmem, table_vmem, o_ref)


def select_scored(
    plan: Plan,
    n_scored: Array,
    visible_ref: Ref,
    sort_keys_vmem: Ref,
    thresholds_vmem: Ref,
    table_vmem: Ref,
    o_ref: Ref,
    *sort_keys_refs: Ref,
) -> None:
    """The selection of a tile, whose first `n_scored` keys have sort keys."""
    # A tile that sees nothing, too: the selection always looks at the first span.
    groups = jnp.maximum(pl.cdiv(n_scored, plan.span * LANES), 1) * plan.span
    empty = jnp.full((sort_keys_vmem.shape[0], ROWS, LANES), INVISIBLE, jnp.int32)

    def fill(group: Array, _: None) -> None:
        sort_keys_vmem[:, pl.ds(pl.multiple_of(group * ROWS, ROWS), ROWS)] = empty

    lax.fori_loop(lax.div(n_scored, LANES), groups, fill, None)
    n = jnp.broadcast_to(visible_ref[...].reshape(-1, ROWS, 1), thresholds_vmem.shape)
    topk_body.select(sort_keys_vmem, n, plan.topk, thresholds_vmem, table_vmem, o_ref, groups)
    for sort_keys_ref in sort_keys_refs:
        write_sort_keys(sort_keys_vmem, o_ref, sort_keys_ref, groups)


def products_a_step(tile_t: int, tile_s: int) -> int:
    """Products of a step of the scoring loop; each takes [tile_t * 16, 128] of the partial sums' scratch."""
    return math.gcd(max(1, 32 // tile_t), tile_s // COLUMNS)


def score_keys(
    n_rows: int,
    s: Array,
    tile_s: int,
    keys_of: Callable[[Array], Array],
    scale_of: Callable[[Array], Array] | None,
    q_ref: Ref,
    visible_ref: Ref,
    sort_keys_vmem: Ref,
    w_vmem: Ref,
    partial_vmem: Ref,
) -> None:
    """Sort keys of all queries of the tile for the keys of step s.

    Args:
        keys_of: first of `COLUMNS` keys of the step's `tile_s` -> [COLUMNS, D]; scale_of: the same -> [1, COLUMNS].
        q_ref: [tile_t, H, D]; visible_ref: [tile_t, 1].
        sort_keys_vmem: [tile_t // 8, G * 8, 128]; w_vmem: [tile_t, H, 128]; partial_vmem: see `products_a_step`.
    """
    tile_t, H, D = q_ref.shape
    per_step = products_a_step(tile_t, tile_s)
    lane = lax.broadcasted_iota(jnp.int32, (ROWS, LANES), 1)
    visible = [jnp.broadcast_to(visible_ref[pl.ds(t, ROWS)], (ROWS, LANES)) for t in range(0, tile_t, ROWS)]

    def one_step(i: Array, _: None) -> None:
        # Few queries are few rows a product: then more products a step, so that one's keys are loaded under another.
        for product in range(per_step):
            first = pl.multiple_of((i * per_step + product) * COLUMNS, COLUMNS)
            at = product * COLUMNS // LANES
            keys = keys_of(first)
            scales = [scale_of(first)] if scale_of else []
            # Eight queries a product: the keys stay in the matrix unit while their rows pass.
            for t in range(0, tile_t, ROWS):
                x = products(q_ref[pl.ds(t, n_rows)].reshape(n_rows * H, D), keys)
                for r in range(n_rows):
                    for c in range(COLUMNS // LANES):
                        some = slice(c * LANES, (c + 1) * LANES)
                        rows = sum_to_sublanes(x[r * H : (r + 1) * H, some], w_vmem[t + r])
                        for scale in scales:
                            rows = rows * scale[:, some]
                        partial_vmem[pl.ds(((at + c) * tile_t + t + r) * ROWS, ROWS)] = rows
        for t in range(0, tile_t, ROWS):
            for c in range(per_step * COLUMNS // LANES):
                sort_key = sort_keys_of_rows(partial_vmem, (c * tile_t + t) * ROWS)
                first = s * tile_s + i * per_step * COLUMNS + c * LANES
                sort_key = jnp.where(first + lane < visible[t // ROWS], sort_key, INVISIBLE)
                sort_keys_vmem[t // ROWS, pl.ds(pl.multiple_of(lax.div(first, LANES) * ROWS, ROWS), ROWS)] = sort_key

    lax.fori_loop(0, tile_s // (per_step * COLUMNS), one_step, None)
