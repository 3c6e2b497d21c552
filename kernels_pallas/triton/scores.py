"""Sort keys of the scores of a run of keys for every query: of tokens (flat indexer) or of block means (filter).
    x[t, c] = sort_key(k_scale[c] * sum_h w[t, h] * relu(q[t, h] . sum_p k[c, p]))       float32 sums

Floor, 4096 queries of dsv32 in bfloat16 on an H200: block means of 64K (n = 512) 34 GFLOP / 990 TFLOP/s = 0.035 ms,
tokens of 64K 4.4 ms. A program keeps a tile of keys and streams `tile_t` queries past it.
"""

import dataclasses
import functools

import jax
from jax import Array

from hisa_jax.kernels_pallas.operands import Columns, Operands
from hisa_jax.kernels_pallas.triton.launch import by_tiles
from hisa_jax.kernels_pallas.triton.pool import check_addressable
from hisa_jax.kernels_pallas.triton.scores_body import Inputs, Plan, scores_body


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Tile sizes: they change the speed, never the result."""

    tile_s: int = 128  # keys a program
    tile_t: int = 8  # queries a program
    num_warps: int = 4


def heuristic(H: int) -> Config:
    """More heads take more registers a key."""
    return Config(tile_s=128 if H <= 64 else 64)


@functools.partial(jax.jit, static_argnames=("config", "interpret"))
def scores(operands: Operands, columns: Columns, *, config: Config, interpret: bool = False) -> Array:
    """Keys [S, parts, D] -> [T, columns.n padded to whole tiles] int32 sort keys. `columns.threshold` is not used."""
    q, w, k, k_scale, pages = operands
    check_addressable(k)
    assert columns.tiles is not None
    n_spans = -(-columns.n // config.tile_s)
    inputs = Inputs(
        q, w, columns.limit, columns.tiles, columns.first, k, None if pages is None else pages.table, k_scale
    )
    plan = Plan(
        tile_s=config.tile_s,
        n_parts=k.shape[1],
        page_size=None if pages is None else pages.size,
        keep_first=columns.keep_first,
        keep_last=columns.keep_last,
    )
    return by_tiles(
        functools.partial(scores_body, plan=plan),
        inputs,
        (columns.tiles.shape[0], n_spans),
        (q.shape[0], n_spans * config.tile_s),
        num_warps=config.num_warps,
        num_stages=2,
        name="hisa_scores",
        interpret=interpret,
    )
