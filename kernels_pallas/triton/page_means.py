"""Block means from the sums that pages keep: written in the form of `pool`, or scored where they are made.
    mean[b] = sum_p sums[page p of b] / sum_p counts[page p of b]                        float32 sums, as in `pool`

Floor, 128 requests of 128K in pages of 64 on an H200: 134 MB / 4.3 TB/s = 31 us, in pages of 128 half of it.
`pool_pages` writes 34 MB of means in e4m3, which `scores` reads. `page_scores` keeps them in registers: one launch and
no second reading. For one query that is 3 us less; for 32 it is slower, 23 us instead of 18.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jax.typing import DTypeLike

from hisa_jax.kernels_pallas.operands import Columns
from hisa_jax.kernels_pallas.pages import TILED_BLOCKS, PageSums
from hisa_jax.kernels_pallas.triton.launch import whole
from hisa_jax.kernels_pallas.triton.page_means_body import Plan, Queries, Sums, page_scores_body, pool_pages_body
from hisa_jax.kernels_pallas.triton.pool import parts_of

COLUMNS = 512  # wide rows of sort keys are read in whole steps of so many
_TILE_S = TILED_BLOCKS  # blocks a program, the fewest that the tensor core takes: one query has to keep a GPU busy
_NUM_WARPS = 4


@functools.partial(jax.jit, static_argnames=("dtype", "interpret"))
def pool_pages(page_sums: PageSums, dtype: DTypeLike, *, interpret: bool = False) -> tuple[Array, Array | None]:
    """-> [n, parts, D] of dtype, [n] float32 scale (None for bfloat16): the means of all requests' n blocks."""
    n, D = page_sums.n_blocks, page_sums.sums.shape[1]
    sums, plan = _sums_of(page_sums), _plan_of(page_sums, dtype)
    means, scale = pl.pallas_call(
        functools.partial(pool_pages_body, plan=plan),
        grid=(n // _TILE_S,),
        in_specs=[whole(sums)],
        out_specs=[
            pl.BlockSpec((_TILE_S, plan.n_parts, D), lambda s: (s, 0, 0)),
            pl.BlockSpec((_TILE_S,), lambda s: (s,)),
        ],
        out_shape=[jax.ShapeDtypeStruct((n, plan.n_parts, D), dtype), jax.ShapeDtypeStruct((n,), jnp.float32)],
        compiler_params=plt.CompilerParams(num_warps=_NUM_WARPS, num_stages=1),
        name="hisa_pool_pages",
        interpret=interpret,
    )(sums)
    return means, scale if plan.n_parts > 1 else None


@functools.partial(jax.jit, static_argnames=("interpret",))
def page_scores(
    q: Array, w: Array, page_sums: PageSums, first_block: Array, columns: Columns, *, interpret: bool = False
) -> Array:
    """[T, H, D], [T, H], sums, [T] -> [T, columns.n padded] int32 sort keys of the scores of block means, as `scores`.

    Args:
        first_block: where the blocks of each query's request begin.
        columns: blocks of each query; `tiles` and `first` are not used. Those at or beyond its limit are `INVISIBLE`
            or, beyond its whole 512, not written.
    """
    T, H, D = q.shape
    step = COLUMNS if columns.n > COLUMNS else _TILE_S
    width = -(-columns.n // step) * step
    row = lambda *shape: pl.BlockSpec((None, *shape), lambda s, t: (t,) + (0,) * len(shape))  # noqa: E731
    one = pl.BlockSpec((1,), lambda s, t: (t,))
    sums, forced = _sums_of(page_sums), (columns.keep_first, columns.keep_last)
    return pl.pallas_call(
        functools.partial(
            page_scores_body, plan=_plan_of(page_sums, q.dtype), tile_s=_TILE_S, step=step, forced=forced
        ),
        # Query by query: the next one of a request finds its sums in L2.
        grid=(width // _TILE_S, T),
        in_specs=[Queries(row(H, D), row(H), one, one), whole(sums)],
        out_specs=row(width),
        out_shape=jax.ShapeDtypeStruct((T, width), jnp.int32),
        compiler_params=plt.CompilerParams(num_warps=_NUM_WARPS, num_stages=1),
        name="hisa_page_scores",
        interpret=interpret,
    )(Queries(q, w, columns.limit, first_block), sums)


def _plan_of(page_sums: PageSums, dtype: DTypeLike) -> Plan:
    return Plan(per_block=page_sums.per_block, n_pages=page_sums.pages.n_pages, n_parts=parts_of(dtype))


def _sums_of(page_sums: PageSums) -> Sums:
    return Sums(page_sums.pages.table, page_sums.sums, page_sums.counts)
