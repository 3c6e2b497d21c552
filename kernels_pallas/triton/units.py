"""Block scores by the best of their tokens, of queries with one head: `units.py` puts the selection together.
    x[t, j] = sort_key(max over visible tokens s of block j of k_scale[s] * w[t] * f(q[t] . k[s]))    float32 sums

Floor, 4096 queries of 4 heads of 128 that choose alone (minimax_m3) against 128K keys in bfloat16 on an H200: 550 GFLOP
/ 990 TFLOP/s = 0.56 ms, and 67 MB of sort keys. There is no sum over heads: a product of 256 queries with 64 keys is
256 x 64 scores, of which one maximum a query leaves the registers. Measured: 1.03 ms, of e4m3 0.72; a step of 32 such
requests 0.241 ms, at the rate of memory.
"""

import dataclasses
import functools

import jax
from jax import Array

from hisa_jax.kernels_pallas.operands import Columns, Operands
from hisa_jax.kernels_pallas.triton.launch import by_tiles
from hisa_jax.kernels_pallas.triton.pool import check_addressable
from hisa_jax.kernels_pallas.triton.scan import tiles_a_program
from hisa_jax.kernels_pallas.triton.scan_body import TILE_S
from hisa_jax.kernels_pallas.triton.units_body import Inputs, Plan, units_body


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Tile sizes: they change the speed, never the result."""

    tile_t: int  # queries a program: a power of two, 16 or more
    tile_s: int = TILE_S  # keys of a tile: 64 or 128
    n_keys: int = 64 * TILE_S  # keys a program: a multiple of 128
    num_warps: int = 4
    num_stages: int = 2


def heuristic(T: int, n_sequences: int, n_keys: int) -> Config:
    """For T queries of so many sequences of up to `n_keys` keys.

    256 queries read keys from L2 half as often as 128 do, and two programs of 64 keys a tile fit a multiprocessor: of
    one the scores are compared while the other multiplies. Of few queries a sequence no more than there are.
    """
    tile_t = 256
    while tile_t > 16 and tile_t // 2 * n_sequences >= T:
        tile_t //= 2
    n = TILE_S * tiles_a_program(-(-T // tile_t) + n_sequences, -(-n_keys // TILE_S))
    if tile_t == 256:
        return Config(tile_t=tile_t, tile_s=64, n_keys=n, num_warps=8, num_stages=3)
    return Config(tile_t=tile_t, n_keys=n)


@functools.partial(jax.jit, static_argnames=("unit", "has_relu", "is_weighted", "config", "interpret"))
def units(
    operands: Operands,
    columns: Columns,
    *,
    unit: int,
    has_relu: bool,
    is_weighted: bool = True,
    config: Config,
    interpret: bool = False,
) -> Array:
    """-> [T, n] int32 sort keys of units of keys: a power of two up to 128. `columns` counts keys.

    From the unit on that begins with an invisible key they may be anything.
    """
    q, w, k, k_scale, pages = operands
    T, _, D = q.shape
    check_addressable(k)
    assert columns.tiles is not None
    n_keys = -(-columns.n // TILE_S) * TILE_S
    inputs = Inputs(
        q=q.reshape(T, D),
        w=w.reshape(T) if is_weighted else None,
        limit=columns.limit,
        tiles=columns.tiles,
        k=k,
        table=None if pages is None else pages.table,
        k_scale=k_scale,
    )
    plan = Plan(
        tile_t=config.tile_t,
        tile_s=config.tile_s,
        n_tiles=config.n_keys // config.tile_s,
        unit=unit,
        has_relu=has_relu,
        page_size=None if pages is None else pages.size,
    )
    return by_tiles(
        functools.partial(units_body, plan=plan),
        inputs,
        (columns.tiles.shape[0], -(-n_keys // config.n_keys)),
        (T, n_keys // unit),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        name="hisa_units",
        interpret=interpret,
    )
