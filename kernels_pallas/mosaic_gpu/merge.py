"""One step of a streaming top-k over a tile of which only what beats the best so far was written.
    best, positions = the k best of `best` and of the columns whose bit in `masks` is set, in order of position

The scores kernel has compared every sort key with the k-th best of its query (`Columns.threshold`). Where tokens come
in no particular order, about k * s / n of a tile's s columns pass after n others. They are gathered into a list after
the old ones, so the search makes its 9 passes over some 4000 sort keys instead of 16,384. The result does not depend
on how many pass: a full list is reduced to k and filled again.

Floor, 4096 rows of 19,968 with 2048 kept on an H200: best in 67 MB and out 67 MB, masks 10 MB, a sector of each word
of a mask 82 MB / 4.3 TB/s = 0.05 ms. A row waits for its lists, its masks and ten counts, one after the other, so rows
side by side are what hides that: four, since lists of 6144 take 49 KB.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental.pallas import mosaic_gpu as plgpu

from hisa_jax.kernels_pallas.mosaic_gpu.merge_body import Inputs, Outputs, Plan, Smem, merge_body
from hisa_jax.kernels_pallas.mosaic_gpu.ptx.gather_survivors import ROUND
from hisa_jax.kernels_pallas.mosaic_gpu.ptx.select_row import COLUMNS, SCRATCH_WORDS
from hisa_jax.kernels_pallas.mosaic_gpu.topk_body import LINE
from hisa_jax.kernels_pallas.mosaic_gpu.warpgroups import RESERVED_BYTES, SMEM_BYTES
from hisa_jax.kernels_pallas.types import Interpret


class Best(NamedTuple):
    """The best so far: [T, k] sort keys, `INVISIBLE` in empty slots, and positions, ascending, then -1.

    Attributes: [T] `n`, how many; [T] `least`, above which a sort key must be to count: see `select_row.Output`.
    """

    sort_keys: Array
    positions: Array
    n: Array
    least: Array


@functools.partial(jax.jit, static_argnames=("n_ctas", "interpret"))
def merge(
    best: Best,
    tile: tuple[Array, Array],
    start: Array,
    limit: Array,
    *,
    n_ctas: int = 132,
    interpret: Interpret = False,
) -> Best:
    """-> the new best.

    Args:
        best: k is a multiple of 512; sort keys and positions are read.
        tile: [T, W] sort keys and [T, W // 32] masks, from `scores.scores` with a threshold; what no bit stands for is
            never read.
        start: [1] int32, the position of the tile's first column, beyond all positions so far.
        limit: [T] int32, candidates of the whole row: columns at or beyond limit - start are none.
    """
    x, masks = tile
    (T, W), k = x.shape, best.sort_keys.shape[1]
    if k % COLUMNS:
        raise ValueError(f"merge: best is [{T}, {k}], wanted a multiple of {COLUMNS} columns")
    # Less room, so that six rows are there at a time and not four, takes 168 us where this takes 124.
    capacity = k + ROUND
    n_select = max(min((SMEM_BYTES - RESERVED_BYTES) // (8 * capacity + 4 * SCRATCH_WORDS), 6), 1)
    plan = Plan(T=T, W=W, k=k, capacity=capacity, n_select=n_select, n_ctas=min(n_ctas, T), interpret=interpret)
    lists = plgpu.SMEM((n_select, capacity // LINE, LINE), jnp.int32)
    smem = Smem(
        positions=lists,
        row_free=plgpu.Barrier(num_arrivals=1, num_barriers=n_select),
        row_full=plgpu.Barrier(num_arrivals=2, num_barriers=n_select),
        scratch=plgpu.SMEM((n_select, SCRATCH_WORDS), jnp.int32),
        sort_keys=lists,
    )
    rows, each = jax.ShapeDtypeStruct((T, k), jnp.int32), jax.ShapeDtypeStruct((T,), jnp.int32)
    old = best.sort_keys.reshape(T, -1, LINE), best.positions.reshape(T, -1, LINE)
    out: Outputs = plgpu.kernel(
        functools.partial(merge_body, plan),
        out_type=[Outputs(rows, rows, each, each)],
        grid=(plan.n_ctas,),
        grid_names=("cta",),
        num_threads=n_select + 1,
        thread_name="warpgroup",
        scratch_types=[smem],
        kernel_name="hisa_merge",
        interpret=interpret,
    )(Inputs(limit, start, x, masks, *old))[0]
    return Best(*out)
