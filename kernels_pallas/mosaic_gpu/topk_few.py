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
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from hisa_jax.kernels_pallas.mosaic_gpu.ptx import select_few, select_groups, select_row
from hisa_jax.kernels_pallas.mosaic_gpu.ptx.groups_shape import Groups
from hisa_jax.kernels_pallas.mosaic_gpu.ptx.inline import Row
from hisa_jax.kernels_pallas.mosaic_gpu.ptx.threshold_text import Shape
from hisa_jax.kernels_pallas.mosaic_gpu.topk_body import Outputs
from hisa_jax.kernels_pallas.operands import KeptBlocks
from hisa_jax.kernels_pallas.sort_key import INVISIBLE
from hisa_jax.kernels_pallas.types import Interpret, Ref

_CLUSTER = 8  # CTAs that share a row of groups, of 512 threads with 4 groups each
_CTAS = 128  # in clusters, that surely run at once
MAX_WIDTH = 16384  # 16 sort keys and their bins a thread of 1024, which has 64 registers


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Plan:
    """The static numbers of a launch."""

    shape: Shape
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
    return _launch(x, limit, ids, k, per_column=per_column, **options)[:2]


@functools.partial(jax.jit, static_argnames=("k", "size", "width", "per_column", "has_sort_keys", "interpret"))
def topk_by_maxima(
    x: Array,
    maxima: Array,
    k: int,
    *,
    size: int,
    limit: Array,
    width: int,
    per_column: int = 1,
    has_sort_keys: bool = False,
    interpret: Interpret = False,
) -> tuple[Array, Array, Array | None]:
    """[T, W] sort keys, none forced, the greatest of each `size` neighbours -> of the k best [T, k], count, sort keys.

    Of the k best groups by their greatest, the lower of those that tie, the k best are those of the whole row: each
    group has one that is no less than any of other groups, and those that tie with such come before them.

    Args:
        size: 2, 4 or 8.
        limit: [T] int32, columns from limit / per_column on, rounded up, are no candidates, whatever they hold.
        width: groups from here on are not looked at.
    """
    T = len(x)
    of_groups, of_columns = select_few.shape_of(width, k), select_few.shape_of(k * size, k)
    n_ctas = 1 if interpret else _ctas_a_row(T, width)
    n_threads = 512 if n_ctas > 1 else max(of_groups.n_threads, of_columns.n_threads)
    of_groups = dataclasses.replace(of_groups.of_threads(n_threads), has_forced=False)
    of_columns = dataclasses.replace(
        of_columns.of_threads(n_threads), has_forced=False, group=size, has_sort_keys=has_sort_keys
    )
    _check(maxima, width)
    _check(x, k * size)
    options: dict[str, Any] = dict(block_size=1, interpret=interpret)
    plans = (
        _Plan(shape=of_groups, per_column=per_column * size, **options),
        _Plan(shape=of_columns, per_column=per_column, **options),
    )
    rows, count = jax.ShapeDtypeStruct((T, k), jnp.int32), jax.ShapeDtypeStruct((T,), jnp.int32)
    out = Outputs(rows, count, None), Outputs(rows, count, rows if has_sort_keys else None)
    own = dataclasses.replace(of_groups, each=4) if n_ctas > 1 else of_groups
    groups = Groups(maxima=own, size=size, n_ctas=n_ctas, has_sort_keys=has_sort_keys)
    smem_bytes = max(of_groups.smem_bytes, of_columns.smem_bytes, groups.smem_bytes)
    return plgpu.kernel(
        functools.partial(_by_maxima_body, groups, *plans),
        out_type=[out],
        grid=(T,),
        grid_names=("row",),
        cluster=(n_ctas,) if n_ctas > 1 else (),
        cluster_names=("part",) if n_ctas > 1 else (),
        num_threads=1 if interpret else n_threads // 128,
        thread_name="warpgroup",
        scratch_types=[plgpu.SMEM((smem_bytes // 4,), jnp.int32)],
        kernel_name="hisa_topk",
        interpret=interpret,
    )(limit, maxima, x)[0][1]


def _ctas_a_row(T: int, width: int) -> int:
    """A cluster, where all of them run at once and rows are so long that most of its threads have groups."""
    return _CLUSTER if _CLUSTER * T <= _CTAS and 2 * width > MAX_WIDTH else 1


def topk_of_groups(
    x: Array,
    groups: Array,
    k: int,
    *,
    size: int,
    limit: Array,
    per_column: int = 1,
    has_sort_keys: bool = False,
    interpret: Interpret = False,
) -> tuple[Array, Array, Array | None]:
    """[T, W] sort keys, none forced -> of the k best in listed groups of neighbours [T, k], count [T], sort keys.

    Args:
        groups: [T, n] int32, ascending, then -1: group g is columns size * g and after, of which some are candidates.
        size: 2, 4 or 8.
        limit: [T] int32, columns from limit / per_column on, rounded up, are no candidates, whatever they hold.
    """
    options: dict[str, Any] = dict(group=size, has_forced=False, has_sort_keys=has_sort_keys, interpret=interpret)
    return _launch(x, limit, groups, k, per_column=per_column, **options)


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
    return _launch(x, limit, listed, k, **options)


@functools.partial(
    jax.jit,
    static_argnames=(
        *("k", "group", "per_column", "block_size", "interpret"),
        *("is_full", "is_listed", "has_forced", "has_sort_keys"),
    ),
)
def _launch(
    x: Array,
    limit: Array | None,
    ids: Array | None,
    k: int,
    *,
    group: int = 0,
    per_column: int = 1,
    block_size: int = 1,
    interpret: Interpret,
    **flags: bool,
) -> tuple[Array, Array, Array | None]:
    T, W = x.shape
    if group:
        assert ids is not None
        W = group * ids.shape[1]
    _check(x, W)
    shape = dataclasses.replace(select_few.shape_of(W, k), group=group, **flags)
    plan = _Plan(shape=shape, per_column=per_column, block_size=block_size, interpret=interpret)
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


def _check(x: Array, n_columns: int) -> None:
    if x.shape[1] % 4 or n_columns % 4 or n_columns > MAX_WIDTH:
        raise ValueError(f"topk: x has rows of {n_columns} sort keys, wanted a multiple of 4 up to {MAX_WIDTH}")


def _body(plan: _Plan, limit_gmem: Ref | None, ids_gmem: Ref | None, x_gmem: Ref, out: Outputs, smem: Ref) -> None:
    # One CTA, one row:   sort keys -> registers -> range -> bins -> the bin of the threshold -> threshold -> o, count
    #
    # Groups of a longer row are loaded in the order of their list.
    limit = jnp.int32(plan.shape.width) if limit_gmem is None else limit_gmem[lax.axis_index("row")]
    _choose(plan, limit, ids_gmem, x_gmem, out, smem)


def _by_maxima_body(
    groups: Groups,
    of_groups: _Plan,
    of_columns: _Plan,
    limit_gmem: Ref,
    maxima_gmem: Ref,
    x_gmem: Ref,
    out: tuple,
    smem: Ref,
) -> None:
    # One CTA or a cluster, one row:   the greatest of each group -> those that reach a bound
    #                                      -> their sort keys -> those that reach it -> o, count
    #
    # What `select_groups` leaves as it is, and in interpret mode every row, is chosen in two steps by one CTA: the best
    # groups, then the best of their columns.
    groups_out, columns_out = out
    t = lax.axis_index("row")
    limit = limit_gmem[t]

    def in_two_steps() -> None:
        _choose(of_groups, limit, None, maxima_gmem, groups_out, smem)
        _choose(of_columns, limit, groups_out.positions, x_gmem, columns_out, smem)

    if of_groups.interpret:
        in_two_steps()
        return
    x, maxima = (Row(ref, t, ref.shape[1]) for ref in (x_gmem, maxima_gmem))
    columns = _columns(limit, of_columns.per_column)
    done = select_groups.choose(groups, x, maxima, columns, smem, select_row.Output(t, *columns_out))
    pl.when(done == 0)(in_two_steps)


def _columns(limit: Array, per_column: int) -> Array:
    """How many columns hold what a limit counts."""
    return limit if per_column == 1 else lax.div(limit + (per_column - 1), jnp.int32(per_column))


def _choose(plan: _Plan, limit: Array, ids_gmem: Ref | None, x_gmem: Ref, out: Outputs, smem: Ref) -> None:
    t, shape = lax.axis_index("row"), plan.shape
    limit = _columns(limit, plan.per_column)
    output, row = select_row.Output(t, *out), Row(x_gmem, t, x_gmem.shape[1])
    if not plan.interpret:
        ids = None if ids_gmem is None else Row(ids_gmem, t, ids_gmem.shape[1])
        select_few.choose(shape, row, limit, ids, plan.block_size, smem, output)
        return
    positions = columns = jnp.arange(shape.width, dtype=jnp.int32)
    sort_keys = jnp.where(shape.is_full & (limit <= shape.k), 0, x_gmem[t])
    sort_keys = sort_keys if shape.group else sort_keys[: shape.width]
    if shape.group:
        assert ids_gmem is not None
        first = ids_gmem[t, :][columns // shape.group] * shape.group
        positions = columns = jnp.where(first < 0, limit, first + columns % shape.group)
        sort_keys = sort_keys[jnp.minimum(columns, x_gmem.shape[1] - 1)]
    elif ids_gmem is not None:
        ids = ids_gmem[t]
        of_block = jnp.minimum(columns // plan.block_size, ids.shape[0] - 1)
        positions = ids if shape.is_listed else ids[of_block] * plan.block_size + columns % plan.block_size
    select_row.choose_reference(jnp.where(columns < limit, sort_keys, INVISIBLE), positions, output)
