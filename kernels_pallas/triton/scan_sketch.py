"""The scan of `scan` by the sketches that a cache keeps of its keys, for a few queries a sequence.
    x[t, s] = k_scale[s] * sum_r w[t, r] * f_r(sum_g scale[s, g] * sum_i code[s, g, i] * q[t, r, 32 g + i])

Floor, a query of 8 rows for each of 128 requests of 128K, D = 128, on an H200: 76 bytes a key, 1.3 GB / 4.3 TB/s =
0.30 ms (of e4m3 keys 0.52). Beside it 137 GFLOP / 990 TFLOP/s = 0.14 ms, a column a row and group, and some 0.2 ms of
unpacking, 2.5 instructions a number. So memory binds while a program has no more than two queries.
"""

import functools

import jax
from jax import Array

from hisa_jax.kernels_pallas.operands import Columns, ScanHeads
from hisa_jax.kernels_pallas.triton.scan import Config, Scanned, launch, tiles_a_program
from hisa_jax.kernels_pallas.triton.scan_sketch_body import scores_of_sketches

_COLUMNS = 128  # of a program at most: a row of a query and a group each
_LEAST_COLUMNS = 16  # of a product


def heuristic(T: int, n_sequences: int, R: int, n_groups: int, n_tiles: int) -> Config:
    """No more queries a program than a sequence has, or than fill the columns."""
    tile_t, each = 1, R * n_groups
    while tile_t * each < _LEAST_COLUMNS or (2 * tile_t * each <= _COLUMNS and tile_t * n_sequences < T):
        tile_t *= 2
    return Config(tile_t=tile_t, n_tiles=tiles_a_program(-(-T // tile_t) + n_sequences, n_tiles))


@functools.partial(jax.jit, static_argnames=("config", "interpret"))
def scan_masks(
    sketches: Scanned,
    heads: ScanHeads,
    columns: Columns,
    threshold: Array,
    *,
    config: Config,
    interpret: bool = False,
) -> Array:
    """`scan.scan_masks` by sketches: [T, words] int32."""
    return launch(sketches, heads, columns, threshold, 1, scores_of_sketches, config, interpret)


@functools.partial(jax.jit, static_argnames=("step", "config", "interpret"))
def scan_sort_keys(
    sketches: Scanned,
    heads: ScanHeads,
    columns: Columns,
    *,
    step: int,
    config: Config,
    interpret: bool = False,
) -> Array:
    """`scan.scan_sort_keys` by sketches: [T, n] int32."""
    return launch(sketches, heads, columns, None, step, scores_of_sketches, config, interpret)
