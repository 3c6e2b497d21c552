"""Device code of `refine_tokens`: the loader that gathers; all other roles are those of refine_body.py."""

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from hisa_jax.kernels_pallas.mosaic_gpu.ptx import gather_rows as gather
from hisa_jax.kernels_pallas.mosaic_gpu.ptx.gather_rows import BARRIER_WORDS, ROWS_PER_WARP, TileRows
from hisa_jax.kernels_pallas.mosaic_gpu.ptx.inline import Row
from hisa_jax.kernels_pallas.mosaic_gpu.refine_body import META, Inputs, Plan, Smem, copy_query, score, select
from hisa_jax.kernels_pallas.mosaic_gpu.topk_body import Outputs
from hisa_jax.kernels_pallas.mosaic_gpu.warpgroups import LOADER_REGISTERS, wait_all

# Tiles whose parts of the list are read before those before them are copied: lists come from device memory, which takes
# as long as four tiles. Not one part a tile: to hand it on in a register would be to wait for it.
AHEAD = 4


def refine_tokens_body(plan: Plan, gmem: Inputs, out: Outputs, smem: Smem) -> None:
    #               2 queries   ring of tiles                              1 or 2 rows
    #   loader  ->   q_full      landed  ->  n_score warp-groups  ->  sort_keys_full  ->  selector  ->  out
    #   (4 warps)    q_free  <-  k_free  <-  in turns, a tile each <-  sort_keys_free  <-
    #
    # As `refine_body`, but keys come row by row: each warp of the loader copies a quarter of a tile, and the copies
    # themselves arrive at the barrier `landed` of its slot. A query's list stays in device memory, where the loader
    # reads it some tiles ahead and the selector looks up what it has chosen.
    #
    # In interpret mode, which cannot run PTX, `load_interpreted` loads and `k_full` stands for `landed`.
    role, cta = lax.axis_index("warpgroup"), lax.axis_index("cta")

    def wait(slot: Array, lap: Array) -> None:
        if plan.interpret:
            plgpu.barrier_wait(smem.k_full.at[slot])
        else:
            gather.wait_landed(Row(smem.landed, slot, BARRIER_WORDS), lap)

    load = load_interpreted if plan.interpret else load_tokens
    pl.when(role < plan.n_score)(lambda: score(plan, cta, role, smem, wait=wait))
    pl.when(role == plan.n_score)(lambda: load(plan, cta, gmem, smem))
    pl.when(role == plan.n_score + 1)(lambda: select(plan, cta, gmem.tokens, out, smem))


def load_tokens(plan: Plan, cta: Array, gmem: Inputs, smem: Smem) -> None:
    """Each warp brings a quarter of the rows of each tile; the first one brings the queries, too."""
    plgpu.set_max_registers(LOADER_REGISTERS, action="decrease")
    listed = gmem.tokens if gmem.rows is None else gmem.rows
    gather.init_landed(smem.landed, (4 * ROWS_PER_WARP,) * plan.ring)
    plgpu.barrier_arrive(smem.ready)

    def one_warp(warp: Array) -> None:
        first = warp * ROWS_PER_WARP
        plgpu.barrier_wait(smem.ready)

        def meta_of(t: Array) -> tuple[Array, Array]:
            """Tiles and first row, from device memory: a warp that waited for copies could be overtaken by two."""
            at = jnp.minimum(t, plan.T - 1) * (plan.m + META) + plan.m
            return gather.load_word(gmem.meta, at), gather.load_word(gmem.meta, at + 2)

        def one_query(i, meta):
            t, query_slot, (n_tiles, first_row) = cta + i * plan.n_ctas, i % 2, meta

            @pl.when(warp == 0)
            def _query():
                plgpu.barrier_wait(smem.q_free.at[query_slot])
                copy_query(plan, gmem, smem, t, query_slot)

            following = meta_of(t + plan.n_ctas)
            fetch = lambda j: gather.load_lane_word(listed, t, j * plan.tile_s + first)  # noqa: E731

            def one_tile(j: Array, word: Array) -> None:
                slot = j % plan.ring
                row = word if gmem.rows is not None else jnp.where(word >= 0, first_row + word, -1)
                plgpu.barrier_wait(smem.k_free.at[slot])
                if gmem.k_scale is not None:
                    gather.gather_scales(gmem.k_scale, row, Row(smem.scale, slot, plan.tile_s), first)
                landed = Row(smem.landed, slot, BARRIER_WORDS)
                gather.gather_rows(gmem.k, row, TileRows(smem.k, slot, first), ((0, plan.D),), landed)

            def some_tiles(i, words):
                ahead = tuple(fetch((i + 1) * AHEAD + u) for u in range(AHEAD))
                for u, word in enumerate(words):
                    one_tile(i * AHEAD + u, word)
                return ahead

            lax.fori_loop(0, n_tiles // AHEAD, some_tiles, tuple(fetch(jnp.int32(u)) for u in range(AHEAD)))
            return following

        lax.fori_loop(0, plan.queries(cta), one_query, meta_of(cta))

        @pl.when(warp == 0)
        def _end():
            wait_all(smem.q_free, 2)

        wait_all(smem.k_free, plan.ring)

    plgpu.warp_map(one_warp)


def load_interpreted(plan: Plan, cta: Array, gmem: Inputs, smem: Smem) -> None:
    """`load_tokens` in jnp, for interpret mode, which cannot run PTX."""

    def one_query(i, _):
        t, query_slot = cta + i * plan.n_ctas, i % 2
        plgpu.barrier_wait(smem.q_free.at[query_slot])
        copy_query(plan, gmem, smem, t, query_slot)
        plgpu.barrier_wait(smem.q_full.at[query_slot])
        n_tiles, first_row = smem.meta[query_slot, plan.m], smem.meta[query_slot, plan.m + 2]
        tokens, keys = (gmem.tokens if gmem.rows is None else gmem.rows)[t], gmem.k[...]

        def one_tile(j, _):
            slot = j % plan.ring
            word = lax.dynamic_slice(tokens, (j * plan.tile_s,), (plan.tile_s,))
            row = jnp.where(word >= 0, word + (first_row if gmem.rows is None else 0), 0)
            plgpu.barrier_wait(smem.k_free.at[slot])
            smem.k[slot] = jnp.where((word >= 0)[:, None], keys[row], 0).astype(plan.dtype)
            if gmem.k_scale is not None:
                smem.scale[slot] = jnp.where(word >= 0, gmem.k_scale[...][row], 0)
            plgpu.commit_smem()
            plgpu.barrier_arrive(smem.k_full.at[slot])
            return _

        lax.fori_loop(0, n_tiles, one_tile, None)
        plgpu.commit_smem()  # `meta` was read, and a later copy overwrites it
        return _

    lax.fori_loop(0, plan.queries(cta), one_query, None)
    wait_all(smem.k_free, plan.ring)
    wait_all(smem.q_free, 2)
