"""One step of a streaming top-k over a tile of which only what beats the best so far was written.
    best, positions = the k best of `best` and of the x[t, c] whose bit in `masks` is set, in order of position

The scores kernel has compared every sort key with the k-th best of its query (see its `threshold`): of a tile of s
columns after n others about k * s / n pass, whatever the data if it comes in no order. They are gathered into a list
after the old ones, and 9 passes of the search go over some 4000 sort keys instead of 16,384. Nothing rests on how
many pass: a full list is cut down to k and filled again.

Floor, 4096 rows of 13,824 with 2048 kept on an H200: best in and out 67 MB, masks 7 MB / 4.3 TB/s = 0.017 ms.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental.pallas import mosaic_gpu as plgpu

from hisa_jax.kernels_pallas.mosaic_gpu.merge_body import Plan, merge_body
from hisa_jax.kernels_pallas.mosaic_gpu.ptx.gather_survivors import ROUND
from hisa_jax.kernels_pallas.mosaic_gpu.ptx.select_row import COLUMNS, SCRATCH_WORDS
from hisa_jax.kernels_pallas.mosaic_gpu.topk_body import LINE
from hisa_jax.kernels_pallas.types import Interpret, Ref

SMEM_BYTES = 227 * 1024


@functools.partial(jax.jit, static_argnames=("n_ctas", "interpret"))
def merge(
    best: Array,
    positions: Array,
    x: Array,
    masks: Array,
    start: Array,
    limit: Array,
    *,
    n_ctas: int = 132,
    interpret: Interpret = False,
) -> tuple[Array, Array]:
    """[T, k], [T, k], [T, W], [T, W // 32], [1], [T] int32 -> the new [T, k] best and positions.

    Args:
        best: sort keys of the best so far, `INVISIBLE` in empty slots; k is a multiple of 512.
        positions: theirs, ascending, -1 in empty slots.
        x, masks: of the tile, from `scores.scores` with `threshold`; what no bit stands for is never read.
        start: the position of the tile's first column, beyond all `positions`.
        limit: candidates of the whole row: columns at or beyond limit - start are none.
    """
    (T, W), k = x.shape, best.shape[1]
    if k % COLUMNS:
        raise ValueError(f"merge: best is [{T}, {k}], wanted a multiple of {COLUMNS} columns")
    capacity = k + ROUND
    n_select = max(min((SMEM_BYTES - 4096) // (8 * capacity + 4 * SCRATCH_WORDS), 6), 1)
    plan = Plan(T=T, W=W, k=k, capacity=capacity, n_select=n_select, n_ctas=min(n_ctas, T), interpret=interpret)
    lists = plgpu.SMEM((n_select, capacity // LINE, LINE), jnp.int32)
    scratch: dict[str, Ref] = {
        "sort_keys_smem": lists,
        "positions_smem": lists,
        "scratch_smem": plgpu.SMEM((n_select, SCRATCH_WORDS), jnp.int32),
        "row_full": plgpu.Barrier(num_arrivals=2, num_barriers=n_select),
        "row_free": plgpu.Barrier(num_arrivals=1, num_barriers=n_select),
    }
    row = jax.ShapeDtypeStruct((T, k), jnp.int32)
    best, positions, _ = plgpu.kernel(
        functools.partial(merge_body, plan),
        out_type=[row, row, jax.ShapeDtypeStruct((T,), jnp.int32)],
        grid=(plan.n_ctas,),
        grid_names=("cta",),
        num_threads=n_select + 1,
        thread_name="warpgroup",
        scratch_types=scratch,
        kernel_name="hisa_merge",
        interpret=interpret,
    )(limit, start, x, masks, best.reshape(T, -1, LINE), positions.reshape(T, -1, LINE))
    return best, positions
