"""Scores of block means that pages keep, for so few queries that fetching the means is what takes time.
    x[t, c] = sort_key(scale * sum_h w[t, h] * relu(q[t, h] . sum_p means[page that ends block c, p]))     float32 sums

Floor, 128 requests of 128K in blocks of 128 on an H200: 34 MB in e4m3 / 4.3 TB/s = 8 us. Threads fetch scattered rows
faster than the copy engine, which wants one command a row. Of a block of several pages, the marks of all are read too,
4 bytes a page: they say whether the mean is that of these pages (xla/block_means.py). If it is not, it is taken from
their sums, 16 blocks at a time: what `page_scores` does for all.

Means are rows of the products, and heads their columns, so that a thread has all heads of a mean but those of three
neighbours. With tiles of 128 means, a program each, 128 requests take 20 us, and 18.5 where L2 has all means: it is not
their bytes that take time, but that all programs wait for pages, then means, then products. By four tiles of 64 a
program it is 17.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from hisa_jax.kernels_pallas.operands import Columns
from hisa_jax.kernels_pallas.pages import TILED_BLOCKS, PageMeans
from hisa_jax.kernels_pallas.sequences import Sequences
from hisa_jax.kernels_pallas.triton.kept_means_body import Kept, Plan, Queries, kept_scores_body
from hisa_jax.kernels_pallas.triton.launch import whole
from hisa_jax.kernels_pallas.triton.page_means import COLUMNS
from hisa_jax.kernels_pallas.triton.page_means_body import Sums


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Launch sizes: they change the speed, never the result."""

    tile_s: int = TILED_BLOCKS  # blocks a program, a multiple of 16
    n_tiles: int = 1  # of a program, a power of two
    num_warps: int = 4
    num_stages: int = 1  # tiles on their way, and the one in work


def heuristic(T: int, n_blocks: int, n_sms: int = 132) -> Config:
    """Tiles as large as keep multiprocessors busy; of many blocks, tiles one after another in four programs on each.

    One tile a program, of 16, 64 and 128, with means in L2, us: 128 requests of 128K 64, 21 and 18.5; 32 requests 15,
    7.0 and 5.2.
    """
    n_tiles = -(-T * n_blocks // (64 * 4 * n_sms))
    if n_tiles > 1:
        return Config(tile_s=64, n_tiles=min(1 << (n_tiles - 1).bit_length(), 16), num_stages=3)
    if T * n_blocks >= 128 * n_sms:
        return Config(tile_s=128)
    return Config(tile_s=64 if T * n_blocks >= 32 * n_sms else TILED_BLOCKS)


def kept_scores(
    q: Array,
    w: Array,
    means: PageMeans,
    sequences: Sequences,
    columns: Columns,
    *,
    config: Config,
    per_column: int = 1,
    interpret: bool = False,
) -> Array:
    """[T, H, D], [T, H], means, [T] -> [T, columns.n padded] int32 sort keys of the scores of block means, as `scores`.

    Args:
        sequences: of blocks, all in the means' table, one after the other, as many each.
        columns: blocks of each query; `tiles` and `first` are not used. Those at or beyond its limit are `INVISIBLE`
            or, beyond its whole 512, not written.
        per_column: what a limit counts of each block.
    """
    T, R = q.shape[0], len(sequences.lengths)
    sums, tile_s = means.page_sums, config.tile_s
    step = COLUMNS if columns.n > COLUMNS else tile_s
    width = -(-columns.n // step) * step
    plan = Plan(
        tile_s=tile_s,
        n_tiles=config.n_tiles,
        step=step,
        per_block=sums.per_block,
        n_pages=sums.pages.n_pages,
        keep_first=columns.keep_first,
        keep_last=columns.keep_last,
        per_column=per_column,
        n_sequences=R,
    )
    row = lambda *shape: pl.BlockSpec((None, *shape), lambda s, t: (t,) + (0,) * len(shape))  # noqa: E731
    others = None if means.marks is None else Sums(sums.pages.table, sums.sums, sums.counts)
    flat = means.means.reshape(len(means.means), -1)
    kept = Kept(sums.pages.table, flat, means.scales, means.marks, others)
    # As they came or from one sum: the arithmetic that makes blocks of them would be a kernel of XLA before this one.
    sequence = jnp.asarray(sequences.of_queries(T)) if R > 1 else jnp.zeros((T,), jnp.int32)
    queries = Queries(q, w, columns.limit[:, None], sequence[:, None])
    return pl.pallas_call(
        functools.partial(kept_scores_body, plan=plan),
        # Query by query: the next one of a request finds its means in L2.
        grid=(-(-width // (tile_s * config.n_tiles)), T),
        in_specs=[Queries(*(row(*x.shape[1:]) for x in queries)), whole(kept)],
        out_specs=row(width),
        out_shape=jax.ShapeDtypeStruct((T, width), jnp.int32),
        compiler_params=plt.CompilerParams(num_warps=config.num_warps, num_stages=config.num_stages),
        name="hisa_kept_scores",
        interpret=interpret,
    )(queries, kept)
