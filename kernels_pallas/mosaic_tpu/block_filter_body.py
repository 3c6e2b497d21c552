"""Device code of `block_filter`: at a sequence's first tile the means come into VMEM, where all its tiles meet them."""

import dataclasses
import functools

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from hisa_jax.kernels_pallas.mosaic_tpu import topk_body
from hisa_jax.kernels_pallas.mosaic_tpu.config import GROUP, LANES, ROWS
from hisa_jax.kernels_pallas.mosaic_tpu.launch import Tile
from hisa_jax.kernels_pallas.mosaic_tpu.look_up_body import split_outputs, write_sort_keys
from hisa_jax.kernels_pallas.mosaic_tpu.pool_body import add_pages, parts_of, pool_sequence
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

COLUMNS = 256  # means a product: a side of the larger matrix unit


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """The static numbers of a launch."""

    tiles: int  # of a sequence, on one core
    mean_parts: int
    block_size: int
    block_topk: int
    keep_first: int
    keep_last: int
    has_sort_keys: bool  # whether those of the kept are a second output


def pooled_body(
    plan: Plan, tile: Tile, n_tokens_smem: Ref, n_columns_smem: Ref, eligible_ref: Ref, q_ref: Ref, w_ref: Ref,
    k_hbm: Ref, *refs: Ref, means_vmem: Ref, keys_vmem: Ref, sems: Ref, scale_vmem: Ref = None, **scratch: Ref
) -> None:  # fmt: skip
    scale_hbm, outs = split_outputs(refs, plan.has_sort_keys)

    @pl.when(tile.is_first)
    def _pool():
        store = functools.partial(store_parts, plan.mean_parts, means_vmem)
        ring = {"keys_vmem": keys_vmem, "scale_vmem": scale_vmem, "sems": sems}
        pool_sequence(tile.copy_group, n_tokens_smem[tile.sequence], k_hbm, scale_hbm, store, **ring)

    filter_tile(plan, n_columns_smem, eligible_ref, q_ref, w_ref, means_vmem, outs, **scratch)


def paged_body(
    plan: Plan, tile: Tile, n_tokens_smem: Ref, n_columns_smem: Ref, eligible_ref: Ref, q_ref: Ref, w_ref: Ref,
    sums_hbm: Ref, *outs: Ref, means_vmem: Ref, sums_vmem: Ref, sems: Ref, **scratch: Ref
) -> None:  # fmt: skip
    @pl.when(tile.is_first)
    def _add():
        store = functools.partial(store_parts, plan.mean_parts, means_vmem)
        n_tokens = n_tokens_smem[tile.sequence]
        add_pages(tile.copy_group, n_tokens, plan.block_size, sums_hbm, store, sums_vmem=sums_vmem, sems=sems)

    filter_tile(plan, n_columns_smem, eligible_ref, q_ref, w_ref, means_vmem, outs, **scratch)


def kept_body(
    plan: Plan, tile: Tile, n_tokens_smem: Ref, n_columns_smem: Ref, eligible_ref: Ref, q_ref: Ref, w_ref: Ref,
    kept_hbm: Ref, *outs: Ref, means_vmem: Ref, float_vmem: Ref, sem: Ref, **scratch: Ref
) -> None:  # fmt: skip
    @pl.when(tile.is_first)
    def _split():
        copy = pltpu.make_async_copy(kept_hbm.at[tile.sequence], float_vmem, sem)
        copy.start()
        copy.wait()

        def one_group(i: Array, _: None) -> None:
            first = pl.multiple_of(i * GROUP, GROUP)
            store_parts(plan.mean_parts, means_vmem, first, float_vmem[pl.ds(first, GROUP)])

        lax.fori_loop(0, float_vmem.shape[0] // GROUP, one_group, None)

    filter_tile(plan, n_columns_smem, eligible_ref, q_ref, w_ref, means_vmem, outs, **scratch)


def store_parts(n_parts: int, means_vmem: Ref, first: Array, means: Array) -> None:
    means_vmem[pl.ds(first, GROUP)] = parts_of(means, n_parts)


def filter_tile(
    plan: Plan,
    n_columns_smem: Ref,
    eligible_ref: Ref,
    q_ref: Ref,
    w_ref: Ref,
    means_vmem: Ref,
    outs: tuple[Ref, ...],
    *,
    w_vmem: Ref,
    partial_vmem: Ref,
    sort_keys_vmem: Ref,
    thresholds_vmem: Ref,
    table_vmem: Ref,
    chosen_vmem: Ref,
) -> None:
    """The kept blocks of a tile of queries.

    Args:
        n_columns_smem: [all tiles] int32, the most that a query of the tile may keep.
        eligible_ref: [tile_t // 8, 8, 1] int32; q_ref: [tile_t, H, D]; w_ref: [tile_t, H]; means_vmem: [n, parts * D].
        outs: [tile_t // 8, 8, slots] int32, block ids, ascending, then -1; maybe their sort keys.
        partial_vmem: [COLUMNS / LANES * tile_t * 8, LANES]; the others as in `topk_body.select`.
    """
    core, b, t = (pl.program_id(axis) for axis in range(3))
    n_columns = n_columns_smem[(b * pl.num_programs(0) + core) * plan.tiles + t]
    spread_weights(w_ref, w_vmem)
    eligible = splat(eligible_ref)
    fill(sort_keys_vmem, eligible)

    def one_step(i: Array, _: None) -> None:
        score_step(plan, i, eligible, q_ref, means_vmem, w_vmem, partial_vmem, sort_keys_vmem)

    lax.fori_loop(0, pl.cdiv(n_columns, COLUMNS), one_step, None)
    topk_body.select(sort_keys_vmem, eligible, plan.block_topk, thresholds_vmem, table_vmem, chosen_vmem)
    for register in range(outs[0].shape[2] // LANES):
        some = pl.ds(register * ROWS, ROWS)
        outs[0][:, :, register * LANES : (register + 1) * LANES] = chosen_vmem[:, some]
    for sort_keys_ref in outs[1:]:
        write_sort_keys(sort_keys_vmem, chosen_vmem, sort_keys_ref)


def score_step(
    plan: Plan,
    i: Array,
    eligible: Array,
    q_ref: Ref,
    means_vmem: Ref,
    w_vmem: Ref,
    partial_vmem: Ref,
    sort_keys_vmem: Ref,
) -> None:
    """Sort keys of `COLUMNS` blocks for a tile of queries."""
    tile_t, H, D = q_ref.shape
    first = i * COLUMNS
    means = means_vmem[pl.ds(pl.multiple_of(first, COLUMNS), COLUMNS)]
    # Eight queries a product: the means stay in the matrix unit while their rows pass.
    for group in range(0, tile_t, ROWS):
        q = q_ref[pl.ds(group, ROWS)].astype(jnp.bfloat16).reshape(ROWS * H, D)
        x = products(jnp.concatenate([q] * plan.mean_parts, axis=1), means)
        for r in range(ROWS):
            for c in range(0, COLUMNS, LANES):
                at = (c // LANES * tile_t + group + r) * ROWS
                rows = x[r * H : (r + 1) * H, c : c + LANES]
                partial_vmem[pl.ds(at, ROWS)] = sum_to_sublanes(rows, w_vmem[group + r])
    lane = lax.broadcasted_iota(jnp.int32, (ROWS, LANES), 1)
    for tile in range(tile_t // ROWS):
        for c in range(0, COLUMNS, LANES):
            sort_key = sort_keys_of_rows(partial_vmem, (c // LANES * tile_t + tile * ROWS) * ROWS)
            block = first + c + lane
            is_forced = (block < plan.keep_first) | (block >= eligible[tile] - plan.keep_last)
            sort_key = jnp.where(is_forced, FORCED, sort_key)
            at = lax.div(first + c, LANES) * ROWS
            sort_keys_vmem[tile, pl.ds(pl.multiple_of(at, ROWS), ROWS)] = jnp.where(
                block < eligible[tile], sort_key, INVISIBLE
            )
