"""Device code of `merge`: one warp-group copies the old lists in, the others select, each for a row of its own."""

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from hisa_jax.kernels_pallas.mosaic_gpu import topk_body
from hisa_jax.kernels_pallas.mosaic_gpu.ptx import select_row
from hisa_jax.kernels_pallas.mosaic_gpu.ptx.gather_survivors import Lists, Tile, gather, reload
from hisa_jax.kernels_pallas.mosaic_gpu.ptx.inline import Row
from hisa_jax.kernels_pallas.mosaic_gpu.topk_body import LINE
from hisa_jax.kernels_pallas.mosaic_gpu.warpgroups import wait_all
from hisa_jax.kernels_pallas.sort_key import INVISIBLE
from hisa_jax.kernels_pallas.types import Ref


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan(topk_body.Plan):
    """The static numbers of a launch."""

    capacity: int  # of a list: the best so far and what a round of gathering may add


class Inputs(NamedTuple):
    """Arrays in device memory, whole."""

    limit: Ref  # [T]
    start: Ref  # [1]
    x: Ref  # [T, W] sort keys of the tile
    masks: Ref  # [T, W / 32]
    best: Ref  # [T, k / LINE, LINE] sort keys
    positions: Ref  # [T, k / LINE, LINE]


class Outputs(NamedTuple):
    """As `select_row.Output`."""

    sort_keys: Ref  # [T, k]
    positions: Ref  # [T, k]
    count: Ref  # [T]
    least: Ref  # [T]


class Smem(NamedTuple):
    """Shared memory of a CTA: two lists, a scratch and a barrier of each kind for each warp-group that selects."""

    positions: Ref  # [n_select, capacity / LINE, LINE]
    row_free: Ref  # of the warp-group that selects
    row_full: Ref  # of the lists' two copies
    scratch: Ref  # [n_select, SCRATCH_WORDS]
    sort_keys: Ref  # [n_select, capacity / LINE, LINE]


def merge_body(plan: Plan, gmem: Inputs, out: Outputs, smem: Smem) -> None:
    #   loader  ->  row_full[g]  ->  warp-group g:  | old list, k | candidates that passed ... |  ->  select k  ->  out
    #           <-  row_free[g]  <-                        ^ reload, if the list was full before the tile was done
    #
    # The loader brings the old lists alone. What the tile adds is scattered, so a warp-group gathers it by itself, the
    # copies of 4096 columns in flight at once; meanwhile the other warp-groups select.
    role, cta = lax.axis_index("warpgroup"), lax.axis_index("cta")

    def load() -> None:
        def one_row(i, _):
            turn, group = i // plan.n_select, i % plan.n_select
            t = plan.row(cta, turn, group)

            @pl.when(t < plan.T)
            def _copy():
                plgpu.barrier_wait(smem.row_free.at[group])
                for old_gmem, list_smem in ((gmem.best, smem.sort_keys), (gmem.positions, smem.positions)):
                    front = list_smem.at[group, pl.ds(0, plan.k // LINE)]
                    plgpu.copy_gmem_to_smem(old_gmem.at[t], front, smem.row_full.at[group])

            return _

        lax.fori_loop(0, plan.rounds(cta) * plan.n_select, one_row, None)
        wait_all(smem.row_free, plan.n_select)

    def select() -> None:
        plgpu.barrier_arrive(smem.row_free.at[role])
        start = gmem.start[0]

        def one_round(turn, _):
            t = plan.row(cta, turn, role)

            @pl.when(t < plan.T)
            def _one_row():
                limit = gmem.limit[t]
                plgpu.barrier_wait(smem.row_full.at[role])
                tile = Tile(gmem.masks, gmem.x, t, jnp.clip((limit - start + 31) // 32, 0, plan.W // 32), start)
                output = select_row.Output(t, out.positions, out.count, out.sort_keys, out.least)
                if plan.interpret:
                    _choose_reference(plan, smem, role, tile, limit, output)
                else:
                    _choose(plan, smem, role, tile, output)
                # The list was written by threads, and copies will overwrite it.
                plgpu.commit_smem()
                plgpu.barrier_arrive(smem.row_free.at[role])

            return _

        lax.fori_loop(0, plan.rounds(cta), one_round, None)

    lax.cond(role < plan.n_select, select, load)


def _choose(plan: Plan, smem: Smem, group: Array, tile: Tile, out: select_row.Output) -> None:
    """Fills the list and selects from it, again and again until nothing of the tile is left."""
    step = select_row.COLUMNS
    lists = Lists(Row(smem.sort_keys, group, plan.capacity), Row(smem.positions, group, plan.capacity))
    scratch = Row(smem.scratch, group, select_row.SCRATCH_WORDS)

    def one_list(state):
        word, _ = state
        # Every list starts with the k best so far, old or reloaded.
        count, word = gather(lists, scratch, tile, word, jnp.int32(plan.k))
        n_columns = (count + step - 1) // step * step
        select_row.choose(lists.sort_keys, n_columns, scratch, select_row.listed_positions(lists.positions), out)
        is_full = (word < tile.n_words).astype(jnp.int32)
        pl.when(is_full > 0)(lambda: reload(lists, out))
        return word, is_full

    lax.while_loop(lambda state: state[1] > 0, one_list, (jnp.int32(0), jnp.int32(1)))


def _choose_reference(plan: Plan, smem: Smem, group: Array, tile: Tile, limit: Array, out: select_row.Output) -> None:
    """`_choose` in jnp, for interpret mode, which cannot run PTX."""
    columns = jnp.arange(plan.W, dtype=jnp.int32)
    words = tile.masks[tile.t][columns // 32]
    passed, before = (words >> (columns % 32)) & 1, lax.population_count(words & ((1 << columns % 32) - 1))
    new = tile.x[tile.t][columns // 32 * 32 + before]
    new = jnp.where((passed > 0) & (columns < limit - tile.start), new, INVISIBLE)
    old, old_positions = (x[group].reshape(-1)[: plan.k] for x in (smem.sort_keys, smem.positions))
    positions = jnp.concatenate([old_positions, tile.start + columns])
    select_row.choose_reference(jnp.concatenate([old, new]), positions, out)
