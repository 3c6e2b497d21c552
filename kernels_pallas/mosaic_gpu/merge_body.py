"""Device code of `merge`: one warp-group copies the old lists in, the others select, each for a row of its own."""

import dataclasses

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from hisa_jax.kernels_pallas.mosaic_gpu.ptx import select_row as select_rows
from hisa_jax.kernels_pallas.mosaic_gpu.ptx.gather_survivors import gather, reload
from hisa_jax.kernels_pallas.mosaic_gpu.topk_body import LINE
from hisa_jax.kernels_pallas.mosaic_gpu.warpgroups import wait_all
from hisa_jax.kernels_pallas.sort_key import INVISIBLE
from hisa_jax.kernels_pallas.types import Ref


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """The static numbers of a launch."""

    T: int
    W: int
    k: int
    capacity: int  # of a list: the best so far and what a round of gathering may add
    n_select: int
    n_ctas: int
    interpret: object

    def rounds(self, cta: Array) -> Array:
        """Rows of a CTA are cta, cta + n_ctas, ..., dealt to its warp-groups in turn; the last round may be ragged."""
        n_rows = (self.T - cta + self.n_ctas - 1) // self.n_ctas
        return (n_rows + self.n_select - 1) // self.n_select

    def row(self, cta: Array, turn: Array, group: Ref) -> Array:
        return cta + (turn * self.n_select + group) * self.n_ctas


def merge_body(
    plan: Plan,
    limit_gmem: Ref,
    start_gmem: Ref,
    x_gmem: Ref,
    masks_gmem: Ref,
    best_gmem: Ref,
    positions_gmem: Ref,
    *out_gmem: Ref,
    sort_keys_smem: Ref,
    positions_smem: Ref,
    scratch_smem: Ref,
    row_full: Ref,
    row_free: Ref,
) -> None:
    role, cta = lax.axis_index("warpgroup"), lax.axis_index("cta")
    lists = (sort_keys_smem, positions_smem)

    def load() -> None:
        def one_row(i, _):
            turn, group = i // plan.n_select, i % plan.n_select
            t = plan.row(cta, turn, group)

            @pl.when(t < plan.T)
            def _copy():
                plgpu.barrier_wait(row_free.at[group])
                for old_gmem, list_smem in zip((best_gmem, positions_gmem), lists, strict=True):
                    front = list_smem.at[group, pl.ds(0, plan.k // LINE)]
                    plgpu.copy_gmem_to_smem(old_gmem.at[t], front, row_full.at[group])

            return _

        lax.fori_loop(0, plan.rounds(cta) * plan.n_select, one_row, None)
        wait_all(row_free, plan.n_select)

    def select() -> None:
        plgpu.barrier_arrive(row_free.at[role])
        start = start_gmem[0]

        def one_round(turn, _):
            t = plan.row(cta, turn, role)

            @pl.when(t < plan.T)
            def _one_row():
                limit = limit_gmem[t]
                plgpu.barrier_wait(row_full.at[role])
                choose = _choose_reference if plan.interpret else _choose
                choose(plan, role, t, start, limit, x_gmem, masks_gmem, out_gmem, lists, scratch_smem)
                # The list was written by threads, and copies will overwrite it.
                plgpu.commit_smem()
                plgpu.barrier_arrive(row_free.at[role])

            return _

        lax.fori_loop(0, plan.rounds(cta), one_round, None)

    lax.cond(role < plan.n_select, select, load)


def _choose(
    plan: Plan,
    group: Array,
    t: Array,
    start: Array,
    limit: Array,
    x_gmem: Ref,
    masks_gmem: Ref,
    out_gmem: tuple[Ref, ...],
    lists: tuple[Ref, Ref],
    scratch_smem: Ref,
) -> None:
    o_best_gmem, o_positions_gmem, count_gmem = out_gmem
    n_words = jnp.clip((limit - start + 31) // 32, 0, plan.W // 32)
    step, k, capacity = select_rows.COLUMNS, plan.k, plan.capacity

    def one_list(state):
        word, _ = state
        count, word = gather(
            *lists, scratch_smem, group, capacity, masks_gmem, x_gmem, t, word, n_words, jnp.int32(k), start
        )
        n_columns = (count + step - 1) // step * step
        threshold = select_rows.threshold_of(lists[0], group, capacity, n_columns, k, scratch_smem, group)
        select_rows.compact(
            lists[0],
            group,
            capacity,
            n_columns,
            threshold,
            k,
            scratch_smem,
            group,
            lists[1],
            group,
            capacity,
            select_rows.listed_positions(),
            t,
            o_positions_gmem,
            count_gmem,
            o_best_gmem,
        )
        is_full = (word < n_words).astype(jnp.int32)
        pl.when(is_full > 0)(lambda: reload(*lists, group, capacity, o_best_gmem, o_positions_gmem, t))
        return word, is_full

    lax.while_loop(lambda state: state[1] > 0, one_list, (jnp.int32(0), jnp.int32(1)))


def _choose_reference(
    plan: Plan,
    group: Array,
    t: Array,
    start: Array,
    limit: Array,
    x_gmem: Ref,
    masks_gmem: Ref,
    out_gmem: tuple[Ref, ...],
    lists: tuple[Ref, Ref],
    scratch_smem: Ref,
) -> None:
    """`_choose` in jnp, for interpret mode, which cannot run PTX."""
    o_best_gmem, o_positions_gmem, count_gmem = out_gmem
    columns = jnp.arange(plan.W, dtype=jnp.int32)
    passed = (masks_gmem[t][columns // 32] >> (columns % 32)) & 1
    new = jnp.where((passed > 0) & (columns < limit - start), x_gmem[t], INVISIBLE)
    old, old_positions = (x[group].reshape(-1)[: plan.k] for x in lists)
    sort_keys, positions = jnp.concatenate([old, new]), jnp.concatenate([old_positions, start + columns])
    threshold = select_rows.threshold_reference(sort_keys, plan.k)
    select_rows.compact_reference(sort_keys, positions, threshold, plan.k, t, o_positions_gmem, count_gmem, o_best_gmem)
