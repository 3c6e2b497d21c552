"""Block means from the sums that pages keep: written in the form of `pool`, or scored where they are made.
    mean[b] = sum_p sums[page p of b] / sum_p counts[page p of b]                        float32 sums, as in `pool`

Floor, 128 requests of 128K in pages of 64 on an H200: 134 MB / 4.3 TB/s = 31 us, in pages of 128 half of it.
`pool_pages` writes 34 MB of means in e4m3 for others to read. `page_scores` keeps them in registers: one launch and no
second reading, 3 us less for one query; for 32 it is slower, 23 us instead of 18.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jax.typing import DTypeLike

from hisa_jax.kernels_pallas.pages import TILED_BLOCKS, PageSums
from hisa_jax.kernels_pallas.triton.page_means_body import page_scores_body, pool_pages_body
from hisa_jax.kernels_pallas.triton.pool import parts_of
from hisa_jax.kernels_pallas.types import Ref

_COLUMNS = 512  # wide rows of sort keys are read in whole steps of so many


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Tile sizes: they change the speed, never the result."""

    # Blocks a program, the fewest that the tensor core takes: one query has to keep a GPU busy.
    tile_s: int = TILED_BLOCKS
    num_warps: int = 4


@functools.partial(jax.jit, static_argnames=("dtype", "config", "interpret"))
def pool_pages(
    page_sums: PageSums, dtype: DTypeLike, *, config: Config | None = None, interpret: bool = False
) -> tuple[Array, Array | None]:
    """-> [n, parts, D] of dtype, [n] float32 scale (None for bfloat16): the means of all requests' n blocks."""
    config, n, D = config or Config(), page_sums.n_blocks, page_sums.sums.shape[1]
    n_parts = parts_of(dtype)
    operands = _operands(page_sums)
    means, scale = pl.pallas_call(
        functools.partial(
            pool_pages_body, per_block=page_sums.per_block, n_pages=page_sums.pages.n_pages, n_parts=n_parts
        ),
        grid=(n // config.tile_s,),
        in_specs=[_whole(x) for x in operands],
        out_specs=[
            pl.BlockSpec((config.tile_s, n_parts, D), lambda s: (s, 0, 0)),
            pl.BlockSpec((config.tile_s,), lambda s: (s,)),
        ],
        out_shape=[jax.ShapeDtypeStruct((n, n_parts, D), dtype), jax.ShapeDtypeStruct((n,), jnp.float32)],
        compiler_params=plt.CompilerParams(num_warps=config.num_warps, num_stages=1),
        name="hisa_pool_pages",
        interpret=interpret,
    )(*operands)
    return means, scale if n_parts > 1 else None


@functools.partial(jax.jit, static_argnames=("n_columns", "keep_first", "keep_last", "config", "interpret"))
def page_scores(
    q: Array,
    w: Array,
    page_sums: PageSums,
    limit: Array,
    first_block: Array,
    *,
    n_columns: int,
    keep_first: int,
    keep_last: int,
    config: Config | None = None,
    interpret: bool = False,
) -> Array:
    """[T, H, D], [T, H], [T], [T] -> [T, n_columns padded] int32 sort keys of the scores of block means, as `scores`.

    Args:
        limit: blocks of each query. Columns at or beyond are `INVISIBLE` or, beyond its whole 512, not written.
        first_block: where the blocks of each query's request begin.
    """
    (T, H, D), config = q.shape, config or Config()
    step = _COLUMNS if n_columns > _COLUMNS else config.tile_s
    width = -(-n_columns // step) * step
    row = lambda *shape: pl.BlockSpec((None, *shape), lambda s, t: (t,) + (0,) * len(shape))  # noqa: E731
    one = pl.BlockSpec((1,), lambda s, t: (t,))
    operands = _operands(page_sums)
    return pl.pallas_call(
        functools.partial(
            page_scores_body,
            per_block=page_sums.per_block,
            n_pages=page_sums.pages.n_pages,
            n_parts=parts_of(q.dtype),
            tile_s=config.tile_s,
            step=step,
            keep_first=keep_first,
            keep_last=keep_last,
        ),
        # Query by query: the next one of a request finds its sums in L2.
        grid=(width // config.tile_s, T),
        in_specs=[row(H, D), row(H), one, one, *(_whole(x) for x in operands)],
        out_specs=row(width),
        out_shape=jax.ShapeDtypeStruct((T, width), jnp.int32),
        compiler_params=plt.CompilerParams(num_warps=config.num_warps, num_stages=1),
        name="hisa_page_scores",
        interpret=interpret,
    )(q, w, limit, first_block, *operands)


def _operands(page_sums: PageSums) -> list[Array]:
    return [page_sums.pages.table, page_sums.sums, page_sums.counts]


def _whole(x: Array) -> Ref:
    return pl.BlockSpec(x.shape, lambda *_: (0,) * x.ndim)
