"""Exact top-k of rows of sort keys, ascending: after the block filter's scores, and of the first tile of `flat`.
    o[t] = the columns of the k largest x[t, :limit[t]], in column order, then -1

Floor, 4096 rows of 8192 on an H200: HBM 134 MB / 4.3 TB/s = 0.03 ms. Counting is what takes the time: about 9 passes
over a row, 2 instructions a sort key, 37,000 cycles of the four schedulers for the 31 rows of an SM = 0.02 ms, and as
much again for the ordered output. A CTA holds as many rows in shared memory as fit, a warp-group each, so that one
row's waits are another's work; one more warp-group copies rows in.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental.pallas import mosaic_gpu as plgpu

from hisa_jax.kernels_pallas.mosaic_gpu.ptx.select_row import COLUMNS, SCRATCH_WORDS
from hisa_jax.kernels_pallas.mosaic_gpu.topk_body import LINE, Outputs, Plan, Smem, topk_body
from hisa_jax.kernels_pallas.mosaic_gpu.warpgroups import RESERVED_BYTES, SMEM_BYTES
from hisa_jax.kernels_pallas.types import Interpret

MAX_WIDTH = 32768


def rows_at_a_time(width: int) -> int:
    """As many as fit in shared memory. More than 6 warp-groups leave each fewer registers than the search needs."""
    row_bytes = 4 * (width + SCRATCH_WORDS)
    return max(min((SMEM_BYTES - RESERVED_BYTES) // row_bytes, 6), 1)


def why_not(width: int) -> str | None:
    """None, or why rows of this many candidates cannot be selected from in one piece."""
    return None if width <= MAX_WIDTH else f"needs at most {MAX_WIDTH} candidates a row, not {width}"


def topk(x: Array, limit: Array, k: int, *, n_ctas: int = 132, interpret: Interpret = False) -> tuple[Array, Array]:
    """[T, W] int32 sort keys, [T] int32 -> [T, k] int32, [T] int32 count.

    Args:
        x: W is a multiple of 512; sort keys at columns limit[t] .. the next multiple of 512 are `INVISIBLE`, those
            beyond are never read.
    """
    columns, count, _ = _launch(x, limit, k, False, n_ctas, interpret)
    return columns, count


def topk_with_sort_keys(
    x: Array, limit: Array, k: int, *, n_ctas: int = 132, interpret: Interpret = False
) -> tuple[Array, Array, Array, Array]:
    """`topk` with the [T, k] sort keys of what it chose, and [T] `least`: see `select_row.Output`."""
    columns, count, sort_keys, least = _launch(x, limit, k, True, n_ctas, interpret)
    return columns, count, sort_keys, least


@functools.partial(jax.jit, static_argnames=("k", "with_sort_keys", "n_ctas", "interpret"))
def _launch(x: Array, limit: Array, k: int, with_sort_keys: bool, n_ctas: int, interpret: Interpret) -> tuple:
    T, W = x.shape
    if W % COLUMNS:
        raise ValueError(f"topk: x has rows of {W} sort keys, wanted a multiple of {COLUMNS}")
    plan = Plan(T=T, W=W, k=k, n_select=rows_at_a_time(W), n_ctas=min(n_ctas, T), interpret=interpret)
    rows, each = jax.ShapeDtypeStruct((T, k), jnp.int32), jax.ShapeDtypeStruct((T,), jnp.int32)
    out: tuple = Outputs(rows, each, rows if with_sort_keys else None)
    if with_sort_keys:
        out = *out, each  # `least`
    smem = Smem(
        row_free=plgpu.Barrier(num_arrivals=1, num_barriers=plan.n_select),
        row_full=plgpu.Barrier(num_arrivals=1, num_barriers=plan.n_select),
        scratch=plgpu.SMEM((plan.n_select, SCRATCH_WORDS), jnp.int32),
        sort_keys=plgpu.SMEM((plan.n_select, W // LINE, LINE), jnp.int32),
    )
    return plgpu.kernel(
        functools.partial(topk_body, plan),
        out_type=[out],
        grid=(plan.n_ctas,),
        grid_names=("cta",),
        num_threads=plan.n_select + 1,
        thread_name="warpgroup",
        scratch_types=[smem],
        kernel_name="hisa_topk",
        interpret=interpret,
    )(limit, x.reshape(T, -1, LINE))[0]
