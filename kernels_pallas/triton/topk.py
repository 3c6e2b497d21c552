"""Exact top-k of rows of score sort keys, ascending: the second half of the refinement and of the block filter.
    o[t] = the columns (or the tokens they stand for) of the k largest x[t, :limit[t]], in column order, then -1

Floor, 4096 rows of 8192 on an H200: HBM 134 MB / 4.3 TB/s = 0.03 ms. A row lives in the registers of one program, so
memory is read once; what takes the time is counting: each pass over a row is 8192 compares and a sum over the program.
`find_threshold` needs 6 to 9 passes, and one scan of both counts (above and at the threshold), packed in an int32,
gives tie-breaking and slots.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from hisa_jax.kernels_pallas.operands import KeptBlocks
from hisa_jax.kernels_pallas.triton.topk_body import (
    KthInputs,
    MergeInputs,
    TopkInputs,
    kth_body,
    merge_topk_body,
    topk_body,
)
from hisa_jax.kernels_pallas.types import Ref

MAX_WIDTH = 32768  # the two counts of a row share an int32


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Launch sizes: they change the speed, never the result."""

    num_warps: int = 8


def why_not(width: int) -> str | None:
    """None, or why rows of this many candidates cannot be selected from in one piece."""
    return None if width <= MAX_WIDTH else f"needs at most {MAX_WIDTH} candidates a row, not {width}"


def heuristic(width: int) -> Config:
    """32 sort keys a thread: fewer leave the scan's shuffles exposed, more spill."""
    return Config(num_warps=min(max(pl.next_power_of_2(width) // 1024, 1), 32))


def topk(
    x: Array,
    limit: Array,
    k: int,
    kept: KeptBlocks | None = None,
    most: Array | None = None,
    *,
    config: Config | None = None,
    interpret: bool = False,
) -> tuple[Array, Array]:
    """[T, W] int32 sort keys, [T] int32 -> [T, k] int32, [T] int32 count.

    Args:
        limit: columns from here on are no candidates, whatever they hold.
        kept: column c is then token kept.ids[c // size] * size + c % size of the sequence.
        most: [T] int32, up to k of them are chosen in a row; None: k.
    """
    columns, count = _launch(x, limit, k, kept, most, False, config, interpret)
    return columns, count


def topk_with_sort_keys(
    x: Array, limit: Array, k: int, kept: KeptBlocks | None = None, *, interpret: bool = False
) -> tuple[Array, Array, Array]:
    """`topk` and the [T, k] sort keys of what it chose, `INVISIBLE` where nothing is chosen."""
    columns, count, sort_keys = _launch(x, limit, k, kept, None, True, None, interpret)
    return columns, count, sort_keys


@functools.partial(jax.jit, static_argnames=("k", "has_sort_keys", "config", "interpret"))
def _launch(
    x: Array,
    limit: Array,
    k: int,
    kept: KeptBlocks | None,
    most: Array | None,
    has_sort_keys: bool,
    config: Config | None,
    interpret: bool,
) -> list[Array]:
    T, W = x.shape
    config, rows = config or heuristic(W), jax.ShapeDtypeStruct((T, k), jnp.int32)
    one = pl.BlockSpec((1,), lambda t: (t,))
    inputs = TopkInputs(x, limit, None if kept is None else kept.ids, most)
    in_specs = TopkInputs(
        _row(W), one, None if kept is None else _row(kept.ids.shape[1]), None if most is None else one
    )
    return pl.pallas_call(
        functools.partial(topk_body, k=k, block_size=1 if kept is None else kept.size),
        grid=(T,),
        in_specs=[in_specs],
        out_specs=[_row(k), one, *[_row(k)] * has_sort_keys],
        out_shape=[rows, jax.ShapeDtypeStruct((T,), jnp.int32), *[rows] * has_sort_keys],
        compiler_params=plt.CompilerParams(num_warps=config.num_warps, num_stages=1),
        name="hisa_topk",
        interpret=interpret,
    )(inputs)


@functools.partial(jax.jit, static_argnames=("interpret",))
def kth(x: Array, limit: Array, rank: Array, *, interpret: bool = False) -> Array:
    """[T, W] int32 sort keys, [T], [T] int32 -> [T] int32: the rank-th largest of each row's first `limit` columns.

    Or any other number that `rank` to `rank` + `rank` // KTH_SLACK of them reach; the least where there are fewer.
    """
    T, W = x.shape
    one = pl.BlockSpec((1,), lambda t: (t,))
    return pl.pallas_call(
        kth_body,
        grid=(T,),
        in_specs=[KthInputs(_row(W), one, one)],
        out_specs=one,
        out_shape=jax.ShapeDtypeStruct((T,), jnp.int32),
        compiler_params=plt.CompilerParams(num_warps=heuristic(W).num_warps, num_stages=1),
        name="hisa_kth",
        interpret=interpret,
    )(KthInputs(x, limit, rank))


@functools.partial(jax.jit, static_argnames=("interpret",))
def merge_topk(
    best: Array, positions: Array, x: Array, start: Array, limit: Array, *, interpret: bool = False
) -> tuple[Array, Array]:
    """One step of a streaming top-k: the k best of `best` and of a new tile of candidates.

    Args:
        best: [T, k] int32 sort keys of the best so far, `INVISIBLE` in empty slots; `positions`: [T, k], ascending.
        x: [T, W] int32 sort keys of the tile.
        start: [1] int32, the position of the tile's first column, beyond all `positions`.
        limit: [T] int32, candidates of the whole row: columns at or beyond limit - start are none.

    Returns: the new `best` and `positions`; empty slots hold `INVISIBLE` and -1.
    """
    (T, W), k = x.shape, best.shape[1]
    in_specs = MergeInputs(
        best=_row(k),
        positions=_row(k),
        x=_row(W),
        start=pl.BlockSpec((1,), lambda t: (0,)),
        limit=pl.BlockSpec((1,), lambda t: (t,)),
    )
    return pl.pallas_call(
        merge_topk_body,
        grid=(T,),
        in_specs=[in_specs],
        out_specs=[_row(k), _row(k)],
        out_shape=[jax.ShapeDtypeStruct((T, k), jnp.int32)] * 2,
        compiler_params=plt.CompilerParams(num_warps=heuristic(W + k).num_warps, num_stages=1),
        name="hisa_merge_topk",
        interpret=interpret,
    )(MergeInputs(best, positions, x, start, limit))


def _row(width: int) -> Ref:
    return pl.BlockSpec((None, width), lambda t: (t, 0))
