"""`refine` of so few queries that a multiprocessor has one at most: in one kernel their scores and the exact top-k.
    I[t, s] = k_scale[s] * sum_h w[t, h] * relu(q[t, h] . k[s]), s in the blocks of t;   o[t] = the k best s, ascending

`refine` selects with a warp-group of its own while the others score the next query. Here no query is next. So those
that have scored select, by the passes of `topk_few`. Where CTAs are left two share a query: a cluster, whose sort keys
meet in the shared memory of the first. Fewer queries are split into more parts, and have two kernels, scores and
`topk_few`: of one query these took 3.4 and 5.0 us, a cluster of eight CTAs 9.1, and larger clusters of many queries do
not all run at once.

Floor, 128 queries of 64 blocks of 128 on an H200: 138 MB, 32 us at the 4.3 TB/s of copies. It takes 40.4 to 41.4.
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

_FEWEST = 33  # fewer of short lists were not measured
_WIDEST = 8192  # 16 sort keys a thread of four warp-groups, 32 of two: all of one block


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(refine_stage.Config):
    """Tile sizes and warp-groups, and `n_ctas` that share a query: they change the speed, never the result."""

    n_ctas: int = 1
    n_sort_keys: int = 0  # those of a query are in what they are selected from

    def width(self, m: int, block_size: int) -> int:
        """Columns of a query: each CTA has whole laps of its ring."""
        step = self.n_ctas * self.columns
        return -(-m * block_size // step) * step

    def row(self, width: int, k: int, *, is_full: bool = False) -> Shape:
        """What `n_score` warp-groups select from."""
        n_threads = 128 * self.n_score
        each = next(n for n in (8, 16, 32) if n * n_threads >= width)
        kind = {"has_forced": False, "is_full": is_full, "is_there": True}
        return Shape(width=width, k=k, each=each, n_threads=n_threads, **kind)


def heuristic(
    T: int, H: int, D: int, m: int, block_size: int, itemsize: int, topk: int, n_sms: int, page_size: int | None = None
) -> Config | None:
    """A CTA a query, or two where that is all there are; None where more share one, or where this kernel has no room.

    Of 128 / 64 / 32 requests, 64 blocks of 128, a whole decoding step takes 65.3 / 42.2 / 30.5 us so. By `refine` 128
    take 69.9, by scores of two parts and `topk_few` 64 take 44.7, by scores of four 32 take 27.4.
    """
    config = Config(tile_s=128 if H <= 64 else 64, n_score=4 if H <= 64 else 2, ring=4)
    n_ctas = refine_stage.split(T, m, block_size, config, n_sms)
    if not _FEWEST <= T <= n_sms or n_ctas > 2:
        return None
    config = dataclasses.replace(config, n_ctas=n_ctas)
    width = config.width(m, block_size)
    if width > _WIDEST:
        return None
    n_bytes = config.smem_bytes(H, D, width // n_ctas // block_size, block_size, itemsize, page_size)
    return config if n_bytes + config.row(width, topk).smem_bytes <= SMEM_BYTES else None


@functools.partial(jax.jit, static_argnames=("k_top", "config", "interpret"))
def refine_few(
    operands: Operands, kept: KeptBlocks, *, k_top: int, config: Config, interpret: Interpret = False
) -> tuple[Array, Array]:
    """As `refine`: keys [S, D] -> [T, k_top] int32 positions, ascending, then -1; [T] int32 count."""
    (T, m), n_ctas = kept.ids.shape, config.n_ctas
    # Of a query that sees k_top tokens or fewer all blocks are kept, if so many tokens can be.
    is_full = k_top <= m * kept.size
    parts = refine_stage.parts_of(kept, n_ctas, config)
    part = refine_stage.plan_of(operands, parts, None, config, T * n_ctas, interpret)
    part = dataclasses.replace(part, keeps_all=k_top if is_full else 0)
    part = refine_stage.with_lists(part, kept, parts, operands.pages, has_all_tiles=False)
    width = n_ctas * part.width
    plan = FewPlan(part=part, row=config.row(width, k_top, is_full=is_full), n_ctas=n_ctas)
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
    )(refine_stage.inputs_of(operands, kept if part.lists else parts, part), kept.ids)[0]
    return out.positions, out.count
