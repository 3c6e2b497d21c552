"""Scan scores of sketches, by a warp-group from loads to stores, in PTX: see sketch_loop_text.py.

Nothing is copied to shared memory but the queries' rows: a lane loads 16 bytes of codes that are then its part of the
tensor core's operand, two steps ahead. Pallas has no product of a register operand in 8 bits that it did not load
itself.
"""

from typing import NamedTuple

from jax import Array
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir.dialects import arith

from hisa_jax.kernels_pallas.mosaic_gpu.ptx.inline import REF, SPLAT, address_of, i32
from hisa_jax.kernels_pallas.mosaic_gpu.ptx.sketch_loop_text import ROW_BYTES, Shape, loop_ptx
from hisa_jax.kernels_pallas.types import Ref


class Inputs(NamedTuple):
    """Whole arrays in device memory."""

    q: Ref  # [T, rows, 128] float8_e4m3fn
    w: Ref  # [T, rows] float32
    tiles: Ref | None  # [n, 4] int32, as of `Sequences.query_tiles`; None: each query by itself
    limit: Ref | None  # [T] int32, tokens of each query, and the row of the first of them, if there are no tiles
    first: Ref | None
    codes: Ref  # [S, 64] uint8
    code_scales: Ref  # [S, 4] bfloat16
    k_scale: Ref | None  # [S] float32
    table: Ref  # [n] int32, pages


class Part(NamedTuple):
    """What a warp-group scores, int32 scalars.

    Attributes: the first query, how many; the row of their sequence's first key; the first token; how many steps.
    """

    query: Array
    n_queries: Array
    row: Array
    token: Array
    steps: Array


class Outputs(NamedTuple):
    """Sort keys of all tokens, and of every shape.sample_step-th one."""

    sort_keys: Ref  # [T, shape.out_columns] int32
    samples: Ref  # [T, shape.out_columns / shape.sample_step] int32


def score(shape: Shape, refs: Inputs, part: Part, out: Outputs, smem: Ref) -> None:
    """Writes the sort keys of a part; `smem`: shape.smem_bytes of shared memory."""
    arrays = [refs.codes, refs.code_scales, refs.codes if refs.k_scale is None else refs.k_scale, refs.table]
    refs_of = [*arrays, refs.q, refs.w, out.sort_keys, out.samples, smem]

    @plgpu.inline_mgpu(arg_types=(*(REF for _ in refs_of), *(SPLAT for _ in part)))
    def run(_ctx, codes, code_scales, k_scale, table, q, w, o, samples, smem, *scalars):
        query, n_queries, row, token, steps = (x.registers.item() for x in scalars)
        first_row = arith.muli(query, utils.c(shape.rows, i32()))
        utils.inline_ptx(
            loop_ptx(shape),
            *(utils.memref_ptr(x) for x in (codes, code_scales, k_scale, table)),
            address_of(q, first_row, ROW_BYTES // 4),
            address_of(w, first_row, 1),
            address_of(o, query, shape.out_columns),
            address_of(samples, query, shape.out_columns // shape.sample_step),
            utils.memref_ptr(smem),
            row,
            token,
            steps,
            n_queries,
            has_side_effects=True,
            convergent=True,
        )

    run(*refs_of, *part)
