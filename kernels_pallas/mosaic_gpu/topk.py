"""Exact top-k of rows of score images, ascending: after the block filter's scores and in the streaming flat indexer.
    o[t] = the columns of the k largest x[t, :limit[t]], in column order, then -1

Floor, 4096 rows of 8192 on an H200: HBM 134 MB / 4.3 TB/s = 0.03 ms. Counting is what takes the time: about 9 passes
over a row, 2 instructions an image, 37,000 cycles of the four schedulers for the 31 rows of an SM = 0.02 ms, and as
much again for the ordered output. A CTA holds as many rows in shared memory as fit, a warp-group each, so that one
row's waits are another's work; one more warp-group copies rows in.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.mosaic_gpu.rows import COLUMNS, SCRATCH_WORDS
from kernels_pallas.mosaic_gpu.topk_body import LINE, Plan, topk_body
from kernels_pallas.types import Interpret, Ref

SMEM_BYTES = 227 * 1024
MAX_WIDTH = 32768


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Launch sizes: they change the speed, never the result."""

    n_select: int = 6  # rows, and warp-groups that select


def heuristic(width: int, n_old: int = 0) -> Config:
    """As many rows as fit. More than 6 warp-groups leave each fewer registers than the search needs."""
    row_bytes = 4 * (width + 2 * n_old + SCRATCH_WORDS)
    return Config(n_select=max(min((SMEM_BYTES - 4096) // row_bytes, 6), 1))


def why_not(width: int) -> str | None:
    """None, or why rows of this many candidates cannot be selected from in one piece."""
    return None if width <= MAX_WIDTH else f"needs at most {MAX_WIDTH} candidates a row, not {width}"


@functools.partial(jax.jit, static_argnames=("k", "config", "n_ctas", "interpret"))
def topk(
    x: Array, limit: Array, k: int, *, config: Config | None = None, n_ctas: int = 132, interpret: Interpret = False
) -> tuple[Array, Array]:
    """[T, W] int32 images, [T] int32 -> [T, k] int32, [T] int32 count.

    Args:
        x: W is a multiple of 512; images at columns limit[t] .. the next multiple of 512 are `INVISIBLE`, those beyond
            are never read.
    """
    T, W = x.shape
    plan = _plan(T, W, k, 0, config, n_ctas, interpret)
    columns, count = _launch(plan, [limit, jnp.zeros((1,), jnp.int32), _lines(x)])
    return columns, count


@functools.partial(jax.jit, static_argnames=("config", "n_ctas", "interpret"))
def merge_topk(
    best: Array,
    positions: Array,
    x: Array,
    start: Array,
    limit: Array,
    *,
    config: Config | None = None,
    n_ctas: int = 132,
    interpret: Interpret = False,
) -> tuple[Array, Array]:
    """One step of a streaming top-k: the k best of `best` and of a new tile of candidates.

    Args:
        best: [T, k] int32 images of the best so far, `INVISIBLE` in empty slots; `positions`: [T, k], ascending; k is a
            multiple of 512.
        x: [T, W] int32 images of the tile, as in `topk`.
        start: [1] int32, the position of the tile's first column, beyond all `positions`.
        limit: [T] int32, candidates of the whole row: columns at or beyond limit - start are none.

    Returns: the new `best` and `positions`; empty slots hold `INVISIBLE` and -1.
    """
    (T, W), k = x.shape, best.shape[1]
    plan = _plan(T, W, k, k, config, n_ctas, interpret)
    positions, _, best = _launch(plan, [limit, start, _lines(x), _lines(best), _lines(positions)])
    return best, positions


def _plan(T: int, W: int, k: int, n_old: int, config: Config | None, n_ctas: int, interpret: Interpret) -> Plan:
    config = config or heuristic(W + n_old, n_old)
    if W % COLUMNS or n_old % COLUMNS:
        raise ValueError(f"topk: rows of {W} and {n_old} images, wanted multiples of {COLUMNS}")
    return Plan(T=T, W=W, k=k, n_old=n_old, n_select=config.n_select, n_ctas=min(n_ctas, T), interpret=interpret)


def _lines(x: Array) -> Array:
    """[T, W] -> [T, W // LINE, LINE]: a copy takes at most 256 elements an axis."""
    return x.reshape(x.shape[0], -1, LINE)


def _launch(plan: Plan, operands: list) -> list[Array]:
    merges = plan.n_old > 0
    scratch: dict[str, Ref] = {
        "images_smem": plgpu.SMEM((plan.n_select, plan.width // LINE, LINE), jnp.int32),
        # Where nothing is merged, positions are columns and this is not read.
        "positions_smem": plgpu.SMEM((plan.n_select, max(plan.n_old, LINE) // LINE, LINE), jnp.int32),
        "scratch_smem": plgpu.SMEM((plan.n_select, SCRATCH_WORDS), jnp.int32),
        "row_full": plgpu.Barrier(num_arrivals=3 if merges else 1, num_barriers=plan.n_select),
        "row_free": plgpu.Barrier(num_arrivals=1, num_barriers=plan.n_select),
    }
    row = jax.ShapeDtypeStruct((plan.T, plan.k), jnp.int32)
    out_type = [row, jax.ShapeDtypeStruct((plan.T,), jnp.int32)] + ([row] if merges else [])
    return plgpu.kernel(
        functools.partial(topk_body, plan),
        out_type=out_type,
        grid=(plan.n_ctas,),
        grid_names=("cta",),
        num_threads=plan.n_select + 1,
        thread_name="warpgroup",
        scratch_types=scratch,
        kernel_name="hisa_topk",
        interpret=plan.interpret,
    )(*operands)
