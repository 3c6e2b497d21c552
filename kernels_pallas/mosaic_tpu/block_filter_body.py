"""Device code of `block_filter`: a sequence's block means come to VMEM once, then its tiles of queries are scored.

    keys or page sums (HBM) -- ring of 2 groups --> means_vmem, at the first tile of a sequence, for all its tiles
    q, w (windows of the grid) x means_vmem --> partial_vmem --> sort_keys_vmem --> top-k --> chosen

A tile: for 256 means at a time, a product of eight queries' heads with them (the matrix unit), heads summed but for
eight rows into `partial_vmem`, which becomes the sort keys of eight queries. All sort keys of a tile wait in VMEM for
the exact selection. Copies are under way only while means are made; the next tile's queries are fetched by the grid.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

from hisa_jax.kernels_pallas.mosaic_tpu import topk_body
from hisa_jax.kernels_pallas.mosaic_tpu.config import GROUP, LANES, SUBLANES, Choice
from hisa_jax.kernels_pallas.mosaic_tpu.launch import Tile
from hisa_jax.kernels_pallas.mosaic_tpu.look_up_body import write_sort_keys
from hisa_jax.kernels_pallas.mosaic_tpu.pool_body import add_pages, parts_of, pool_sequence
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

COLUMNS = 256  # means a product: a side of the larger matrix unit


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """The static numbers of a launch."""

    tiles: int  # of a sequence, on one core
    mean_parts: int
    block_size: int
    choice: Choice


class Refs(NamedTuple):
    """The buffers. Those of pooling are of keys, or of the sums of pages."""

    # Scalars, for all tiles.
    n_tokens_smem: Ref  # [R]
    n_columns_smem: Ref  # [tiles of the grid], the most blocks that a query of the tile may keep
    # Windows of the grid, of one tile of queries.
    eligible: Ref  # [tile_t // 8, 8, 1]
    q: Ref  # [tile_t, H, D]
    w: Ref  # [tile_t, H]
    chosen: Ref  # out: [tile_t // 8, 8, slots], block ids, ascending, then -1
    # Scratch.
    means_vmem: Ref  # [n, mean_parts * D] bfloat16, of the sequence
    w_vmem: Ref  # [tile_t, H, LANES]
    partial_vmem: Ref  # [COLUMNS // LANES * tile_t * 8, LANES], score sums but for eight rows
    sort_keys_vmem: Ref  # [tile_t // 8, groups * 8, LANES]; this and the next three as in `topk_body.select`
    thresholds_vmem: Ref
    table_vmem: Ref
    chosen_vmem: Ref
    sems: Ref  # [2, 2], of the ring, by slot and operand
    sort_keys: Ref = None  # out, maybe: [tile_t // 8, 8, slots], of the chosen
    # As in `pool_body.PoolRefs`, or as in `pool_body.PagesRefs`.
    k_hbm: Ref = None
    scale_hbm: Ref = None
    keys_vmem: Ref = None
    scale_vmem: Ref = None
    sums_hbm: Ref = None
    sums_vmem: Ref = None


def block_filter_body(plan: Plan, tile: Tile, refs: Refs) -> None:
    """The kept blocks of a tile of queries."""

    def store(first: Array, means: Array) -> None:
        refs.means_vmem[pl.ds(first, GROUP)] = parts_of(means, plan.mean_parts)

    @pl.when(tile.is_first)
    def _means():
        n_tokens = refs.n_tokens_smem[tile.sequence]
        if refs.sums_hbm is None:
            pool_sequence(tile.copy_group, n_tokens, refs, store)
        else:
            add_pages(tile.copy_group, n_tokens, plan.block_size, refs, store)

    core, b, t = (pl.program_id(axis) for axis in range(3))
    n_columns = refs.n_columns_smem[(b * pl.num_programs(0) + core) * plan.tiles + t]
    spread_weights(refs.w, refs.w_vmem)
    eligible = splat(refs.eligible)
    fill(refs.sort_keys_vmem, eligible)
    # Blocks that no query of the tile may keep are not scored.
    n_steps = pl.cdiv(n_columns, COLUMNS)
    lax.fori_loop(0, n_steps, lambda i, _: score_step(plan, i, eligible, refs), None)
    select = functools.partial(topk_body.select, refs.sort_keys_vmem, eligible, plan.choice.k)
    select(refs.thresholds_vmem, refs.table_vmem, refs.chosen_vmem)
    for register in range(refs.chosen.shape[2] // LANES):
        some = pl.ds(register * SUBLANES, SUBLANES)
        refs.chosen[:, :, register * LANES : (register + 1) * LANES] = refs.chosen_vmem[:, some]
    if plan.choice.has_sort_keys:
        write_sort_keys(refs.sort_keys_vmem, refs.chosen_vmem, refs.sort_keys)


def score_step(plan: Plan, i: Array, eligible: Array, refs: Refs) -> None:
    """Sort keys of `COLUMNS` blocks for a tile of queries."""
    tile_t, H, D = refs.q.shape
    first = i * COLUMNS
    means = refs.means_vmem[pl.ds(pl.multiple_of(first, COLUMNS), COLUMNS)]
    # Eight queries a product: the means stay in the matrix unit while their rows pass.
    for group in range(0, tile_t, SUBLANES):
        q = refs.q[pl.ds(group, SUBLANES)].astype(jnp.bfloat16).reshape(SUBLANES * H, D)
        x = products(jnp.concatenate([q] * plan.mean_parts, axis=1), means)
        for r in range(SUBLANES):
            for c in range(0, COLUMNS, LANES):
                at = (c // LANES * tile_t + group + r) * SUBLANES
                rows = x[r * H : (r + 1) * H, c : c + LANES]
                refs.partial_vmem[pl.ds(at, SUBLANES)] = sum_to_sublanes(rows, refs.w_vmem[group + r])
    lane = lax.broadcasted_iota(jnp.int32, (SUBLANES, LANES), 1)
    for tile in range(tile_t // SUBLANES):
        for c in range(0, COLUMNS, LANES):
            sort_key = sort_keys_of_rows(refs.partial_vmem, (c // LANES * tile_t + tile * SUBLANES) * SUBLANES)
            block = first + c + lane
            is_forced = (block < plan.choice.keep_first) | (block >= eligible[tile] - plan.choice.keep_last)
            sort_key = jnp.where(is_forced, FORCED, sort_key)
            at = lax.div(first + c, LANES) * SUBLANES
            refs.sort_keys_vmem[tile, pl.ds(pl.multiple_of(at, SUBLANES), SUBLANES)] = jnp.where(
                block < eligible[tile], sort_key, INVISIBLE
            )
