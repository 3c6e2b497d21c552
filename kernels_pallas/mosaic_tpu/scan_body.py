"""Device code of `scan`: all keys stream past a tile of queries, whose units get a list for each eight of them.

    k -- a tile of keys a step --> heads x keys --> maximum over a unit --> sort_keys_vmem, of all units
    after the last step: a threshold for each query --> union_vmem, which units some query of an eight keeps --> lists

A batch's keys come by the grid (`scan_body`). Those of ragged sequences are copied by the kernel, 16 blocks at a time
into a ring of two slots (`ragged_body`).

The columns of a product are tokens in an order that leaves little to do. A row of 32 bits in VMEM holds two tokens side
by side, a unit of g tokens is g / 2 rows. Each product has one row of each of 128 units, first of the 64 even ones,
then of the 64 odd ones. So the maximum over a unit's rows is of whole registers. What is left, the maximum over the two
tokens of a row, makes one register of the two that even and odd units have:

    even units      a0 a0' a2 a2' ...      a0 b1  a2 b3  ...   where the lane is its unit's own
    odd units       b1 b1' b3 b3' ...      b1' a0' ...         the others, which change places with their neighbours

Heads are bfloat16, so 8-bit keys become it, a tile at a time: every number of theirs is one. Their scales are brought
into the order of a product's columns by lane gathers, once for all queries of a tile.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

from hisa_jax.kernels_pallas.mosaic_tpu import fetch, topk_body
from hisa_jax.kernels_pallas.mosaic_tpu.config import LANES, SUBLANES, Choice
from hisa_jax.kernels_pallas.mosaic_tpu.launch import Tile
from hisa_jax.kernels_pallas.mosaic_tpu.pairs_body import strided_pairs
from hisa_jax.kernels_pallas.mosaic_tpu.score_body import lanes_of
from hisa_jax.kernels_pallas.mosaic_tpu.threshold_body import find_near_thresholds
from hisa_jax.kernels_pallas.sort_key import FORCED, INVISIBLE, sort_key_of
from hisa_jax.kernels_pallas.types import Ref

_PRODUCTS = 16  # a turn. Of two each waits for the one before: 1688 cycles a query at 128K on v6e; of 8 873, of 16 781
_SAMPLED = 8  # one group in so many is searched first
_UNION = 4  # times eight groups a turn


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """The static numbers of a launch.

    Attributes:
        tiles: of queries, of a sequence, or of a core.
        unit: tokens; n_exact: heads beside the virtual one.
        slack: up to how many units more than `choice.k` a query may keep.
        span: groups of 128 units that are looked at in one go.
    """

    tiles: int
    unit: int
    n_exact: int
    slack: int
    span: int
    choice: Choice


class Refs(NamedTuple):
    """The buffers."""

    furthest_smem: Ref  # [tiles of the grid], the most keys that a query of the tile sees
    # Windows of the grid, of one tile of queries, E eights of them.
    heads: Ref  # [E, R * 8, D]: of eight queries first the virtual heads, then each exact one
    eligible: Ref  # [E, 8, 1], units that each query sees
    k: Ref  # of a batch a window [1, tile_s, D]: without the one it has no other dtype; else [N, page_size, D] in HBM
    lists: Ref  # out: [slots // 16, LANES], a row for each eight, as sort keys lie: units, ascending, then -1
    counts: Ref  # out: [8, LANES], how many they are, all lanes alike
    # Scratch.
    sort_keys_vmem: Ref  # [E, groups * 8, LANES]; this, thresholds and table as in `topk_body.select`
    thresholds_vmem: Ref
    union_vmem: Ref  # [1, groups * 8, LANES], 1 for a unit of the list, a row for each eight
    table_vmem: Ref
    w: Ref = None  # [E, n_exact * 8, 1]
    w_vmem: Ref = None  # [E, n_exact * 8, LANES]
    # Of 8-bit keys.
    scale: Ref = None  # of a batch a window [tile_s / 128, 128]; else [N, page_size] in HBM
    wide_vmem: Ref = None  # [1, tile_s, D] bfloat16, the keys of a step
    # The ring of ragged sequences.
    keys_vmem: Ref = None  # [2, tile_s, D]
    scale_vmem: Ref = None  # [2, GROUP * per_block, page_size]
    sems: Ref = None  # [2, 2], by slot and operand


def scan_body(plan: Plan, refs: Refs) -> None:
    """On a grid of (sequences, tiles of queries, tiles of keys): one tile of keys."""
    b, t, s = (pl.program_id(axis) for axis in range(3))
    tile_s = refs.k.shape[1]
    per_step = tile_s // (plan.unit * LANES)
    n_steps = pl.cdiv(refs.furthest_smem[b * plan.tiles + t], tile_s)

    pl.when(s == 0)(lambda: spread_weights(plan, refs))
    pl.when(s < n_steps)(lambda: score_tile(plan, s, refs.k, refs.scale, refs))

    # A tile that sees nothing lists nothing at its first step.
    @pl.when(s == jnp.maximum(n_steps - 1, 0))
    def _list():
        list_units(plan, n_steps * per_step, refs)


def ragged_body(plan: Plan, tile: Tile, refs: Refs) -> None:
    """On a grid of (cores, 1, tiles of queries): all keys that a tile of queries sees."""
    tile_s = refs.keys_vmem.shape[1]
    n_steps = pl.cdiv(refs.furthest_smem[pl.program_id(0) * plan.tiles + pl.program_id(2)], tile_s)
    spread_weights(plan, refs)

    def score(i: Array, slot: Array) -> None:
        scale = None if refs.scale is None else refs.scale_vmem.at[slot]
        score_tile(plan, i, refs.keys_vmem.at[pl.ds(slot, 1)], scale, refs)

    pairs = [(refs.k, refs.keys_vmem), *([(refs.scale, refs.scale_vmem)] if refs.scale is not None else [])]
    fetch.in_turn(tile.copy_group, n_steps, pairs, refs.sems, score)
    list_units(plan, n_steps * (tile_s // (plan.unit * LANES)), refs)


def spread_weights(plan: Plan, refs: Refs) -> None:
    """Weights of the exact heads along the lanes."""
    if plan.n_exact:
        refs.w_vmem[...] = jnp.broadcast_to(refs.w[...], refs.w_vmem.shape)


def score_tile(plan: Plan, s: Array, k: Ref, scale: Ref | None, refs: Refs) -> None:
    """Sort keys of the units of tile number s of the keys: k [1, tile_s, D]; scale: in rows of pages."""
    unit, per_step = plan.unit, k.shape[1] // (plan.unit * LANES)
    unroll = groups_a_turn(unit, per_step)
    wide = k if refs.wide_vmem is None else widened(k, refs.wide_vmem)

    def some(i: Array, _: None) -> None:
        for j in range(unroll):
            group = i * unroll + j
            scales: Sequence[Array | None] = [None] * (unit // 2)
            if scale is not None:
                scales = scales_of_products([lanes_of(scale, group * unit, x) for x in range(unit)], unit)
            score_units(plan, group, s * per_step + group, wide, scales, refs)

    lax.fori_loop(0, per_step // unroll, some, None)


def widened(k: Ref, wide_vmem: Ref) -> Ref:
    """8-bit keys [1, tile_s, D] as bfloat16."""

    def some(i: Array, _: None) -> None:
        rows = pl.ds(pl.multiple_of(i * LANES, LANES), LANES)
        wide_vmem[0, rows] = k[0, rows].astype(jnp.float32).astype(wide_vmem.dtype)

    lax.fori_loop(0, k.shape[1] // LANES, some, None)
    return wide_vmem


def scales_of_products(rows: list[Array], unit: int) -> list[Array]:
    """Scales of 128 units' tokens, [1, 128] each -> those of the columns of each product, [8, 256], rows alike."""
    lane = lax.broadcasted_iota(jnp.int32, (SUBLANES, LANES), 1)
    rows = [jnp.broadcast_to(row, (SUBLANES, LANES)) for row in rows]

    def one(r: int, is_odd: int) -> Array:
        token = ((lane & -2) + is_odd) * unit + 2 * r + (lane & 1)
        found = jnp.zeros((SUBLANES, LANES), jnp.float32)
        for i, row in enumerate(rows):
            x = jnp.take_along_axis(row, token & (LANES - 1), axis=1, mode="promise_in_bounds")
            found = jnp.where(token >> 7 == i, x, found)
        return found

    return [jnp.concatenate([one(r, 0), one(r, 1)], axis=1) for r in range(unit // 2)]


def groups_a_turn(unit: int, per_step: int) -> int:
    """Groups of 128 units that a turn of the scoring loop scores."""
    return math.gcd(max(2 * _PRODUCTS // unit, 1), per_step)


def score_units(plan: Plan, i: Array, group: Array, k: Ref, scales: Sequence[Array | None], refs: Refs) -> None:
    """Sort keys of 128 units, group number i of the tile of keys, for all queries of the tile; `scales` of products."""
    n_eights, unit = refs.heads.shape[0], plan.unit
    n_pairs, interpret = LANES * unit // 2, plan.choice.interpret
    best: list[Array] = []
    for r in range(unit // 2):
        keys = strided_pairs(k, i * n_pairs, n_pairs, (r, unit // 2 + r), unit, interpret)
        # All queries after one another: the keys stay in the matrix unit while their rows pass.
        q = refs.heads[...].reshape(-1, keys.shape[1])
        products = lax.dot_general(q, keys, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
        n = products.shape[0] // n_eights
        some = [products[eight * n : (eight + 1) * n] for eight in range(n_eights)]
        scores = [scan_scores(plan, eight, x, scales[r], refs) for eight, x in enumerate(some)]
        best = [jnp.maximum(x, y) for x, y in zip(best, scores, strict=True)] if r else scores
    lane = lax.broadcasted_iota(jnp.int32, (SUBLANES, LANES), 1)
    is_even, units = (lane & 1) == 0, group * LANES + lane
    keep_first, keep_last = plan.choice.keep_first, plan.choice.keep_last
    for eight in range(n_eights):
        even, odd = best[eight][:, :LANES], best[eight][:, LANES:]
        own, others = jnp.where(is_even, even, odd), jnp.where(is_even, odd, even)
        others = jnp.take_along_axis(others, lane ^ 1, axis=1, mode="promise_in_bounds")
        sort_key = sort_key_of(jnp.maximum(own, others))
        eligible = jnp.broadcast_to(refs.eligible[eight], (SUBLANES, LANES))
        is_forced = (units < keep_first) | (units >= eligible - keep_last)
        sort_key = jnp.where(units < eligible, jnp.where(is_forced, FORCED, sort_key), INVISIBLE)
        refs.sort_keys_vmem[eight, pl.ds(pl.multiple_of(group * SUBLANES, SUBLANES), SUBLANES)] = sort_key


def scan_scores(plan: Plan, eight: int, products: Array, scale: Array | None, refs: Refs) -> Array:
    """Scan scores of 256 keys for eight queries, -inf for NaN: [8, 256] float32."""
    total = products[:SUBLANES]
    for h in range(plan.n_exact):
        x = jnp.maximum(products[(h + 1) * SUBLANES : (h + 2) * SUBLANES], 0.0)
        w = refs.w_vmem[eight, h * SUBLANES : (h + 1) * SUBLANES]
        total = total + jnp.concatenate([w, w], axis=1) * x
    if scale is not None:
        total = total * scale
    # Else one such token would hide the others of its unit.
    return jnp.where(total == total, total, -jnp.inf)


def list_units(plan: Plan, n_groups: Array, refs: Refs) -> None:
    """The lists of a tile, of whose units the first `n_groups` groups have sort keys."""
    sort_keys_vmem, span = refs.sort_keys_vmem, plan.span
    n_eights = sort_keys_vmem.shape[0]
    groups = jnp.maximum(pl.cdiv(n_groups, span), 1) * span
    empty = jnp.full((n_eights, SUBLANES, LANES), INVISIBLE, jnp.int32)

    def fill(group: Array, _: None) -> None:
        sort_keys_vmem[:, pl.ds(pl.multiple_of(group * SUBLANES, SUBLANES), SUBLANES)] = empty

    lax.fori_loop(n_groups, groups, fill, None)
    n = jnp.broadcast_to(refs.eligible[...], refs.thresholds_vmem.shape)
    # Those that are tied are all kept.
    every = min(_SAMPLED, span // SUBLANES)
    thresholds = find_near_thresholds(sort_keys_vmem, n, plan.choice.k, plan.slack, groups, every)
    refs.thresholds_vmem[...] = thresholds
    refs.counts[...] = jnp.zeros_like(refs.counts)
    if n_eights < SUBLANES:
        refs.union_vmem[...] = jnp.zeros_like(refs.union_vmem)
    lax.fori_loop(0, n_eights, lambda eight, _: unite(eight, groups, plan, refs), None)
    refs.thresholds_vmem[0] = jnp.ones((SUBLANES, LANES), jnp.int32)
    topk_body.chosen_columns(refs.union_vmem, 0, refs.thresholds_vmem, refs.table_vmem, refs.lists, groups)


def unite(eight: Array, groups: Array, plan: Plan, refs: Refs) -> None:
    """Which units some query of an eight keeps, and how many."""
    thresholds = [
        jnp.broadcast_to(refs.thresholds_vmem[eight, pl.ds(row, 1)], (SUBLANES, LANES)) for row in range(SUBLANES)
    ]
    unroll = min(_UNION, plan.span // SUBLANES)

    def some(i: Array, total: Array) -> Array:
        for j in range(unroll):
            first = (i * unroll + j) * SUBLANES * SUBLANES
            is_kept = jnp.zeros((SUBLANES, LANES), jnp.bool_)
            for row in range(SUBLANES):
                # Eight groups of one query are one strided load.
                x = refs.sort_keys_vmem[eight, pl.ds(first + row, SUBLANES, stride=SUBLANES)]
                is_kept = is_kept | (x >= thresholds[row])
            kept = jnp.where(is_kept, 1, 0)
            refs.union_vmem[0, pl.ds(first + eight, SUBLANES, stride=SUBLANES)] = kept
            total = total + kept
        return total

    none = jnp.zeros((SUBLANES, LANES), jnp.int32)
    total = lax.fori_loop(0, lax.div(groups, unroll * SUBLANES), some, none)
    refs.counts[pl.ds(eight, 1)] = topk_body.splat_sum(total.astype(jnp.float32))[:1]
