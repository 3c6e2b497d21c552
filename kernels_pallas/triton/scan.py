"""The scan: every key of a sequence by the few heads of `ScanHeads`, for every query.
    x[t, s] = k_scale[s] * sum_r w[t, r] * f_r(q[t, r] . k[s])                           float32 sums
`scan_masks` leaves a bit of each x, whether it reaches the query's threshold; `scan_sort_keys` leaves sort keys.

Floor, 4096 queries of 8 rows of 128 against 64K keys in e4m3 on an H200: 550 GFLOP / 1979 TFLOP/s = 0.28 ms, and 34 MB
of bits. A program keeps the rows of its queries, keys stream past.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
from jax import Array

from hisa_jax.kernels_pallas.operands import Columns, Operands, ScanHeads
from hisa_jax.kernels_pallas.pages import Pages
from hisa_jax.kernels_pallas.triton.launch import by_tiles
from hisa_jax.kernels_pallas.triton.pool import check_addressable
from hisa_jax.kernels_pallas.triton.scan_body import (
    TILE_S,
    WORD,
    Inputs,
    Plan,
    ScoresOf,
    scan_masks_body,
    scan_sort_keys_body,
    scores_of_keys,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Tile sizes: they change the speed, never the result."""

    tile_t: int  # queries a program: a multiple of 4, and 16 rows or more
    n_tiles: int = 64  # tiles of keys a program
    num_warps: int = 4  # a word of bits is then one warp's
    num_stages: int = 3


class Scanned(NamedTuple):
    """What is scanned of all sequences, in flat arrays.

    Attributes:
        k: [S, D] keys, or [S, bytes] uint8 codes; `code_scales`: [S, groups] bfloat16 of these, else None.
        k_scale: [S] float32, of the keys; None where every scale is 1.
        pages: where the rows of all sequences are in these; None: one sequence after the other.
    """

    k: Array
    code_scales: Array | None
    k_scale: Array | None
    pages: Pages | None


def heuristic(T: int, n_sequences: int, R: int, n_tiles: int) -> Config:
    """128 rows a program fill the tensor core; of few queries a sequence no more than there are."""
    tile_t = max(128 // R, 4)
    while tile_t > 4 and tile_t // 2 * R >= 16 and tile_t // 2 * n_sequences >= T:
        tile_t //= 2
    return Config(tile_t=max(tile_t, 16 // R), n_tiles=tiles_a_program(-(-T // tile_t) + n_sequences, n_tiles))


def tiles_a_program(n_query_tiles: int, n_tiles: int) -> int:
    """Tiles of keys, so that there are programs for several waves, whatever the number of queries."""
    n = 64
    while n > 4 and n_query_tiles * -(-n_tiles // n) < 1024:
        n //= 2
    return n


@functools.partial(jax.jit, static_argnames=("config", "interpret"))
def scan_masks(
    operands: Operands, heads: ScanHeads, columns: Columns, threshold: Array, *, config: Config, interpret: bool = False
) -> Array:
    """-> [T, words] int32: bit c % 32 of word c // 32 says whether a query takes token c of its sequence.

    It takes those before its limit whose sort key is at least `threshold` [T] int32, and its first and last ones
    whatever their scores. Of `operands` the keys are read. Words from the tile on that begins at or beyond the limit
    may hold anything.
    """
    return launch(_keys(operands), heads, columns, threshold, 1, scores_of_keys, config, interpret)


@functools.partial(jax.jit, static_argnames=("step", "config", "interpret"))
def scan_sort_keys(
    operands: Operands, heads: ScanHeads, columns: Columns, *, step: int, config: Config, interpret: bool = False
) -> Array:
    """-> [T, n] int32: sort keys of the scan scores of tokens 0, step, 2 step, ... of a query's sequence.

    `columns` counts these. What is at or beyond a query's limit is `INVISIBLE` or, beyond its whole tile, not written.
    """
    return launch(_keys(operands), heads, columns, None, step, scores_of_keys, config, interpret)


def _keys(operands: Operands) -> Scanned:
    return Scanned(operands.k, None, operands.k_scale, operands.pages)


def launch(
    scanned: Scanned,
    heads: ScanHeads,
    columns: Columns,
    threshold: Array | None,
    step: int,
    scores_of: ScoresOf,
    config: Config,
    interpret: bool,
) -> Array:
    """A launch over every `step`-th key: [T, words] int32 bits for a threshold [T] int32, else [T, n] sort keys."""
    (T, R, D), (k, code_scales, k_scale, pages) = heads.q.shape, scanned
    check_addressable(k)
    assert columns.tiles is not None
    name = "hisa_scan" if code_scales is None else "hisa_scan_sketch"
    if threshold is None:
        body, per_word, name = functools.partial(scan_sort_keys_body, scores_of=scores_of), 1, f"{name}_samples"
    else:
        forced: Any = dict(keep_first=columns.keep_first, keep_last=columns.keep_last)
        body, per_word = functools.partial(scan_masks_body, scores_of=scores_of, **forced), WORD
    n_tiles = -(-columns.n // TILE_S)
    inputs = Inputs(
        q=heads.q.reshape(T * R, D),
        w=heads.w.reshape(T * R),
        limit=columns.limit,
        threshold=threshold,
        tiles=columns.tiles,
        k=k,
        table=None if pages is None else pages.table,
        k_scale=k_scale,
        code_scales=code_scales,
    )
    plan = Plan(
        tile_t=config.tile_t,
        n_tiles=config.n_tiles,
        step=step,
        R=R,
        n_linear=heads.n_linear,
        n=heads.n,
        page_size=None if pages is None else pages.size,
    )
    return by_tiles(
        functools.partial(body, plan=plan),
        inputs,
        (columns.tiles.shape[0], -(-n_tiles // config.n_tiles)),
        (T, n_tiles * TILE_S // per_word),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        name=name,
        interpret=interpret,
    )
