"""Sort keys of the scores of a run of keys for every query: of tokens (flat indexer) or of block means (filter).
    x[t, c] = sort key(k_scale[c] * sum_h w[t, h] * relu(q[t, h] . sum_p k[c, p]))       float32 sums

Floor, 4096 queries of dsv32 in bfloat16 on an H200: block means of 64K (n = 512) 34 GFLOP / 990 TFLOP/s = 0.035 ms,
tokens of 64K 4.4 ms. A program keeps a tile of keys and streams `tile_t` queries past it.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from hisa_jax.kernels_pallas.pages import Pages
from hisa_jax.kernels_pallas.triton.pool import check_addressable
from hisa_jax.kernels_pallas.triton.scores_body import scores_body


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Tile sizes: they change the speed, never the result."""

    tile_s: int = 128  # keys a program
    tile_t: int = 8  # queries a program
    num_warps: int = 4


def heuristic(H: int) -> Config:
    """More heads take more registers a key."""
    return Config(tile_s=128 if H <= 64 else 64)


@functools.partial(jax.jit, static_argnames=("n_columns", "keep_first", "keep_last", "config", "interpret"))
def scores(
    q: Array,
    w: Array,
    k: Array,
    k_scale: Array | None,
    limit: Array,
    tiles: Array,
    first_column: Array,
    pages: Pages | None = None,
    *,
    n_columns: int,
    config: Config,
    keep_first: int = 0,
    keep_last: int = 0,
    interpret: bool = False,
) -> Array:
    """[T, H, D], [T, H], [S, parts, D], [S], [T] -> [T, n_columns padded to whole tiles] int32 sort keys.

    Args:
        limit: candidates of each query. Columns at or beyond are `INVISIBLE` or, beyond its whole tile, not written.
        tiles: which queries and keys go together, see `Sequences.query_tiles`.
        first_column: [1] int32: column c of the result is candidate first_column + c of its sequence.
        pages: where the rows of all sequences are in k, if not one behind the other.
        keep_first, keep_last: that many first and last candidates of each query are `FORCED`.
    """
    T = q.shape[0]
    check_addressable(k)
    n_spans = -(-n_columns // config.tile_s)
    width = n_spans * config.tile_s
    whole = lambda x: pl.BlockSpec(x.shape, lambda t, s: (0,) * x.ndim)  # noqa: E731
    operands = [q, w, limit, tiles, first_column, k]
    operands += [] if pages is None else [pages.table]
    operands += [] if k_scale is None else [k_scale]
    return pl.pallas_call(
        functools.partial(
            scores_body,
            tile_s=config.tile_s,
            n_parts=k.shape[1],
            page_size=None if pages is None else pages.size,
            keep_first=keep_first,
            keep_last=keep_last,
        ),
        grid=(tiles.shape[0], n_spans),
        in_specs=[whole(x) for x in operands],
        out_specs=pl.BlockSpec((T, width), lambda t, s: (0, 0)),
        out_shape=jax.ShapeDtypeStruct((T, width), jnp.int32),
        compiler_params=plt.CompilerParams(num_warps=config.num_warps, num_stages=2),
        name="hisa_scores",
        interpret=interpret,
    )(*operands)
