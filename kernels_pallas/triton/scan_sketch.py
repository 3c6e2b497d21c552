"""The scan of `scan` by the sketches that a cache keeps of its keys, for a few queries a sequence.
    x[t, s] = k_scale[s] * sum_r w[t, r] * f_r(sum_g scale[s, g] * sum_i code[s, g, i] * q[t, r, 32 g + i])

Floor, a query of 8 rows for each of 128 requests of 128K, D = 128, on an H200: 76 bytes a key, 1.3 GB / 4.3 TB/s =
0.30 ms (of e4m3 keys 0.52). Beside it 137 GFLOP / 990 TFLOP/s = 0.14 ms, a column a row and group, and some 0.2 ms of
unpacking, 2.5 instructions a number. So memory binds while a program has no more than two queries.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from hisa_jax.kernels_pallas.operands import Columns, ScanHeads
from hisa_jax.kernels_pallas.pages import Pages
from hisa_jax.kernels_pallas.triton import scan_body
from hisa_jax.kernels_pallas.triton.pool import check_addressable
from hisa_jax.kernels_pallas.triton.scan import Config
from hisa_jax.kernels_pallas.triton.scan_sketch_body import Sketches, scan_masks_body, scan_sort_keys_body

_COLUMNS = 128  # of a program at most: a row of a query and a group each
_LEAST_COLUMNS = 16  # of a product


class SketchOperands(NamedTuple):
    """Keys of all sequences in 4 bits, in flat arrays.

    Attributes:
        codes: [S, bytes] uint8; `code_scales`: [S, groups] bfloat16, as xla/sketch.py has them.
        k_scale: [S] float32, of the keys that they stand for; None where every scale is 1.
        pages: where the rows of all sequences are in these; None: one sequence after the other.
    """

    codes: Array
    code_scales: Array
    k_scale: Array | None
    pages: Pages | None = None


def heuristic(T: int, n_sequences: int, R: int, n_groups: int, n_tiles: int) -> Config:
    """No more queries a program than a sequence has, or than fill the columns."""
    tile_t, each = 1, R * n_groups
    while tile_t * each < _LEAST_COLUMNS or (2 * tile_t * each <= _COLUMNS and tile_t * n_sequences < T):
        tile_t *= 2
    # Programs for several waves, whatever the number of queries.
    n_programs, chunk = -(-T // tile_t) + n_sequences, 64
    while chunk > 4 and n_programs * -(-n_tiles // chunk) < 1024:
        chunk //= 2
    return Config(tile_t=tile_t, n_tiles=chunk)


@functools.partial(jax.jit, static_argnames=("config", "interpret"))
def scan_masks(
    operands: SketchOperands,
    heads: ScanHeads,
    columns: Columns,
    threshold: Array,
    *,
    config: Config,
    interpret: bool = False,
) -> Array:
    """`scan.scan_masks` by sketches: [T, words] int32."""
    body = functools.partial(scan_masks_body, keep_first=columns.keep_first, keep_last=columns.keep_last)
    name = "hisa_scan_sketch"
    return _launch(operands, heads, columns, threshold, 1, body, scan_body.WORD, name, config, interpret)


@functools.partial(jax.jit, static_argnames=("step", "config", "interpret"))
def scan_sort_keys(
    operands: SketchOperands,
    heads: ScanHeads,
    columns: Columns,
    *,
    step: int,
    config: Config,
    interpret: bool = False,
) -> Array:
    """`scan.scan_sort_keys` by sketches: [T, n] int32."""
    name = "hisa_scan_sketch_samples"
    return _launch(operands, heads, columns, None, step, scan_sort_keys_body, 1, name, config, interpret)


def _launch(
    operands: SketchOperands,
    heads: ScanHeads,
    columns: Columns,
    threshold: Array | None,
    step: int,
    body: Callable[..., None],
    per_word: int,
    name: str,
    config: Config,
    interpret: bool,
) -> Array:
    """A launch over every `step`-th key, whose result has a number for `per_word` of them."""
    (T, R, D), pages = heads.q.shape, operands.pages
    check_addressable(operands.codes)
    assert columns.tiles is not None
    n_tiles = -(-columns.n // scan_body.TILE_S)
    shape = (T, n_tiles * scan_body.TILE_S // per_word)
    inputs = scan_body.Inputs(
        q=heads.q.reshape(T * R, D),
        w=heads.w.reshape(T * R),
        limit=columns.limit,
        threshold=threshold,
        tiles=columns.tiles,
        k=operands.codes,
        table=None if pages is None else pages.table,
        k_scale=operands.k_scale,
    )
    sketches = Sketches(inputs, operands.code_scales)
    plan = scan_body.Plan(
        tile_t=config.tile_t,
        n_tiles=config.n_tiles,
        step=step,
        R=R,
        n_linear=heads.n_linear,
        n=heads.n,
        page_size=None if pages is None else pages.size,
    )
    whole = lambda x: pl.BlockSpec(x.shape, lambda t, s: (0,) * x.ndim)  # noqa: E731
    return pl.pallas_call(
        functools.partial(body, plan=plan),
        grid=(columns.tiles.shape[0], -(-n_tiles // config.n_tiles)),
        # Whole arrays: which rows a program takes, `tiles` and the page table say when it runs.
        in_specs=[jax.tree.map(whole, sketches)],
        out_specs=pl.BlockSpec(shape, lambda t, s: (0, 0)),
        out_shape=jax.ShapeDtypeStruct(shape, jnp.int32),
        compiler_params=plt.CompilerParams(num_warps=config.num_warps, num_stages=config.num_stages),
        name=name,
        interpret=interpret,
    )(sketches)
