"""Scan scores of the sketches that pages keep, for a few queries a sequence: sort keys of all tokens.
    x[t, s] = k_scale[s] * sum_r w[t, r] * f_r(sum_g scale[s, g] * sum_i code[s, g, i] * q[t, r, 32 g + i])

Floor, a query for each of 32 and 128 requests of 128K on an H200: 76 bytes a token, 319 MB and 1.3 GB / 4.3 TB/s = 74
and 297 us. A multiprocessor then has 500 cycles for 128 tokens. The products are 128 of them (8 rows, a column for
each of four groups, m64n32k32 at 16), and some 900 instructions of warps are 225. Measured: 87 and 338 us.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from hisa_jax.kernels_pallas.mosaic_gpu.ptx import sketch_loop
from hisa_jax.kernels_pallas.mosaic_gpu.ptx.sketch_loop import Inputs, Outputs, Part
from hisa_jax.kernels_pallas.mosaic_gpu.ptx.sketch_loop_text import ROW_BYTES, STEP, Shape
from hisa_jax.kernels_pallas.operands import Columns, ScanHeads
from hisa_jax.kernels_pallas.pages import Pages
from hisa_jax.kernels_pallas.sort_key import sort_key_of
from hisa_jax.kernels_pallas.types import Interpret, Ref
from hisa_jax.xla import sketch as sketches

_LEAST_PAGE = 32  # tokens: those of a warp are in one page
_MOST_EIGHTS = 4  # of rows: 128 columns, whose sums are 64 registers


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """How the work is split: it changes the speed, never the result."""

    tile_t: int  # queries a CTA
    steps: int  # of 128 tokens, a CTA

    def __post_init__(self) -> None:
        if self.tile_t < 1 or self.steps < 1:
            raise ValueError(f"Config(tile_t={self.tile_t}, steps={self.steps}): must be at least 1")


def why_not(D: int, itemsize: int, page_size: int, sample_step: int) -> str | None:
    """None, or why it cannot scan sketches of keys of D numbers."""
    if itemsize != 1 or D * itemsize != ROW_BYTES:
        return f"needs heads of {ROW_BYTES} numbers in 8 bits, not {D} of {8 * itemsize} bits"
    if page_size < _LEAST_PAGE:
        return f"needs pages of {_LEAST_PAGE} tokens or more, not {page_size}"
    return None if sample_step <= STEP else f"needs a sample in {STEP} tokens or more, not in {sample_step}"


def heuristic(T: int, n_sequences: int, R: int, n: int, n_ctas: int) -> Config:
    """A CTA for all queries of a sequence, as far as their sums fit, and as many CTAs as run at a time, twice."""
    tile_t, padded = 1, -(-R // 8)
    while 2 * tile_t * padded <= _MOST_EIGHTS and tile_t * n_sequences < T:
        tile_t *= 2
    n_tiles, resident = -(-T // tile_t), 4 if tile_t * padded == 1 else 2
    parts = max(2 * resident * n_ctas // n_tiles, 1)
    # A CTA begins with 3 us of waiting, in which others of its multiprocessor work.
    return Config(tile_t=tile_t, steps=max(-(-n // (STEP * parts)), 2))


@functools.partial(jax.jit, static_argnames=("sample_step", "config", "interpret"))
def scan_sort_keys(
    codes: Array,
    code_scales: Array,
    k_scale: Array | None,
    pages: Pages,
    heads: ScanHeads,
    columns: Columns,
    first: Array | None = None,
    *,
    sample_step: int,
    config: Config,
    interpret: Interpret = False,
) -> tuple[Array, Array]:
    """[S, 64] uint8, [S, 4] bfloat16, maybe [S] float32 -> [T, n] int32 sort keys of all tokens of each sequence.

    And [T, n / sample_step], those of tokens 0, sample_step, ..., side by side.

    Args:
        columns: which queries and keys go together. What is at or beyond a query's limit may be anything.
        first: [T] int32, the row of the first key of each query's sequence. Where `columns` have no tiles and a CTA one
            query, it takes the place of tiles: no kernel has to make them.
    """
    (T, R, _), n = heads.q.shape, -(-columns.n // STEP) * STEP
    if columns.tiles is None and (first is None or config.tile_t > 1):
        raise ValueError("scan_sort_keys: without tiles of queries it needs `first`, and a query a CTA")
    shape = Shape(
        queries=config.tile_t,
        rows=R,
        n=heads.n,
        n_linear=heads.n_linear,
        page_size=pages.size,
        n_pages=pages.n_pages,
        table_size=pages.table.shape[0],
        has_scale=k_scale is not None,
        out_columns=n,
        sample_step=sample_step,
    )
    tiles = columns.tiles
    limit, first = (columns.limit, first) if tiles is None else (None, None)
    inputs = Inputs(heads.q, heads.w, tiles, limit, first, codes, code_scales, k_scale, pages.table)
    widths = n, n // sample_step
    sort_keys, samples = plgpu.kernel(
        functools.partial(_body, shape, config, interpret),
        out_type=[Outputs(*(jax.ShapeDtypeStruct((T, width), jnp.int32) for width in widths))],
        grid=(T if tiles is None else tiles.shape[0], -(-n // (STEP * config.steps))),
        grid_names=("tile", "part"),
        num_threads=1,
        thread_name="warpgroup",
        scratch_types=[plgpu.SMEM((shape.smem_bytes // 4,), jnp.int32)],
        kernel_name="hisa_scan_sketch",
        interpret=interpret,
    )(inputs)[0]
    return sort_keys, samples


def _body(shape: Shape, config: Config, interpret: Interpret, refs: Inputs, out: Outputs, smem: Ref) -> None:
    # One CTA, one warp-group:   rows of up to 4 queries -> shared memory, a column a row and group
    #                            table -> page -> 16 bytes of codes a lane -> tensor core -> scales -> relu -> sort keys
    #
    # Four CTAs of a multiprocessor hide each other's waits; a warp has 4.8 KB on their way. out: [T, n].
    tile, part = lax.axis_index("tile"), lax.axis_index("part")
    if refs.tiles is None:
        assert refs.first is not None and refs.limit is not None
        query, n_queries, row, most = tile, jnp.int32(1), refs.first[tile], refs.limit[tile]
    else:
        query, n_queries, row, most = (refs.tiles[tile, i] for i in range(4))
    token = part * (config.steps * STEP)
    steps = jnp.clip((jnp.minimum(most, shape.out_columns) - token + (STEP - 1)) // STEP, 0, config.steps)
    steps = jnp.where(n_queries > 0, steps, 0)
    if interpret:
        _reference(shape, config, refs, Part(query, n_queries, row, token, steps), out)
    else:
        sketch_loop.score(shape, refs, Part(query, n_queries, row, token, steps), out, smem)


def _reference(shape: Shape, config: Config, refs: Inputs, part: Part, out: Outputs) -> None:
    """`sketch_loop.score` in jnp, for interpret mode, which cannot run PTX."""
    place = jnp.arange(STEP, dtype=jnp.int32)

    def one_step(step: Array, _: None) -> None:
        token = part.token + step * STEP
        index = part.row + token + place
        page = refs.table[...][jnp.minimum(index // shape.page_size, shape.table_size - 1)]
        page = jnp.clip(page, 0, shape.n_pages - 1)
        rows = page * shape.page_size + index % shape.page_size
        codes, scales = refs.codes[...][rows], refs.code_scales[...][rows]
        k = sketches.unpack(codes, scales, ROW_BYTES, jnp.float32)
        for i in range(config.tile_t):

            def one_query(t: Array = part.query + i) -> None:
                x = jnp.sum(refs.q[t].astype(jnp.float32)[:, None, :] * k[None], axis=2)[: shape.n]
                x = jnp.where((jnp.arange(shape.n) < shape.n_linear)[:, None] | ~(x < 0), x, 0.0)
                x = jnp.sum(x * refs.w[t][: shape.n, None], axis=0)
                x = x if refs.k_scale is None else x * refs.k_scale[...][rows]
                out.sort_keys[t, pl.ds(token, STEP)] = sort_key_of(x)
                n = STEP // shape.sample_step
                samples = sort_key_of(x).reshape(n, shape.sample_step)[:, 0]
                out.samples[t, pl.ds(token // shape.sample_step, n)] = samples

            pl.when(i < part.n_queries)(one_query)

    lax.fori_loop(0, part.steps, one_step, None)
