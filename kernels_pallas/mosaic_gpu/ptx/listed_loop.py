"""Scores of listed tokens of one query, by a warp-group from the list to sort keys, in PTX: see listed_loop_text.py."""

from typing import NamedTuple

from jax import Array
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir.dialects import arith

from hisa_jax.kernels_pallas.mosaic_gpu.ptx.inline import REF, SPLAT, address_of, i32
from hisa_jax.kernels_pallas.mosaic_gpu.ptx.listed_loop_text import ROW_BYTES, Shape, loop_ptx
from hisa_jax.kernels_pallas.types import Ref


class Inputs(NamedTuple):
    """Whole arrays in device memory."""

    q: Ref  # [T, H, 128] float8_e4m3fn
    w: Ref  # [T, H] float32
    k: Ref  # [S, 128] float8_e4m3fn
    k_scale: Ref | None  # [S] float32
    table: Ref | None  # [n] int32, pages
    tokens: Ref  # [T, capacity] int32
    count: Ref  # [T] int32
    first: Ref  # [T] int32, the row of the first key of a query's sequence


class Part(NamedTuple):
    """What a warp-group scores, int32 scalars: the query, its sequence's first row, a slot of its list, steps."""

    query: Array
    row: Array
    slot: Array
    steps: Array


def score(shape: Shape, refs: Inputs, part: Part, o: Ref, smem: Ref) -> None:
    """Writes the sort keys of a part to o [T, capacity] int32; `smem`: shape.smem_bytes of shared memory."""
    k_scale, table = refs.k_scale, refs.table
    arrays = [refs.k, refs.k if k_scale is None else k_scale, refs.k if table is None else table]
    refs_of = [*arrays, refs.tokens, refs.q, refs.w, o, smem]

    @plgpu.inline_mgpu(arg_types=(*(REF for _ in refs_of), *(SPLAT for _ in part)))
    def run(_ctx, k, k_scale, table, tokens, q, w, o, smem, *scalars):
        query, row, slot, steps = (x.registers.item() for x in scalars)
        first_head = arith.muli(query, utils.c(shape.H, i32()))
        utils.inline_ptx(
            loop_ptx(shape),
            *(utils.memref_ptr(x) for x in (k, k_scale, table)),
            address_of(tokens, query, shape.capacity),
            address_of(q, first_head, ROW_BYTES // 4),
            address_of(w, first_head, 1),
            address_of(o, query, shape.capacity),
            utils.memref_ptr(smem),
            row,
            slot,
            steps,
            has_side_effects=True,
            convergent=True,
        )

    run(*refs_of, *part)
