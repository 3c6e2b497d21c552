"""Token scores in the kept blocks of each query, and the exact top-k of them: the whole second stage in one kernel.
    I[t, s] = k_scale[s] * sum_h w[t, h] * relu(q[t, h] . k[s]), s in the blocks of t;   o[t] = the k best s, ascending

Floor, 4096 queries of dsv32, m = 64, H200: tensor cores 550 GFLOP / 1979 TFLOP/s = 0.28 ms; shared memory 0.42 ms (a
tile of 128 keys is written once and read once, the query's heads twice: 48 KB at 128 B a cycle); L2 to the SMs 4.3 GB
= 0.5 to 0.6 ms at the 7 to 8 TB/s it gives. A query's 8192 sort keys (32 KB) stay in shared memory, where a warp-group
of its own selects while the others score the next query, so selection costs no time as long as it takes less than
scoring.

One CTA an SM, persistent over queries. Warp-groups: `n_score` that score (tiles in turn), one that loads, one that
selects.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike

from hisa_jax.kernels_pallas.mosaic_gpu import refine_body
from hisa_jax.kernels_pallas.mosaic_gpu.ptx.lanes import N_LANES
from hisa_jax.kernels_pallas.mosaic_gpu.ptx.list_blocks import Kept, Lists
from hisa_jax.kernels_pallas.mosaic_gpu.ptx.select_row import COLUMNS, SCRATCH_WORDS
from hisa_jax.kernels_pallas.mosaic_gpu.refine_body import META, WORDS_A_COPY, Inputs, Plan, Smem
from hisa_jax.kernels_pallas.mosaic_gpu.warpgroups import RESERVED_BYTES, SMEM_BYTES
from hisa_jax.kernels_pallas.operands import KeptBlocks, Operands
from hisa_jax.kernels_pallas.pages import Pages
from hisa_jax.kernels_pallas.triton import refine as triton_refine
from hisa_jax.kernels_pallas.types import Interpret, Ref


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Tile sizes and warp-groups: they change the speed, never the result."""

    tile_s: int = 128  # keys a tile
    n_score: int = 4  # warp-groups that score
    ring: int = 8  # tiles in flight, a multiple of n_score: a warp-group must meet every phase of its slots
    n_sort_keys: int = 2  # queries whose sort keys are in shared memory at a time

    def __post_init__(self):
        if self.ring % self.n_score:
            raise ValueError(f"Config(ring={self.ring}): must be a multiple of n_score = {self.n_score}")

    @property
    def columns(self) -> int:
        """Candidates a query are padded to a multiple of this: whole laps of the ring, whole steps of the selection."""
        return max(self.tile_s * self.ring, COLUMNS)

    def smem_bytes(self, H: int, D: int, m: int, block_size: int, itemsize: int, page_size: int | None = None) -> int:
        """Shared memory of a CTA, barriers and alignment included."""
        width = -(-m * block_size // self.columns) * self.columns
        tiles = self.ring * self.tile_s * (D * itemsize + 4)
        words = m + META + 32 + (0 if page_size is None else _n_listed(m * block_size // page_size))
        others = 4 * (2 * words + self.n_sort_keys * width + self.n_score * N_LANES)
        return tiles + 2 * H * (D * itemsize + 4) + others + RESERVED_BYTES


def why_not(H: int, D: int, block_size: int, dtype: DTypeLike, page_size: int | None = None) -> str | None:
    """None, or why this kernel cannot run a shape."""
    if reason := triton_refine.why_not(H, D, block_size, dtype):
        return reason
    if page_size is not None and page_size < 32:  # whose scales would be copied to less than 128 bytes
        return f"needs pages of 32 tokens or more, not {page_size}"
    return None


def heuristic(H: int, D: int, m: int, block_size: int, itemsize: int, page_size: int | None = None) -> Config | None:
    """Sort keys of two queries if they fit, else of one, else None. Eight tiles in flight take 0.74 ms, four 0.69.

    Of 128 queries, one a CTA, both take 44 us: four tiles are enough for memory, too.
    """
    # 64 accumulators a thread, and with 128 heads also 32 weights, which leaves room for two warp-groups alone.
    tile_s, n_score = (128, 4) if H <= 64 else (64, 2)
    for n_sort_keys in (2, 1):
        config = Config(tile_s=tile_s, n_score=n_score, ring=4, n_sort_keys=n_sort_keys)
        if config.smem_bytes(H, D, m, block_size, itemsize, page_size) <= SMEM_BYTES:
            return config
    return None


def split(T: int, m: int, block_size: int, config: Config, n_ctas: int) -> int:
    """In how many parts to score each query, so that few queries keep every CTA busy; 1: `refine` is faster."""
    laps = -(-m * block_size // config.columns)
    return next(n for n in range(max(min(n_ctas // T, laps), 1), 0, -1) if laps % n == 0)


@functools.partial(jax.jit, static_argnames=("k_top", "config", "n_ctas", "interpret"))
def refine(
    operands: Operands, kept: KeptBlocks, *, k_top: int, config: Config, n_ctas: int = 132, interpret: Interpret = False
) -> tuple[Array, Array]:
    """Keys [S, D] -> [T, k_top] int32 positions, ascending, then -1; [T] int32 count.

    Args:
        operands: each sequence begins at a multiple of `kept.size` rows; S is one too.
        n_ctas: how many persistent CTAs; the SMs of the device.
    """
    T = operands.q.shape[0]
    plan = plan_of(operands, kept, k_top, config, min(n_ctas, T), interpret)
    out_type = [jax.ShapeDtypeStruct((T, k_top), jnp.int32), jax.ShapeDtypeStruct((T,), jnp.int32)]
    indices, count = _launch(refine_body.refine_body, plan, out_type, inputs_of(operands, kept, plan))
    return indices, count


@functools.partial(jax.jit, static_argnames=("config", "n_parts", "n_ctas", "interpret"))
def refine_scores(
    operands: Operands,
    kept: KeptBlocks,
    *,
    config: Config,
    n_parts: int = 1,
    n_ctas: int = 132,
    interpret: Interpret = False,
) -> Array:
    """The sort keys alone, [T, m * kept.size, padded] int32: for few queries, and lists too long for shared memory.

    Args:
        n_parts: CTAs that share a query, each with that part of its blocks (see `split`). If 1, columns beyond the kept
            blocks of a query are not written, otherwise they are `INVISIBLE`.
    """
    T = len(kept.ids)
    parts = dataclasses.replace(parts_of(kept, n_parts, config), count=None) if n_parts > 1 else kept
    plan = plan_of(operands, parts, None, config, min(n_ctas, T * n_parts), interpret)
    if n_parts > 1:
        plan = with_lists(plan, kept, parts, operands.pages, has_all_tiles=True)
    out_type = [jax.ShapeDtypeStruct((plan.T, plan.width), jnp.int32)]
    inputs = inputs_of(operands, kept if plan.lists else parts, plan)
    return _launch(refine_body.refine_scores_body, plan, out_type, inputs)[0].reshape(T, -1)


def parts_of(kept: KeptBlocks, n_parts: int, config: Config) -> KeptBlocks:
    """To a kernel a part is a query by itself, with its share of the blocks; all have as many columns."""
    (T, m), step = kept.ids.shape, n_parts * config.columns
    own = -(-m * kept.size // step) * config.columns // kept.size
    first = own * jnp.arange(n_parts, dtype=jnp.int32)
    return dataclasses.replace(
        kept,
        ids=jnp.pad(kept.ids, ((0, 0), (0, n_parts * own - m)), constant_values=-1).reshape(T * n_parts, own),
        visible=jnp.repeat(kept.visible, n_parts),
        first=jnp.repeat(kept.first, n_parts),
        sequence=None,
        count=jnp.clip(kept.n_real[:, None] - first, 0, own).reshape(-1),
    )


def with_lists(plan: Plan, kept: KeptBlocks, parts: KeptBlocks, pages: Pages | None, *, has_all_tiles: bool) -> Plan:
    """The same plan of parts, whose loader makes their lists of the queries' own: no kernel of XLA before this one.

    In interpret mode, which cannot run PTX, they stay arrays.
    """
    if plan.interpret:
        return plan
    lists = Lists(
        n_ids=kept.ids.shape[1],
        n_own=parts.ids.shape[1],
        m=plan.m,
        block_size=plan.block_size,
        tile_s=plan.tile_s,
        columns=plan.columns,
        n_tiles=plan.width // plan.tile_s if has_all_tiles else None,
        keeps_all=plan.keeps_all,
        n_sequences=None if kept.sequence is None else kept.n_sequences,
        apart=kept.apart,
    )
    if pages is not None:
        of_pages = dict(per_block=kept.size // pages.size, n_table=pages.table.shape[0], n_pages=pages.n_pages)
        lists = dataclasses.replace(lists, n_listed=plan.n_listed, **of_pages)
    return dataclasses.replace(plan, lists=lists)


def meta_of(kept: KeptBlocks, plan: Plan) -> Array:
    """[T, m + META] int32: what a CTA must know about a query, in one copy."""
    if plan.n_parts > 1 and kept.count is None:
        n_tiles = jnp.full_like(kept.visible, plan.width // plan.tile_s)
    else:
        n_tiles = (kept.n_real * plan.block_size + plan.columns - 1) // plan.columns * (plan.columns // plan.tile_s)
        n_tiles = jnp.where(kept.visible <= plan.keeps_all, 0, n_tiles)
    block_ids = jnp.pad(kept.ids, ((0, 0), (0, plan.m - kept.ids.shape[1])), constant_values=-1)
    tail = jnp.stack([n_tiles, kept.visible, kept.first, jnp.zeros_like(kept.visible)], axis=1)
    return jnp.concatenate([block_ids, tail], axis=1)


def pages_of(kept: KeptBlocks, pages: Pages) -> Array:
    """[T, n_listed] int32, the pages of each query's blocks in order."""
    listed = pages.of_blocks(kept.first[:, None] + jnp.maximum(kept.ids, 0), kept.size)
    return jnp.pad(listed, ((0, 0), (0, _n_listed(listed.shape[1]) - listed.shape[1])))


def _n_listed(n: int) -> int:
    """Whole copies of page numbers."""
    unit = 32 if n <= WORDS_A_COPY else WORDS_A_COPY
    return -(-n // unit) * unit


def plan_of(
    operands: Operands, kept: KeptBlocks, k_top: int | None, config: Config, n_ctas: int, interpret: Interpret
) -> Plan:
    q, _, k, k_scale, pages = operands
    (n_queries, H, D), (T, m) = q.shape, kept.ids.shape
    return Plan(
        T=T,
        n_parts=T // n_queries,
        H=H,
        D=D,
        m=-(-(m + META) // 32) * 32 - META,
        dtype=k.dtype,
        has_scale=k_scale is not None,
        k_top=k_top,
        keeps_all=k_top or 0,
        block_size=kept.size,
        tile_s=config.tile_s,
        n_score=config.n_score,
        columns=config.columns,
        ring=config.ring,
        n_sort_keys=config.n_sort_keys,
        width=-(-m * kept.size // config.columns) * config.columns,
        n_ctas=n_ctas,
        interpret=interpret,
        page_size=None if pages is None else pages.size,
        n_listed=0 if pages is None else _n_listed(m * (kept.size // pages.size)),
    )


def inputs_of(operands: Operands, kept: KeptBlocks, plan: Plan) -> Inputs:
    """Of the parts' lists, or of the queries' if the plan makes them."""
    q, w, k, k_scale, pages = operands
    if plan.lists is not None:
        table = None if pages is None else pages.table
        first = kept.first if kept.sequence is None else jnp.asarray(kept.sequence)
        return Inputs(Kept(kept.ids, kept.visible, first, table), q, w, k, k_scale)
    meta = meta_of(kept, plan)
    if pages is not None:
        # One array, so that one kernel of XLA makes it.
        meta = jnp.concatenate([meta, pages_of(kept, pages)], axis=1)
    return Inputs(meta, q, w, k, k_scale)


def _launch(body: Ref, plan: Plan, out_type: list, inputs: Inputs) -> list[Array]:
    return plgpu.kernel(
        functools.partial(body, plan),
        out_type=out_type,
        grid=(plan.n_ctas,),
        grid_names=("cta",),
        num_threads=plan.n_score + 1 + plan.selects,
        thread_name="warpgroup",
        scratch_types=[smem_of(plan)],
        kernel_name="hisa_refine",
        interpret=plan.interpret,
    )(inputs)


def smem_of(plan: Plan) -> Smem:
    barrier, smem, tile = plgpu.Barrier, plgpu.SMEM, plan.tile_transforms
    arrivals = 1 if plan.gathers else plan.n_copies * (1 + plan.has_scale)
    buffers = Smem(
        k_free=barrier(num_arrivals=1, num_barriers=plan.ring),
        k_full=barrier(num_arrivals=arrivals, num_barriers=plan.ring),
        k=smem((plan.ring, plan.tile_s, plan.D), plan.dtype, transforms=tile),
        meta=smem((2, plan.m + META), jnp.int32),
        pages=None if plan.page_size is None else smem((2, plan.n_listed), jnp.int32),
        pin=smem((plan.n_score, N_LANES), jnp.float32) if plan.has_scale else None,
        q_free=barrier(num_arrivals=plan.n_score + plan.selects, num_barriers=2),
        q_full=barrier(num_arrivals=2 + plan.n_list_copies, num_barriers=2),
        q=smem((2, plan.H, plan.D), plan.dtype, transforms=tile),
        scale=smem((plan.ring, plan.tile_s), jnp.float32) if plan.has_scale else None,
        w=smem((2, max(plan.H, 32)), jnp.float32),  # copies go to multiples of 128 bytes
    )
    if not plan.selects:
        return buffers
    return buffers._replace(
        counts=smem((1, SCRATCH_WORDS), jnp.int32),
        sort_keys_free=barrier(num_arrivals=1, num_barriers=plan.n_sort_keys),
        sort_keys_full=barrier(num_arrivals=plan.n_score, num_barriers=plan.n_sort_keys),
        sort_keys=smem((plan.n_sort_keys, plan.width), jnp.int32),
    )
