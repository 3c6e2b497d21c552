"""Slopes of one query, by a warp-group from its samples' positions to shares, in PTX: see slopes_text.py."""

from typing import NamedTuple

from jax import Array
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir.dialects import arith

from hisa_jax.kernels_pallas.mosaic_gpu.ptx.inline import REF, SPLAT, address_of, i32
from hisa_jax.kernels_pallas.mosaic_gpu.ptx.listed_loop_text import ROW_BYTES
from hisa_jax.kernels_pallas.mosaic_gpu.ptx.slopes_text import Shape, slopes_ptx
from hisa_jax.kernels_pallas.types import Ref


class Inputs(NamedTuple):
    """Whole arrays in device memory."""

    q: Ref  # [T, H, 128] float8_e4m3fn
    w: Ref  # [T, H] float32
    visible: Ref  # [T] int32
    first: Ref  # [T] int32, the row of the first key of a query's sequence, or of its samples
    k: Ref  # [S, 128] float8_e4m3fn
    k_scale: Ref | None  # [S] float32
    table: Ref | None  # [n] int32, pages


def slopes(shape: Shape, refs: Inputs, t: Array, o: Ref, smem: Ref) -> None:
    """Writes the slopes of query t to o [T, H] float32; `smem`: shape.smem_bytes of shared memory."""
    k_scale, table = refs.k_scale, refs.table
    arrays = [refs.k, refs.k if k_scale is None else k_scale, refs.k if table is None else table]
    refs_of, scalars = [*arrays, refs.q, refs.w, o, smem], (t, refs.first[t], refs.visible[t])

    @plgpu.inline_mgpu(arg_types=(*(REF for _ in refs_of), *(SPLAT for _ in scalars)))
    def run(_ctx, k, k_scale, table, q, w, o, smem, *scalars):
        t, row, visible = (x.registers.item() for x in scalars)
        first_head = arith.muli(t, utils.c(shape.listed.H, i32()))
        utils.inline_ptx(
            slopes_ptx(shape),
            *(utils.memref_ptr(x) for x in (k, k_scale, table)),
            address_of(q, first_head, ROW_BYTES // 4),
            address_of(w, first_head, 1),
            address_of(o, first_head, 1),
            utils.memref_ptr(smem),
            row,
            visible,
            has_side_effects=True,
            convergent=True,
        )

    run(*refs_of, *scalars)
