"""Device code of `refine_few`: a query's CTAs score, and the first of them selects."""

import dataclasses

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu

from hisa_jax.kernels_pallas.mosaic_gpu.ptx import select_few, select_row
from hisa_jax.kernels_pallas.mosaic_gpu.ptx.cluster_text import CLUSTER_SYNC
from hisa_jax.kernels_pallas.mosaic_gpu.ptx.inline import Row
from hisa_jax.kernels_pallas.mosaic_gpu.ptx.lanes import LANES, N_LANES
from hisa_jax.kernels_pallas.mosaic_gpu.ptx.threshold_text import Shape
from hisa_jax.kernels_pallas.mosaic_gpu.refine_body import Inputs, Plan, Smem, Store, load_keys, score
from hisa_jax.kernels_pallas.mosaic_gpu.topk_body import Outputs
from hisa_jax.kernels_pallas.sort_key import INVISIBLE
from hisa_jax.kernels_pallas.types import Ref


@dataclasses.dataclass(frozen=True, kw_only=True)
class FewPlan:
    """The static numbers of a launch: `part`, of what a CTA scores, and of what the first of a query selects from."""

    part: Plan
    row: Shape
    n_ctas: int  # of a query


def refine_few_body(plan: FewPlan, gmem: Inputs, ids_gmem: Ref, out: Outputs, smem: Smem) -> None:
    # Of a cluster each CTA:   loader  ->  ring of tiles  ->  n_score warp-groups
    #                        (1 warp)                                 |  sort keys
    #                                                                 v
    # The first of them:       o, count  <-  the same warp-groups  <-  row of the query
    #
    # A CTA has a part of one query's blocks. Its sort keys go to the shared memory of the first CTA, which goes on
    # when all are there. A CTA may have a query by itself.
    part, role = plan.part, lax.axis_index("warpgroup")
    rank = lax.axis_index("part") if plan.n_ctas > 1 else jnp.int32(0)
    cta = lax.axis_index("query") * plan.n_ctas + rank

    def store(_t: Array, first: Array, sort_keys: Array) -> None:
        column, options = rank * part.width + first, {"n_ctas": plan.n_ctas, "interpret": bool(part.interpret)}
        select_few.store(plan.row, smem.row, column, part.tile_s, sort_keys, **options)

    @pl.when(role < part.n_score)
    def _score() -> None:
        score(part, cta, role, smem, store)
        _hide_rest(part, cta, role, smem, store)
        plgpu.barrier_arrive(smem.scored)
        plgpu.barrier_wait(smem.scored)
        if plan.n_ctas > 1:
            _cluster_sync()
        pl.when(rank == 0)(lambda: _select(plan, role, ids_gmem, out, smem))

    @pl.when(role == part.n_score)
    def _load() -> None:
        load_keys(part, cta, gmem, smem)
        if plan.n_ctas > 1:
            _cluster_sync()


def _hide_rest(part: Plan, cta: Array, group: Array, smem: Smem, store: Store) -> None:
    """Nothing is chosen of tiles that a query has no blocks for."""
    nothing = jnp.full((part.tile_s if part.interpret else N_LANES,), INVISIBLE, jnp.int32)
    if not part.interpret:
        nothing = plgpu.layout_cast(nothing, LANES)

    def one_tile(turn: Array, _: None) -> None:
        store(cta, (turn * part.n_score + group) * part.tile_s, nothing)

    n_tiles = smem.meta[0, part.m]
    lax.fori_loop(n_tiles // part.n_score, part.width // part.tile_s // part.n_score, one_tile, None)


def _cluster_sync() -> None:
    """What any thread of the cluster has stored before is there for all after."""

    @plgpu.inline_mgpu()
    def sync(_ctx):
        utils.inline_ptx(CLUSTER_SYNC, has_side_effects=True, convergent=True)

    sync()


def _select(plan: FewPlan, role: Array, ids_gmem: Ref, out: Outputs, smem: Smem) -> None:
    query, size, visible = lax.axis_index("query"), plan.part.block_size, smem.meta[0, plan.part.m + 1]
    output = select_row.Output(query, *out)
    if not plan.part.interpret:
        ids = Row(ids_gmem, query, ids_gmem.shape[1])
        select_few.choose(plan.row, None, visible, ids, size, smem.row, output)
        return

    @pl.when(role == 0)
    def _reference() -> None:
        columns = jnp.arange(plan.row.width, dtype=jnp.int32)
        ids = ids_gmem[query]
        positions = ids[jnp.minimum(columns // size, len(ids) - 1)] * size + columns % size
        sort_keys = smem.row[pl.ds(0, plan.row.width)]
        has_no_scores = plan.row.is_full & (visible <= plan.row.k)
        sort_keys = jnp.where(has_no_scores, jnp.where(columns < visible, 0, INVISIBLE), sort_keys)
        select_row.choose_reference(sort_keys, positions, output)
