"""Device code of `topk`: one warp-group copies rows in, the others select, each from a row of its own."""

import dataclasses

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.image import INVISIBLE
from kernels_pallas.mosaic_gpu import rows as select_rows
from kernels_pallas.mosaic_gpu.roles import release, wait_all
from kernels_pallas.types import Ref

LINE = 128


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """The static numbers of a launch."""

    T: int
    W: int
    k: int
    n_old: int  # the best so far, before the tile; 0: a row by itself
    n_select: int
    n_ctas: int
    interpret: object

    @property
    def width(self) -> int:
        return self.n_old + self.W

    def rounds(self, cta: Array) -> Array:
        """Rows of a CTA are cta, cta + n_ctas, ..., dealt to its warp-groups in turn; the last round may be ragged."""
        n_rows = (self.T - cta + self.n_ctas - 1) // self.n_ctas
        return (n_rows + self.n_select - 1) // self.n_select

    def row(self, cta: Array, turn: Array, group: Ref) -> Array:
        return cta + (turn * self.n_select + group) * self.n_ctas


def topk_body(plan: Plan, limit_gmem: Ref, start_gmem: Ref, x_gmem: Ref, *refs: Ref, **scratch: Ref) -> None:
    old_gmem, out_gmem = (refs[:2], refs[2:]) if plan.n_old else ((), refs)
    role = lax.axis_index("warpgroup")
    pl.when(role < plan.n_select)(lambda: select(plan, role, limit_gmem, start_gmem, *out_gmem, **scratch))
    pl.when(role == plan.n_select)(lambda: load(plan, x_gmem, *old_gmem, **scratch))


def load(
    plan: Plan,
    x_gmem: Ref,
    best_gmem: Ref = None,
    positions_gmem: Ref = None,
    *,
    images_smem: Ref,
    positions_smem: Ref,
    row_full: Ref,
    row_free: Ref,
    **_: Ref,
) -> None:
    cta = lax.axis_index("cta")

    def one_round(turn, _):
        def one_row(group, _):
            t = plan.row(cta, turn, group)

            @pl.when(t < plan.T)
            def _copy():
                plgpu.barrier_wait(row_free.at[group])
                new = images_smem.at[group, pl.ds(plan.n_old // LINE, plan.W // LINE)]
                plgpu.copy_gmem_to_smem(x_gmem.at[t], new, row_full.at[group])
                if plan.n_old:
                    old = images_smem.at[group, pl.ds(0, plan.n_old // LINE)]
                    plgpu.copy_gmem_to_smem(best_gmem.at[t], old, row_full.at[group])
                    plgpu.copy_gmem_to_smem(positions_gmem.at[t], positions_smem.at[group], row_full.at[group])

            return _

        return lax.fori_loop(0, plan.n_select, one_row, _)

    lax.fori_loop(0, plan.rounds(cta), one_round, None)
    wait_all(row_free, plan.n_select)


def select(
    plan: Plan,
    group: Array,
    limit_gmem: Ref,
    start_gmem: Ref,
    o_gmem: Ref,
    count_gmem: Ref,
    o_images_gmem: Ref = None,
    *,
    images_smem: Ref,
    positions_smem: Ref,
    scratch_smem: Ref,
    row_full: Ref,
    row_free: Ref,
) -> None:
    cta = lax.axis_index("cta")
    start = start_gmem[0]
    plgpu.barrier_arrive(row_free.at[group])

    def one_round(turn, _):
        t = plan.row(cta, turn, group)

        def _choose(limit):
            n_new = jnp.clip(limit - start, 0, plan.W)
            step = select_rows.COLUMNS
            n_columns = plan.n_old + (n_new + step - 1) // step * step
            if plan.interpret:
                columns = jnp.arange(plan.width, dtype=jnp.int32)
                images = jnp.where(columns < n_columns, images_smem[group].reshape(-1), INVISIBLE)
                old = positions_smem[group].reshape(-1)[jnp.minimum(columns, max(plan.n_old, LINE) - 1)]
                positions = jnp.where(columns < plan.n_old, old, start + columns - plan.n_old)
                cut = select_rows.cut_reference(images, plan.k)
                select_rows.compact_reference(images, positions, cut, plan.k, t, o_gmem, count_gmem, o_images_gmem)
                return
            cut = select_rows.cut_of(images_smem, group, plan.width, n_columns, plan.k, scratch_smem, group)
            position = select_rows.merged_positions(plan.n_old) if plan.n_old else select_rows.own_positions()
            select_rows.compact(
                images_smem,
                group,
                plan.width,
                n_columns,
                cut,
                plan.k,
                scratch_smem,
                group,
                positions_smem,
                group,
                max(plan.n_old, LINE),
                start,
                position,
                t,
                o_gmem,
                count_gmem,
                o_images_gmem,
            )

        @pl.when(t < plan.T)
        def _one_row():
            limit = limit_gmem[t]
            plgpu.barrier_wait(row_full.at[group])
            if plan.n_old:
                _choose(limit)
            else:
                pl.when(limit <= plan.k)(lambda: select_rows.write_prefix(o_gmem, count_gmem, t, limit, plan.interpret))
                pl.when(limit > plan.k)(lambda: _choose(limit))
            release(plan, row_free.at[group])

        return _

    lax.fori_loop(0, plan.rounds(cta), one_round, None)
