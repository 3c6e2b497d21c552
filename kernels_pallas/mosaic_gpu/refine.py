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
from hisa_jax.kernels_pallas.mosaic_gpu.ptx.select_row import COLUMNS, SCRATCH_WORDS
from hisa_jax.kernels_pallas.mosaic_gpu.refine_body import META, PAGES_A_COPY, Plan
from hisa_jax.kernels_pallas.pages import Pages
from hisa_jax.kernels_pallas.types import Interpret, Ref

SMEM_BYTES = 227 * 1024


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Tile sizes and warp-groups: they change the speed, never the result."""

    rows: int = 128  # keys a tile
    n_score: int = 4  # warp-groups that score
    ring: int = 8  # tiles in flight, a multiple of n_score: a warp-group must meet every phase of its slots
    n_sort_keys: int = 2  # queries whose sort keys are in shared memory at a time

    def __post_init__(self):
        if self.ring % self.n_score:
            raise ValueError(f"Config(ring={self.ring}): must be a multiple of n_score = {self.n_score}")

    @property
    def columns(self) -> int:
        """Candidates a query are padded to a multiple of this: whole laps of the ring, whole steps of the selection."""
        return max(self.rows * self.ring, COLUMNS)

    def smem_bytes(self, H: int, D: int, m: int, block_size: int, itemsize: int, page_size: int | None = None) -> int:
        """Shared memory of a CTA, barriers and alignment included."""
        width = -(-m * block_size // self.columns) * self.columns
        tiles = self.ring * self.rows * (D * itemsize + 4)
        words = m + META + 32 + (0 if page_size is None else _n_listed(m * block_size // page_size))
        return tiles + 2 * H * (D * itemsize + 4) + 2 * 4 * words + self.n_sort_keys * 4 * width + 4096


def why_not(H: int, D: int, m: int, block_size: int, dtype: DTypeLike, page_size: int | None = None) -> str | None:
    """None, or why this kernel cannot run a shape."""
    if jnp.dtype(dtype) not in (jnp.dtype(jnp.float8_e4m3fn), jnp.dtype(jnp.bfloat16)):
        return f"needs float8_e4m3fn or bfloat16 keys and queries, not {jnp.dtype(dtype).name}"
    if H not in (16, 32, 64, 128) or D not in (64, 128):
        return f"needs 16, 32, 64 or 128 heads of size 64 or 128, not {H} of {D}"
    if block_size not in (32, 64, 128, 256):
        return f"needs blocks of 32, 64, 128 or 256 tokens, not {block_size}"
    if page_size is not None and page_size < 32:  # whose scales would be copied to less than 128 bytes
        return f"needs pages of 32 tokens or more, not {page_size}"
    return None


def heuristic(H: int, D: int, m: int, block_size: int, itemsize: int, page_size: int | None = None) -> Config | None:
    """Sort keys of two queries if they fit, else of one, else None. Eight tiles in flight take 0.74 ms, four 0.69."""
    # 64 accumulators a thread, and with 128 heads also 32 weights, which leaves room for two warp-groups alone.
    rows, n_score = (128, 4) if H <= 64 else (64, 2)
    for n_sort_keys in (2, 1):
        config = Config(rows=rows, n_score=n_score, ring=4, n_sort_keys=n_sort_keys)
        if config.smem_bytes(H, D, m, block_size, itemsize, page_size) <= SMEM_BYTES:
            return config
    return None


def split(T: int, m: int, block_size: int, config: Config, n_ctas: int) -> int:
    """In how many parts to score each query, so that few queries keep every CTA busy; 1: `refine` is faster."""
    laps = -(-m * block_size // config.columns)
    return next(n for n in range(max(min(n_ctas // T, laps), 1), 0, -1) if laps % n == 0)


@functools.partial(jax.jit, static_argnames=("k_top", "block_size", "config", "n_ctas", "interpret"))
def refine(
    q: Array,
    w: Array,
    k: Array,
    k_scale: Array | None,
    block_ids: Array,
    visible: Array,
    first_block: Array,
    pages: Pages | None = None,
    *,
    k_top: int,
    block_size: int,
    config: Config,
    n_ctas: int = 132,
    interpret: Interpret = False,
) -> tuple[Array, Array]:
    """[T, H, D], [T, H], [S, D], [S], [T, m], [T], [T] -> [T, k_top] int32, [T] int32.

    Args:
        k: keys of all sequences, each beginning at a multiple of `block_size` rows; S is one too.
        block_ids: blocks each query keeps, ascending, then -1.
        visible: tokens of its sequence that each query sees.
        first_block: row of k where the query's sequence begins, in blocks.
        pages: where the rows of all sequences are in k, if not one behind the other.
        n_ctas: how many persistent CTAs; the SMs of the device.
    """
    T = q.shape[0]
    places = pages_of(block_ids, first_block, block_size, pages)
    plan = Plan.of(q, k, k_scale, block_ids, k_top, block_size, config, min(n_ctas, T), interpret, places, pages)
    meta = meta_of(block_ids, visible, first_block, k_top, plan)
    operands = [meta, *places, q, w, k] + ([] if k_scale is None else [k_scale])
    out_type = [jax.ShapeDtypeStruct((T, k_top), jnp.int32), jax.ShapeDtypeStruct((T,), jnp.int32)]
    indices, count = _launch(refine_body.refine_body, plan, out_type, operands)
    return indices, count


@functools.partial(jax.jit, static_argnames=("block_size", "config", "n_parts", "n_ctas", "interpret"))
def refine_scores(
    q: Array,
    w: Array,
    k: Array,
    k_scale: Array | None,
    block_ids: Array,
    visible: Array,
    first_block: Array,
    pages: Pages | None = None,
    *,
    block_size: int,
    config: Config,
    n_parts: int = 1,
    n_ctas: int = 132,
    interpret: Interpret = False,
) -> Array:
    """The sort keys alone, [T, m * block_size, padded] int32: for few queries, and lists too long for shared memory.

    Args:
        n_parts: CTAs that share a query, each with that part of its blocks (see `split`). If 1, columns beyond the kept
            blocks of a query are not written, otherwise they are `INVISIBLE`.
    """
    (T, m), step = block_ids.shape, n_parts * config.columns
    missing = (-m * block_size % step) // block_size if n_parts > 1 else 0
    block_ids = jnp.pad(block_ids, ((0, 0), (0, missing)), constant_values=-1).reshape(T * n_parts, -1)
    visible, first_block = jnp.repeat(visible, n_parts), jnp.repeat(first_block, n_parts)
    places, n_ctas = pages_of(block_ids, first_block, block_size, pages), min(n_ctas, T * n_parts)
    plan = Plan.of(q, k, k_scale, block_ids, None, block_size, config, n_ctas, interpret, places, pages)
    meta = meta_of(block_ids, visible, first_block, 0, plan)
    operands = [meta, *places, q, w, k] + ([] if k_scale is None else [k_scale])
    out_type = [jax.ShapeDtypeStruct((plan.T, plan.width), jnp.int32)]
    return _launch(refine_body.refine_scores_body, plan, out_type, operands)[0].reshape(T, -1)


def meta_of(block_ids: Array, visible: Array, first_block: Array, k_top: int, plan: Plan) -> Array:
    """[T, m + META] int32: what a CTA must know about a query, in one copy."""
    m = block_ids.shape[1]
    if plan.n_parts > 1:
        n_tiles = jnp.full_like(visible, plan.width // plan.rows)
    else:
        n_kept = jnp.sum(block_ids >= 0, axis=1, dtype=jnp.int32)
        n_tiles = (n_kept * plan.block_size + plan.columns - 1) // plan.columns * (plan.columns // plan.rows)
        # A query that keeps all it sees needs no scores.
        n_tiles = jnp.where(visible <= k_top, 0, n_tiles)
    block_ids = jnp.pad(block_ids, ((0, 0), (0, plan.m - m)), constant_values=-1)
    tail = jnp.stack([n_tiles, visible, first_block, jnp.zeros_like(visible)], axis=1)
    return jnp.concatenate([block_ids, tail], axis=1)


def pages_of(block_ids: Array, first_block: Array, block_size: int, pages: Pages | None) -> list[Array]:
    """[T, m] blocks -> a list of [T, n_listed] int32, the pages of each query's blocks in order; of nothing without."""
    if pages is None:
        return []
    places = pages.of_blocks(first_block[:, None] + jnp.maximum(block_ids, 0), block_size)
    return [jnp.pad(places, ((0, 0), (0, _n_listed(places.shape[1]) - places.shape[1])))]


def _n_listed(n: int) -> int:
    """Whole copies of page numbers."""
    unit = 32 if n <= PAGES_A_COPY else PAGES_A_COPY
    return -(-n // unit) * unit


def _launch(body: Ref, plan: Plan, out_type: list, operands: list) -> list[Array]:
    tile = plan.tile_transforms
    barrier = plgpu.Barrier
    scratch: dict[str, Ref] = {
        "meta_smem": plgpu.SMEM((2, plan.m + META), jnp.int32),
        "q_smem": plgpu.SMEM((2, plan.H, plan.D), plan.dtype, transforms=tile),
        "w_smem": plgpu.SMEM((2, max(plan.H, 32)), jnp.float32),  # copies go to multiples of 128 bytes
        "k_smem": plgpu.SMEM((plan.ring, plan.rows, plan.D), plan.dtype, transforms=tile),
        "q_full": barrier(num_arrivals=3 + plan.n_page_copies, num_barriers=2),
        "q_free": barrier(num_arrivals=plan.n_score + plan.selects, num_barriers=2),
        "k_full": barrier(num_arrivals=plan.n_copies * (1 + plan.has_scale), num_barriers=plan.ring),
        "k_free": barrier(num_arrivals=1, num_barriers=plan.ring),
    }
    if plan.has_scale:
        scratch["scale_smem"] = plgpu.SMEM((plan.ring, plan.rows), jnp.float32)
    if plan.page_size is not None:
        scratch["pages_smem"] = plgpu.SMEM((2, plan.n_listed), jnp.int32)
    if plan.selects:
        scratch["sort_keys_smem"] = plgpu.SMEM((plan.n_sort_keys, plan.width), jnp.int32)
        scratch["counts_smem"] = plgpu.SMEM((1, SCRATCH_WORDS), jnp.int32)
        scratch["sort_keys_full"] = barrier(num_arrivals=plan.n_score, num_barriers=plan.n_sort_keys)
        scratch["sort_keys_free"] = barrier(num_arrivals=1, num_barriers=plan.n_sort_keys)
    return plgpu.kernel(
        functools.partial(body, plan),
        out_type=out_type,
        grid=(plan.n_ctas,),
        grid_names=("cta",),
        num_threads=plan.n_score + 1 + plan.selects,
        thread_name="warpgroup",
        scratch_types=scratch,
        kernel_name="hisa_refine",
        interpret=plan.interpret,
    )(*operands)
