"""Exact top-k of a few rows of sort keys, ascending: after the scores of few queries, of tokens or of block means.
    o[t] = the columns (or the tokens they stand for) of the k largest x[t, :limit[t]], in column order, then -1

Floor, one row of 8192 on an H200: 32 KB from L2 are 1 us of waiting, and as much is the launch. See ptx/select_few.py.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from hisa_jax.kernels_pallas.mosaic_gpu.ptx import select_few, select_row
from hisa_jax.kernels_pallas.mosaic_gpu.ptx.inline import Row
from hisa_jax.kernels_pallas.mosaic_gpu.ptx.select_few_text import Shape
from hisa_jax.kernels_pallas.mosaic_gpu.topk_body import Outputs
from hisa_jax.kernels_pallas.operands import KeptBlocks
from hisa_jax.kernels_pallas.sort_key import INVISIBLE
from hisa_jax.kernels_pallas.types import Interpret, Ref

MAX_WIDTH = 16384  # 16 sort keys and their bins a thread of 1024, which has 64 registers


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Plan:
    """The static numbers of a launch."""

    shape: Shape
    n_parts: int  # rows of a query
    per_column: int  # what a limit counts of each column
    block_size: int  # of blocks that columns are of
    interpret: object


def topk(
    x: Array,
    limit: Array | None,
    k: int,
    kept: KeptBlocks | None = None,
    *,
    per_column: int = 1,
    is_full: bool = False,
    has_forced: bool = True,
    interpret: Interpret = False,
) -> tuple[Array, Array]:
    """[T, W] int32 sort keys, [T] int32 -> [T, k] int32, [T] int32 count.

    Args:
        x: W is a multiple of 4.
        limit: columns from limit / per_column on, rounded up, are no candidates, whatever they hold; None: all are.
        kept: column c is then token kept.ids[c // size] * size + c % size of the sequence.
        is_full: all columns before the limit are candidates, and of k at most no sort key is looked at.
        has_forced: whether some sort keys may be `FORCED`.
    """
    ids, size = (None, 1) if kept is None else (kept.ids, kept.size)
    options: dict[str, Any] = dict(is_full=is_full, has_forced=has_forced, block_size=size, interpret=interpret)
    options["per_column"] = per_column
    return _launch(x, limit, ids, k, **options)[:2]


def topk_of_parts(x: Array, limit: Array, k: int, *, part: int, interpret: Interpret = False) -> tuple[Array, Array]:
    """[T, n * part] sort keys, none forced, [T] -> the k best of each part of a row: [T, n * k] columns and sort keys.

    Columns ascend in each part; where there are fewer, -1 and `INVISIBLE`.
    """
    T, W = x.shape
    n = W // part
    options: dict[str, Any] = dict(n_parts=n, has_forced=False, has_sort_keys=True, interpret=interpret)
    columns, _, sort_keys = _launch(x.reshape(T * n, part), limit, None, k, **options)[:3]
    assert sort_keys is not None
    return columns.reshape(T, n * k), sort_keys.reshape(T, n * k)


def topk_of_listed(
    x: Array,
    listed: Array,
    k: int,
    *,
    limit: Array | None = None,
    has_sort_keys: bool = False,
    interpret: Interpret = False,
) -> tuple[Array, Array, Array | None]:
    """[T, W] sort keys, none forced, and what columns stand for -> of the k best [T, k], count [T], sort keys.

    Args:
        limit: [T] int32, columns from here on are no candidates, whatever they hold; None: all are.
    """
    options: dict[str, Any] = dict(is_listed=True, has_forced=False, has_sort_keys=has_sort_keys, interpret=interpret)
    return _launch(x, limit, listed, k, **options)[:3]


@functools.partial(
    jax.jit,
    static_argnames=(
        "k", "n_parts", "per_column", "block_size", "is_full", "is_listed", "has_forced", "has_sort_keys", "interpret",
    ),
)  # fmt: skip
def _launch(
    x: Array,
    limit: Array | None,
    ids: Array | None,
    k: int,
    *,
    n_parts: int = 1,
    per_column: int = 1,
    block_size: int = 1,
    interpret: Interpret,
    **flags: bool,
) -> tuple[Array, Array, Array | None]:
    T, W = x.shape
    if W % 4 or W > MAX_WIDTH:
        raise ValueError(f"topk: x has rows of {W} sort keys, wanted a multiple of 4 up to {MAX_WIDTH}")
    shape = dataclasses.replace(select_few.shape_of(W, k), **flags)
    plan = _Plan(shape=shape, n_parts=n_parts, per_column=per_column, block_size=block_size, interpret=interpret)
    rows, count = jax.ShapeDtypeStruct((T, k), jnp.int32), jax.ShapeDtypeStruct((T,), jnp.int32)
    return plgpu.kernel(
        functools.partial(_body, plan),
        out_type=[Outputs(rows, count, rows if shape.has_sort_keys else None)],
        grid=(T,),
        grid_names=("row",),
        num_threads=1 if interpret else shape.n_threads // 128,
        thread_name="warpgroup",
        scratch_types=[plgpu.SMEM((shape.smem_bytes // 4,), jnp.int32)],
        kernel_name="hisa_topk",
        interpret=interpret,
    )(limit, ids, x)[0]


def _body(plan: _Plan, limit_gmem: Ref | None, ids_gmem: Ref | None, x_gmem: Ref, out: Outputs, smem: Ref) -> None:
    # One CTA, one row:   sort keys -> registers -> range -> bins -> the bin of the threshold -> threshold -> o, count
    #
    # A row may be a part of a query's: its columns are then counted from where the part begins.
    t, shape = lax.axis_index("row"), plan.shape
    query, first = (t, jnp.int32(0)) if plan.n_parts == 1 else (t // plan.n_parts, t % plan.n_parts * shape.width)
    limit = jnp.int32(shape.width) if limit_gmem is None else limit_gmem[query]
    if plan.per_column > 1:
        limit = lax.div(limit + (plan.per_column - 1), jnp.int32(plan.per_column))
    limit, output = limit - first, select_row.Output(t, *out)
    if not plan.interpret:
        ids = None if ids_gmem is None else Row(ids_gmem, t, ids_gmem.shape[1])
        select_few.choose(shape, Row(x_gmem, t, shape.width), limit, first, ids, plan.block_size, smem, output)
        return
    columns = jnp.arange(shape.width, dtype=jnp.int32)
    positions = columns + first
    if ids_gmem is not None:
        ids = ids_gmem[t]
        of_block = jnp.minimum(columns // plan.block_size, ids.shape[0] - 1)
        positions = ids if shape.is_listed else ids[of_block] * plan.block_size + columns % plan.block_size
    sort_keys = jnp.where(shape.is_full & (limit <= shape.k), 0, x_gmem[t])
    select_row.choose_reference(jnp.where(columns < limit, sort_keys, INVISIBLE), positions, output)
