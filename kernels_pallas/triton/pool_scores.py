"""Scores of block means that are taken where they are scored, for so few queries that reading the keys is what counts.
    x[t, c] = sort_key(sum_h w[t, h] * relu(q[t, h] . mean[c]))          means as `pool` rounds them, float32 sums

Floor, a request of 128K in e4m3 on an H200: 17.3 MB / 4.3 TB/s = 4 us, for 32 of them 129 us. `pool` and `scores` read
the keys once, too, but write means, 2 parts a block, and read them: a launch more, and as many bytes as 2 % of the
keys. Here a program takes a few blocks, and means stay in its registers.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array

from hisa_jax.kernels_pallas.operands import Columns, KeyBlocks
from hisa_jax.kernels_pallas.pages import TILED_BLOCKS
from hisa_jax.kernels_pallas.triton.launch import by_tiles
from hisa_jax.kernels_pallas.triton.page_means import COLUMNS
from hisa_jax.kernels_pallas.triton.pool import is_addressable, parts_of
from hisa_jax.kernels_pallas.triton.pool_scores_body import Inputs, Plan, pool_scores_body

TILE_T = 8  # queries of a sequence that a block is read once for
_NUM_WARPS = 4
_PROGRAMS = 512  # at least, where there are so many blocks: four a multiprocessor
_FEW = 2  # queries a sequence
_MOST_KEYS = 131_072  # of all sequences: with more of them `pool`, which does nothing else, reads faster


def pools_where_scored(n_sequences: int, T: int, k: Array) -> bool:
    """Whether T queries of so many sequences are so few that this is the faster way from keys [S, D] to scores."""
    return _FEW * n_sequences >= T and k.shape[0] <= _MOST_KEYS and is_addressable(k.size, k.dtype)


@functools.partial(jax.jit, static_argnames=("interpret",))
def pool_scores(q: Array, w: Array, blocks: KeyBlocks, columns: Columns, *, interpret: bool = False) -> Array:
    """[T, H, D], [T, H], keys -> [T, columns.n padded] int32 sort keys of the scores of block means, as `scores`.

    Args:
        columns: blocks of each query, `tiles` of up to `TILE_T` queries with blocks for rows; `first` is not used.
            Those at or beyond a query's limit are `INVISIBLE` or, beyond whole 512, not written.
    """
    assert columns.tiles is not None
    step = COLUMNS if columns.n > COLUMNS else TILED_BLOCKS
    width = -(-columns.n // step) * step
    # As many blocks a program as keep all multiprocessors busy: a program reads the queries once for all of them.
    most = columns.tiles.shape[0] * columns.n // _PROGRAMS
    n_blocks = max(n for n in (1, 2, 4, 8, 16) if n <= max(most, 1))
    plan = Plan(
        block_size=blocks.size,
        n_blocks=n_blocks,
        step=step,
        n_parts=parts_of(blocks.k.dtype),
        keep_first=columns.keep_first,
        keep_last=columns.keep_last,
    )
    inputs = Inputs(q, w, columns.limit, columns.tiles, blocks.k, blocks.k_scale, jnp.asarray(blocks.counts))
    return by_tiles(
        functools.partial(pool_scores_body, plan=plan),
        inputs,
        (columns.tiles.shape[0], width // n_blocks),
        (q.shape[0], width),
        num_warps=_NUM_WARPS,
        num_stages=1,
        name="hisa_pool_scores",
        interpret=interpret,
    )
