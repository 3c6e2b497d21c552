"""`refine` of queries so few that a multiprocessor has one at most: in one kernel their scores and the exact top-k.
    I[t, s] = k_scale[s] * sum_h w[t, h] * relu(q[t, h] . k[s]), s in the blocks of t;   o[t] = the k best s, ascending

`refine` selects with a warp-group of its own while the others score the next query. Here no query is next. So those
that have scored select, by the passes of `topk_few`, and where CTAs are left several share a query: a cluster, whose
sort keys meet in the shared memory of the first. That saves a launch, and sort keys their way through memory.

Floor, 128 queries of 64 blocks of 128 on an H200: 138 MB, 32 us at the 4.3 TB/s of copies. One query: launch, a wait
for its lists, one for its keys, and the passes of the selection, 5 to 6 us.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental.pallas import mosaic_gpu as plgpu

from hisa_jax.kernels_pallas.mosaic_gpu import refine as refine_stage
from hisa_jax.kernels_pallas.mosaic_gpu.ptx.threshold_text import Shape
from hisa_jax.kernels_pallas.mosaic_gpu.refine_few_body import FewPlan, refine_few_body
from hisa_jax.kernels_pallas.mosaic_gpu.topk_body import Outputs
from hisa_jax.kernels_pallas.mosaic_gpu.warpgroups import SMEM_BYTES
from hisa_jax.kernels_pallas.operands import KeptBlocks, Operands
from hisa_jax.kernels_pallas.types import Interpret

_CLUSTERED = 128  # CTAs in clusters of 8, 4 or 2 that surely run at once


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(refine_stage.Config):
    """Tile sizes and warp-groups, and `n_ctas` that share a query: they change the speed, never the result."""

    n_ctas: int = 1
    n_sort_keys: int = 0  # those of a query are in what they are selected from

    def width(self, m: int, block_size: int) -> int:
        """Columns of a query: each CTA has whole laps of its ring."""
        step = self.n_ctas * self.columns
        return -(-m * block_size // step) * step

    def row(self, width: int, k: int) -> Shape:
        """What `n_score` warp-groups select from."""
        n_threads = 128 * self.n_score
        each = next(n for n in (8, 16, 32) if n * n_threads >= width)
        return Shape(width=width, k=k, each=each, n_threads=n_threads, has_forced=False, is_there=True)


def heuristic(
    T: int, H: int, D: int, m: int, block_size: int, itemsize: int, topk: int, n_sms: int, page_size: int | None = None
) -> Config | None:
    """As many CTAs a query as there are, up to 8, or None where `refine` and `topk_few` are for these shapes."""
    if n_sms < T:
        return None
    tile_s, n_score = (128, 4) if H <= 64 else (64, 2)
    # A thread has 16 of four warp-groups' columns or 32 of two's, all in one block.
    most, each = 8192, 8192 // (128 * n_score)
    for n_ctas in (8, 4, 2, 1):
        # With eight CTAs of 8192 columns each has one lap: all its keys are asked for at once.
        for ring in (8, 4) if n_ctas == 8 else (4,):
            config = Config(tile_s=tile_s, n_score=n_score, ring=ring, n_ctas=n_ctas)
            width = config.width(m, block_size)
            is_one_wave = n_ctas == 1 or n_ctas * T <= min(_CLUSTERED, n_sms)
            has_all_work = m * block_size > (n_ctas - 1) * config.columns
            if not is_one_wave or not has_all_work or width > most or block_size < each:
                continue
            n_bytes = config.smem_bytes(H, D, width // n_ctas // block_size, block_size, itemsize, page_size)
            if n_bytes + config.row(width, topk).smem_bytes <= SMEM_BYTES:
                return config
    return None


@functools.partial(jax.jit, static_argnames=("k_top", "config", "interpret"))
def refine_few(
    operands: Operands, kept: KeptBlocks, *, k_top: int, config: Config, interpret: Interpret = False
) -> tuple[Array, Array]:
    """As `refine`: keys [S, D] -> [T, k_top] int32 positions, ascending, then -1; [T] int32 count."""
    T, m = kept.ids.shape
    n_ctas, width = config.n_ctas, config.width(m, kept.size)
    own = width // n_ctas // kept.size
    first = own * jnp.arange(n_ctas, dtype=jnp.int32)
    # To its CTA a part is a query by itself, with its share of the blocks.
    parts = dataclasses.replace(
        kept,
        ids=jnp.pad(kept.ids, ((0, 0), (0, n_ctas * own - m)), constant_values=-1).reshape(T * n_ctas, own),
        visible=jnp.repeat(kept.visible, n_ctas),
        first=jnp.repeat(kept.first, n_ctas),
        count=jnp.clip(kept.n_real[:, None] - first, 0, own).reshape(-1),
    )
    part = refine_stage.plan_of(operands, parts, None, config, T * n_ctas, interpret)
    plan = FewPlan(part=part, row=config.row(width, k_top), n_ctas=n_ctas)
    smem = refine_stage.smem_of(part)._replace(
        row=plgpu.SMEM((plan.row.smem_bytes // 4,), jnp.int32), scored=plgpu.Barrier(num_arrivals=part.n_score)
    )
    chosen, count = jax.ShapeDtypeStruct((T, k_top), jnp.int32), jax.ShapeDtypeStruct((T,), jnp.int32)
    out = plgpu.kernel(
        functools.partial(refine_few_body, plan),
        out_type=[Outputs(chosen, count, None)],
        grid=(T,),
        grid_names=("query",),
        cluster=(n_ctas,) if n_ctas > 1 else (),
        cluster_names=("part",) if n_ctas > 1 else (),
        num_threads=part.n_score + 1,
        thread_name="warpgroup",
        scratch_types=[smem],
        kernel_name="hisa_refine",
        interpret=interpret,
    )(refine_stage.inputs_of(operands, parts, part), kept.ids)[0]
    return out.positions, out.count
