"""Device code of `topk`: one warp-group copies rows in, the others select, each from a row of its own."""

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from hisa_jax.kernels_pallas.mosaic_gpu.ptx import select_row
from hisa_jax.kernels_pallas.mosaic_gpu.ptx.inline import Row
from hisa_jax.kernels_pallas.mosaic_gpu.warpgroups import release, wait_all
from hisa_jax.kernels_pallas.sort_key import INVISIBLE
from hisa_jax.kernels_pallas.types import Ref

LINE = 128  # a copy takes at most 256 elements an axis, so rows are folded


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
        """Rows of a CTA are cta, cta + n_ctas, ..., and its warp-groups take turns; the last round may be ragged."""
        n_rows = (self.T - cta + self.n_ctas - 1) // self.n_ctas
        return (n_rows + self.n_select - 1) // self.n_select

    def row(self, cta: Array, turn: Array, group: Ref) -> Array:
        """The row that a warp-group takes in a round."""
        return cta + (turn * self.n_select + group) * self.n_ctas


class Outputs(NamedTuple):
    """As `select_row.Output`."""

    positions: Ref  # [T, k]
    count: Ref  # [T]
    sort_keys: Ref | None  # [T, k]


class Smem(NamedTuple):
    """Shared memory of a CTA: a row and its scratch for each warp-group that selects. Barriers are one a row."""

    row_free: Ref  # of the warp-group that selects
    row_full: Ref  # of the row's copy
    scratch: Ref  # [n_select, SCRATCH_WORDS]
    sort_keys: Ref  # [n_select, W / LINE, LINE]


def topk_body(plan: Plan, limit_gmem: Ref, x_gmem: Ref, out: tuple, smem: Smem) -> None:
    #   loader  ->  row_full[g]  ->  warp-group g: range, counts, output  ->  positions, count
    #           <-  row_free[g]  <-
    #
    # Each warp-group has one row in shared memory and works by itself: what hides its waits is the other warp-groups.
    # A row is copied whole, once; the next is copied when the warp-group hands the old one back.
    role = lax.axis_index("warpgroup")
    pl.when(role < plan.n_select)(lambda: select(plan, role, limit_gmem, out, smem))
    pl.when(role == plan.n_select)(lambda: load(plan, x_gmem, smem))


def load(plan: Plan, x_gmem: Ref, smem: Smem) -> None:
    """Copies the rows of all warp-groups, in the order in which they take them."""
    cta = lax.axis_index("cta")

    def one_round(turn, _):
        def one_row(group, _):
            t = plan.row(cta, turn, group)

            @pl.when(t < plan.T)
            def _copy():
                plgpu.barrier_wait(smem.row_free.at[group])
                plgpu.copy_gmem_to_smem(x_gmem.at[t], smem.sort_keys.at[group], smem.row_full.at[group])

            return _

        return lax.fori_loop(0, plan.n_select, one_row, _)

    lax.fori_loop(0, plan.rounds(cta), one_round, None)
    wait_all(smem.row_free, plan.n_select)


def select(plan: Plan, group: Array, limit_gmem: Ref, out: tuple, smem: Smem) -> None:
    """The best of this warp-group's rows."""
    cta, step = lax.axis_index("cta"), select_row.COLUMNS
    plgpu.barrier_arrive(smem.row_free.at[group])

    def one_round(turn, _):
        t = plan.row(cta, turn, group)
        output = select_row.Output(t, *out)

        def _choose(limit):
            # Whole steps of the selection: between the limit and the end of the last one all is `INVISIBLE`.
            n_columns = (jnp.minimum(limit, plan.W) + step - 1) // step * step
            if plan.interpret:
                columns = jnp.arange(plan.W, dtype=jnp.int32)
                sort_keys = jnp.where(columns < n_columns, smem.sort_keys[group].reshape(-1), INVISIBLE)
                select_row.choose_reference(sort_keys, columns, output)
                return
            scratch = Row(smem.scratch, group, select_row.SCRATCH_WORDS)
            row = Row(smem.sort_keys, group, plan.W)
            select_row.choose(row, n_columns, scratch, select_row.own_positions(scratch), output)

        @pl.when(t < plan.T)
        def _one_row():
            limit = limit_gmem[t]
            plgpu.barrier_wait(smem.row_full.at[group])
            # Where all are chosen there is nothing to search for, unless their sort keys are wanted, too.
            keeps_all = (limit <= plan.k) & (output.sort_keys is None)
            pl.when(keeps_all)(lambda: select_row.write_prefix(output, limit, plan.interpret))
            pl.when(~keeps_all)(lambda: _choose(limit))
            release(plan, smem.row_free.at[group])

        return _

    lax.fori_loop(0, plan.rounds(cta), one_round, None)
