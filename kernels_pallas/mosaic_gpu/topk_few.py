"""Exact top-k of a few rows of sort keys, ascending: after the scores of few queries, of tokens or of block means.
    o[t] = the columns (or the tokens they stand for) of the k largest x[t, :limit[t]], in column order, then -1

Floor, one row of 8192 on an H200: 32 KB from L2 are 1 us of waiting, and as much is the launch. See ptx/select_few.py.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from hisa_jax.kernels_pallas.mosaic_gpu.ptx import select_few, select_row
from hisa_jax.kernels_pallas.mosaic_gpu.ptx.select_few_text import Shape
from hisa_jax.kernels_pallas.operands import KeptBlocks
from hisa_jax.kernels_pallas.sort_key import INVISIBLE
from hisa_jax.kernels_pallas.types import Interpret, Ref

MAX_WIDTH = 16384  # 16 sort keys and their bins a thread of 1024, which has 64 registers


@functools.partial(jax.jit, static_argnames=("k", "is_full", "has_forced", "interpret"))
def topk(
    x: Array,
    limit: Array,
    k: int,
    kept: KeptBlocks | None = None,
    *,
    is_full: bool = False,
    has_forced: bool = True,
    interpret: Interpret = False,
) -> tuple[Array, Array]:
    """[T, W] int32 sort keys, [T] int32 -> [T, k] int32, [T] int32 count.

    Args:
        x: W is a multiple of 4.
        limit: columns from here on are no candidates, whatever they hold.
        kept: column c is then token kept.ids[c // size] * size + c % size of the sequence.
        is_full: all columns before the limit are candidates, and of k at most no sort key is looked at.
        has_forced: whether some sort keys may be `FORCED`.
    """
    T, W = x.shape
    if W % 4 or W > MAX_WIDTH:
        raise ValueError(f"topk: x has rows of {W} sort keys, wanted a multiple of 4 up to {MAX_WIDTH}")
    shape = dataclasses.replace(select_few.shape_of(W, k), is_full=is_full, has_forced=has_forced)
    ids, size = (None, 1) if kept is None else (kept.ids, kept.size)
    columns, count = plgpu.kernel(
        functools.partial(_body, shape, size, interpret),
        out_type=[jax.ShapeDtypeStruct((T, k), jnp.int32), jax.ShapeDtypeStruct((T,), jnp.int32)],
        grid=(T,),
        grid_names=("row",),
        num_threads=1 if interpret else shape.n_threads // 128,
        thread_name="warpgroup",
        scratch_types=[plgpu.SMEM((shape.smem_bytes // 4,), jnp.int32)],
        kernel_name="hisa_topk",
        interpret=interpret,
    )(limit, ids, x)
    return columns, count


def _body(
    shape: Shape,
    block_size: int,
    interpret: Interpret,
    limit_gmem: Ref,
    ids_gmem: Ref | None,
    x_gmem: Ref,
    o_gmem: Ref,
    count_gmem: Ref,
    smem: Ref,
) -> None:
    # One CTA, one row:   sort keys -> registers -> range -> bins -> the bin of the threshold -> threshold -> o, count
    t = lax.axis_index("row")
    out, limit = select_row.Output(t, o_gmem, count_gmem), limit_gmem[t]
    if not interpret:
        select_few.choose(shape, x_gmem, limit, ids_gmem, block_size, smem, out)
        return
    columns = jnp.arange(shape.width, dtype=jnp.int32)
    positions = columns
    if ids_gmem is not None:
        ids = ids_gmem[t]
        positions = ids[jnp.minimum(columns // block_size, ids.shape[0] - 1)] * block_size + columns % block_size
    sort_keys = jnp.where(shape.is_full & (limit <= shape.k), 0, x_gmem[t])
    select_row.choose_reference(jnp.where(columns < limit, sort_keys, INVISIBLE), positions, out)
