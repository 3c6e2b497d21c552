"""Device code of `topk`: one warp-group copies rows in, the others select, each from a row of its own."""

import dataclasses

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from hisa_jax.kernels_pallas.mosaic_gpu.ptx import select_row as select_rows
from hisa_jax.kernels_pallas.mosaic_gpu.warpgroups import release, wait_all
from hisa_jax.kernels_pallas.sort_key import INVISIBLE
from hisa_jax.kernels_pallas.types import Ref

LINE = 128


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """The static numbers of a launch."""

    T: int
    W: int
    k: int
    n_select: int
    n_ctas: int
    interpret: object

    def rounds(self, cta: Array) -> Array:
        """Rows of a CTA are cta, cta + n_ctas, ..., dealt to its warp-groups in turn; the last round may be ragged."""
        n_rows = (self.T - cta + self.n_ctas - 1) // self.n_ctas
        return (n_rows + self.n_select - 1) // self.n_select

    def row(self, cta: Array, turn: Array, group: Ref) -> Array:
        return cta + (turn * self.n_select + group) * self.n_ctas


def topk_body(plan: Plan, limit_gmem: Ref, x_gmem: Ref, *out_gmem: Ref, **scratch: Ref) -> None:
    role = lax.axis_index("warpgroup")
    pl.when(role < plan.n_select)(lambda: select(plan, role, limit_gmem, *out_gmem, **scratch))
    pl.when(role == plan.n_select)(lambda: load(plan, x_gmem, **scratch))


def load(plan: Plan, x_gmem: Ref, *, sort_keys_smem: Ref, row_full: Ref, row_free: Ref, **_: Ref) -> None:
    cta = lax.axis_index("cta")

    def one_round(turn, _):
        def one_row(group, _):
            t = plan.row(cta, turn, group)

            @pl.when(t < plan.T)
            def _copy():
                plgpu.barrier_wait(row_free.at[group])
                plgpu.copy_gmem_to_smem(x_gmem.at[t], sort_keys_smem.at[group], row_full.at[group])

            return _

        return lax.fori_loop(0, plan.n_select, one_row, _)

    lax.fori_loop(0, plan.rounds(cta), one_round, None)
    wait_all(row_free, plan.n_select)


def select(
    plan: Plan,
    group: Array,
    limit_gmem: Ref,
    o_gmem: Ref,
    count_gmem: Ref,
    o_sort_keys_gmem: Ref = None,
    *,
    sort_keys_smem: Ref,
    scratch_smem: Ref,
    row_full: Ref,
    row_free: Ref,
) -> None:
    cta, step = lax.axis_index("cta"), select_rows.COLUMNS
    plgpu.barrier_arrive(row_free.at[group])

    def one_round(turn, _):
        t = plan.row(cta, turn, group)

        def _choose(limit):
            n_columns = (jnp.minimum(limit, plan.W) + step - 1) // step * step
            if plan.interpret:
                columns = jnp.arange(plan.W, dtype=jnp.int32)
                sort_keys = jnp.where(columns < n_columns, sort_keys_smem[group].reshape(-1), INVISIBLE)
                threshold = select_rows.threshold_reference(sort_keys, plan.k)
                select_rows.compact_reference(
                    sort_keys, columns, threshold, plan.k, t, o_gmem, count_gmem, o_sort_keys_gmem
                )
                return
            row = (sort_keys_smem, group, plan.W, n_columns)
            threshold = select_rows.threshold_of(*row, plan.k, scratch_smem, group)
            # The columns themselves are written: no ids are looked up.
            ids = (scratch_smem, group, select_rows.SCRATCH_WORDS, select_rows.own_positions())
            select_rows.compact(
                *row, threshold, plan.k, scratch_smem, group, *ids, t, o_gmem, count_gmem, o_sort_keys_gmem
            )

        @pl.when(t < plan.T)
        def _one_row():
            limit = limit_gmem[t]
            plgpu.barrier_wait(row_full.at[group])
            # Where all are chosen there is nothing to search for, unless their sort keys are wanted, too.
            keeps_all = (limit <= plan.k) & (o_sort_keys_gmem is None)
            pl.when(keeps_all)(lambda: select_rows.write_prefix(o_gmem, count_gmem, t, limit, plan.interpret))
            pl.when(~keeps_all)(lambda: _choose(limit))
            release(plan, row_free.at[group])

        return _

    lax.fori_loop(0, plan.rounds(cta), one_round, None)
