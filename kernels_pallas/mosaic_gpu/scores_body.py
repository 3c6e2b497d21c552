"""Device code of `scores`: one warp-group loads, the others score, each its own tile of keys."""

import dataclasses

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.image import FORCED, INVISIBLE, image_of
from kernels_pallas.mosaic_gpu.lanes import keys_of_lanes, load_lanes, multiply_and_sum, store_lanes
from kernels_pallas.mosaic_gpu.roles import (
    HEAD_COLUMN,
    LOADER_REGISTERS,
    one_warp,
    release,
    share_registers,
    tiled,
    wait_all,
)
from kernels_pallas.types import Ref


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """The static numbers of a launch."""

    T: int
    H: int
    D: int
    dtype: jnp.dtype
    has_scale: bool
    n_parts: int
    n_spans: int
    n_items: int
    keep_first: int
    keep_last: int
    n_ctas: int
    rows: int
    n_score: int
    n_keys: int
    ring: int
    interpret: object

    @property
    def tile_transforms(self) -> tuple:
        return tiled(self.D, self.dtype)


def scores_body(
    plan: Plan,
    tiles_gmem: Ref,
    limit_gmem: Ref,
    first_column_gmem: Ref,
    q_gmem: Ref,
    w_gmem: Ref,
    *refs: Ref,
    **scratch: Ref,
) -> None:
    *keys_gmem, o_gmem = refs
    role = lax.axis_index("warpgroup")
    items = _Items(plan, tiles_gmem, first_column_gmem)
    pl.when(role < plan.n_score)(lambda: score(plan, items, role, limit_gmem, o_gmem, **scratch))
    pl.when(role == plan.n_score)(lambda: load(plan, items, q_gmem, w_gmem, keys_gmem, **scratch))


class _Items:
    """The work of a CTA: items cta, cta + n_ctas, ..., an item being a tile of queries and a span of keys."""

    def __init__(self, plan: Plan, tiles_gmem: Ref, first_column_gmem: Ref) -> None:
        self.plan, self.tiles_gmem = plan, tiles_gmem
        self.cta = lax.axis_index("cta")
        self.n = (plan.n_items - self.cta + plan.n_ctas - 1) // plan.n_ctas
        self.first_column = first_column_gmem[0]

    def __call__(self, i: Array) -> tuple[Array, Array, Array, Array]:
        """First query, how many (0 if none sees this span), column of the result and first key row."""
        item = self.cta + i * self.plan.n_ctas
        tile, span = item // self.plan.n_spans, item % self.plan.n_spans
        column = span * (self.plan.rows * self.plan.n_score)
        first, n, key_row, most = (self.tiles_gmem[tile, field] for field in range(4))
        n = jnp.where(self.first_column + column < most, n, 0)
        return first, n, column, key_row + self.first_column + column


def load(
    plan: Plan,
    items: _Items,
    q_gmem: Ref,
    w_gmem: Ref,
    keys_gmem: Ref,
    *,
    q_smem: Ref,
    w_smem: Ref,
    k_smem: Ref,
    q_full: Ref,
    q_free: Ref,
    k_full: Ref,
    k_free: Ref,
    scale_smem: Ref = None,
) -> None:
    plgpu.set_max_registers(LOADER_REGISTERS, action="decrease")

    def one_item(i, n_before):
        first, n, _, key_row = items(i)
        at = i % plan.n_keys
        plgpu.barrier_wait(k_free.at[at])
        for group in range(plan.n_score):
            # A visible multiple of 8: tiled copies need to know.
            rows = pl.ds((key_row // 8 + group * (plan.rows // 8)) * 8, plan.rows)
            for part in range(plan.n_parts):
                plgpu.copy_gmem_to_smem(keys_gmem[0].at[part, rows], k_smem.at[at, group, part], k_full.at[at])
            if plan.has_scale:
                plgpu.copy_gmem_to_smem(keys_gmem[-1].at[rows], scale_smem.at[at * plan.n_score + group], k_full.at[at])

        def one_query(j, _):
            slot, t = (n_before + j) % plan.ring, first + j
            plgpu.barrier_wait(q_free.at[slot])
            plgpu.copy_gmem_to_smem(q_gmem.at[t], q_smem.at[slot], q_full.at[slot])
            plgpu.copy_gmem_to_smem(w_gmem.at[t], w_smem.at[slot, pl.ds(0, plan.H)], q_full.at[slot])
            return _

        lax.fori_loop(0, n, one_query, None)
        return n_before + n

    @one_warp
    def _all_items():
        lax.fori_loop(0, items.n, one_item, jnp.int32(0))
        wait_all(k_free, plan.n_keys)
        wait_all(q_free, plan.ring)


def score(
    plan: Plan,
    items: _Items,
    group: Array,
    limit_gmem: Ref,
    o_gmem: Ref,
    *,
    q_smem: Ref,
    w_smem: Ref,
    k_smem: Ref,
    q_full: Ref,
    q_free: Ref,
    k_full: Ref,
    k_free: Ref,
    scale_smem: Ref = None,
) -> None:
    plgpu.set_max_registers(share_registers(plan.n_score, LOADER_REGISTERS), action="increase")
    for at in range(plan.n_keys):
        plgpu.barrier_arrive(k_free.at[at])
    for slot in range(plan.ring):
        plgpu.barrier_arrive(q_free.at[slot])
    key = keys_of_lanes(plan.rows, plan.interpret)

    def one_item(i, n_before):
        first, n, column, _ = items(i)
        at = i % plan.n_keys
        column = column + group * plan.rows
        candidate = items.first_column + column + key
        plgpu.barrier_wait(k_full.at[at])
        scale = load_lanes(scale_smem, at * plan.n_score + group, plan.rows, plan.interpret) if plan.has_scale else None

        def one_query(j, _):
            slot, t = (n_before + j) % plan.ring, first + j
            limit = limit_gmem[t]
            plgpu.barrier_wait(q_full.at[slot])
            w = plgpu.load(w_smem.at[slot, pl.ds(0, plan.H)], layout=HEAD_COLUMN)
            parts = [k_smem.at[at, group, part] for part in range(plan.n_parts)]
            x = multiply_and_sum(parts, q_smem.at[slot], w, lambda: release(plan, q_free.at[slot]), plan.interpret)
            image = image_of(x if scale is None else x * scale)
            if plan.keep_first or plan.keep_last:
                image = jnp.where(candidate < plan.keep_first, FORCED, image)
                image = jnp.where(candidate >= limit - plan.keep_last, FORCED, image)
            image = jnp.where(candidate < limit, image, INVISIBLE)
            store_lanes(o_gmem, t, column, plan.rows, image, plan.interpret)
            return _

        lax.fori_loop(0, n, one_query, None)
        release(plan, k_free.at[at])
        return n_before + n

    lax.fori_loop(0, items.n, one_item, jnp.int32(0))
