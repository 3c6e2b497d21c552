"""Device code of `scores`: at a sequence's first tile the means come into VMEM, then every tile meets all of them."""

import dataclasses
import functools

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.image import FORCED
from kernels_pallas.mosaic_tpu.config import GROUP, LANES, ROWS
from kernels_pallas.mosaic_tpu.pool_body import pool_sequence
from kernels_pallas.mosaic_tpu.tiles import images_of_rows, products, rows_of_scalars, spread_weights, sum_to_sublanes
from kernels_pallas.types import Ref

COLUMNS = 256  # means a product: a side of the larger matrix unit


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """The static numbers of a launch."""

    tile_t: int
    mean_parts: int
    tiles: int  # of a sequence, on one core
    keep_first: int
    keep_last: int


def pooled_scores_body(
    plan: Plan, n_tokens_smem: Ref, n_columns_smem: Ref, eligible_smem: Ref, q_ref: Ref, w_ref: Ref, k_hbm: Ref,
    *refs: Ref, means_vmem: Ref, w_vmem: Ref, partial_vmem: Ref, keys_vmem: Ref, sems: Ref, scale_vmem: Ref = None
) -> None:  # fmt: skip
    *scale_hbm, o_ref = refs
    b = pl.program_id(1)

    @pl.when(pl.program_id(2) == 0)
    def _pool():
        store = functools.partial(store_parts, plan.mean_parts, means_vmem)
        scratch = {"keys_vmem": keys_vmem, "scale_vmem": scale_vmem, "sems": sems}
        pool_sequence(b, n_tokens_smem[b], k_hbm, scale_hbm, store, **scratch)

    score_tile(plan, n_columns_smem, eligible_smem, q_ref, w_ref, o_ref, means_vmem, w_vmem, partial_vmem)


def kept_scores_body(
    plan: Plan, n_tokens_smem: Ref, n_columns_smem: Ref, eligible_smem: Ref, q_ref: Ref, w_ref: Ref, means_hbm: Ref,
    o_ref: Ref, *, means_vmem: Ref, w_vmem: Ref, partial_vmem: Ref, float_vmem: Ref, sem: Ref
) -> None:  # fmt: skip
    b = pl.program_id(1)

    @pl.when(pl.program_id(2) == 0)
    def _split():
        copy = pltpu.make_async_copy(means_hbm.at[b], float_vmem, sem)
        copy.start()
        copy.wait()

        def one_group(i: Array, _: None) -> None:
            first = pl.multiple_of(i * GROUP, GROUP)
            store_parts(plan.mean_parts, means_vmem, first, float_vmem[pl.ds(first, GROUP)])

        lax.fori_loop(0, float_vmem.shape[0] // GROUP, one_group, None)

    score_tile(plan, n_columns_smem, eligible_smem, q_ref, w_ref, o_ref, means_vmem, w_vmem, partial_vmem)


def store_parts(n_parts: int, means_vmem: Ref, first: Array, means: Array) -> None:
    """Rounds float32 means to bfloat16, and what that left to the next part; parts lie side by side: [n, parts * D]."""
    parts = []
    for _ in range(n_parts):
        parts.append(means.astype(jnp.bfloat16))
        means = means - parts[-1].astype(jnp.float32)
    means_vmem[pl.ds(first, GROUP)] = jnp.concatenate(parts, axis=1)


def score_tile(
    plan: Plan,
    n_columns_smem: Ref,
    eligible_smem: Ref,
    q_ref: Ref,
    w_ref: Ref,
    o_ref: Ref,
    means_vmem: Ref,
    w_vmem: Ref,
    partial_vmem: Ref,
) -> None:
    """Images of a tile of queries for all columns that one of them may keep.

    Args:
        n_columns_smem: [all tiles] int32; eligible_smem: [tile_t, 1] int32.
        q_ref: [tile_t, H, D]; w_ref: [tile_t, H]; o_ref: [tile_t, n]; means_vmem: [n, parts * D].
        partial_vmem: [COLUMNS / LANES * tile_t * 8, LANES].
    """
    tile_t, H, D = q_ref.shape
    core, b, t = (pl.program_id(axis) for axis in range(3))
    tile = (b * pl.num_programs(0) + core) * plan.tiles + t
    spread_weights(w_ref, w_vmem)
    eligible = [rows_of_scalars([eligible_smem[group + r, 0] for r in range(ROWS)]) for group in range(0, tile_t, ROWS)]
    lane = lax.broadcasted_iota(jnp.int32, (ROWS, LANES), 1)

    def one_step(i: Array, _: None) -> None:
        first = pl.multiple_of(i * COLUMNS, COLUMNS)
        means = means_vmem[pl.ds(first, COLUMNS)]
        # Eight queries a product: the means stay in the matrix unit while their rows pass.
        for group in range(0, tile_t, ROWS):
            q = q_ref[pl.ds(group, ROWS)].astype(jnp.bfloat16).reshape(ROWS * H, D)
            x = products(jnp.concatenate([q] * plan.mean_parts, axis=1), means)
            for r in range(ROWS):
                for c in range(0, COLUMNS, LANES):
                    rows = x[r * H : (r + 1) * H, c : c + LANES]
                    at = c // LANES * tile_t * ROWS + (group + r) * ROWS
                    partial_vmem[pl.ds(at, ROWS)] = sum_to_sublanes(rows, w_vmem[group + r])
        for group in range(0, tile_t, ROWS):
            for c in range(0, COLUMNS, LANES):
                image = images_of_rows(partial_vmem, c // LANES * tile_t * ROWS + group * ROWS)
                block, last = first + c + lane, eligible[group // ROWS] - plan.keep_last
                image = jnp.where((block < plan.keep_first) | (block >= last), FORCED, image)
                o_ref[pl.ds(group, ROWS), pl.ds(pl.multiple_of(first + c, LANES), LANES)] = image

    lax.fori_loop(0, pl.cdiv(n_columns_smem[tile], COLUMNS), one_step, None)
