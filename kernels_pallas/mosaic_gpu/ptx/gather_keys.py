"""Rows that a page table scatters over device memory, a span of them to shared memory: in PTX, by one warp.

Each lane looks its rows up in the table and has the copy engine bring them, a bulk copy a row: the engine takes no
index list, but a row in one piece. Rows then lie side by side without swizzle, `PAD` bytes apart, and their scales
beside them. Copies and lanes arrive at a barrier of Pallas, together as one of its arrivals.
"""

import functools
import re

import jax.numpy as jnp
from jax import Array
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith

from hisa_jax.kernels_pallas.mosaic_gpu.barriers import barrier_address
from hisa_jax.kernels_pallas.mosaic_gpu.ptx.lanes import address_of
from hisa_jax.kernels_pallas.types import Ref

PAD = 16  # bytes: rows must begin at a multiple of so many
_WARP = 32
_SPLAT = plgpu.Layout.WG_SPLAT
# What the $NAMEs of the text stand for.
_OPERANDS = ("TABLE", "ROWS", "SCALES", "KEYS", "SCALES_SMEM", "BARRIER", "FIRST", "WANTED")


def copy_rows(
    rows_gmem: Ref,
    scales_gmem: Ref | None,
    table_gmem: Ref,
    first: Array,
    wanted: Array,
    rows_smem: Ref,
    scales_smem: Ref | None,
    barriers: Ref,
    slot: Array,
) -> None:
    """Starts copying the rows that table_gmem[first : first + n] names to slot `slot`, and arrives at barriers[slot].

    Args:
        rows_gmem: [n_rows, parts, D]; scales_gmem: [n_rows]; what the table names is clipped to those.
        wanted: int32, 0 to copy nothing and only arrive.
        rows_smem: [tiles, rows a tile, D * parts and `PAD` bytes], of which tiles * rows / len(barriers) = n are a
            slot's; scales_smem: [tiles, rows a tile].
    """
    (n_rows, parts, D), n_slots = rows_gmem.shape, barriers.shape[0]
    n = rows_smem.shape[0] * rows_smem.shape[1] // n_slots
    row_bytes = parts * D * jnp.dtype(rows_gmem.dtype).itemsize
    ptx = copy_ptx(n, row_bytes, n_rows, table_gmem.shape[0], scales_gmem is not None)
    refs = [rows_gmem, rows_smem, table_gmem]
    refs += [] if scales_gmem is None else [scales_gmem, scales_smem]
    scalars = [barrier_address(barriers), slot, first, wanted]

    @plgpu.inline_mgpu(arg_types=(*(plgpu.RefType() for _ in refs), *(_SPLAT for _ in scalars)))
    def copy(_ctx, rows, tiles, table, *rest):
        barrier, slot, first, wanted = (x.registers.item() for x in rest[-len(scalars) :])
        row = arith.muli(slot, utils.c(n, ir.IntegerType.get_signless(32)))
        scales, scale_tiles = rest[:2] if scales_gmem is not None else (table, tiles)
        operands = {
            "TABLE": utils.memref_ptr(table),
            "ROWS": utils.memref_ptr(rows),
            "SCALES": utils.memref_ptr(scales),
            "KEYS": address_of(tiles, row, (row_bytes + PAD) // 4),
            "SCALES_SMEM": address_of(scale_tiles, row, 1),
            "BARRIER": arith.addi(barrier, arith.muli(slot, utils.c(8, ir.IntegerType.get_signless(32)))),
            "FIRST": first,
            "WANTED": wanted,
        }
        utils.inline_ptx(ptx, *(operands[name] for name in _OPERANDS), has_side_effects=True, convergent=True)

    copy(*refs, *scalars)


@functools.cache
def copy_ptx(n: int, row_bytes: int, n_rows: int, table_size: int, has_scale: bool) -> str:
    """n rows, a multiple of 32; a lane takes every 32nd."""
    each = range(n // _WARP)
    names = lambda name: ", ".join(f"{name}{i}" for i in each)  # noqa: E731
    lines = [
        f""".reg .pred p; .reg .b32 lane, at, bytes, {names("row")}; .reg .f32 {names("scale")}; .reg .b64 a;
mov.u32 lane, %laneid; setp.gt.s32 p, $WANTED, 0; selp.b32 bytes, {len(each) * row_bytes}, 0, p;
mbarrier.expect_tx.shared::cta.b64 [$BARRIER], bytes;"""
    ]
    # All at once, so that one wait is for all of them. What lies behind the table nobody sees.
    lines += [
        f"""add.s32 at, lane, $FIRST; add.s32 at, at, {_WARP * i}; min.s32 at, at, {table_size - 1};
mul.wide.s32 a, at, 4; add.s64 a, a, $TABLE; mov.b32 row{i}, 0; @p ld.global.nc.b32 row{i}, [a];"""
        for i in each
    ]
    lines += [f"max.s32 row{i}, row{i}, 0; min.s32 row{i}, row{i}, {n_rows - 1};" for i in each]
    if has_scale:
        lines += [f"mul.wide.s32 a, row{i}, 4; add.s64 a, a, $SCALES; ld.global.nc.f32 scale{i}, [a];" for i in each]
    lines.append(f"mad.lo.u32 at, lane, {row_bytes + PAD}, $KEYS;")
    for i in each:
        lines.append(
            f"""mul.wide.s32 a, row{i}, {row_bytes}; add.s64 a, a, $ROWS;
@p cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [at], [a], {row_bytes}, [$BARRIER];
add.u32 at, at, {_WARP * (row_bytes + PAD)};"""
        )
    if has_scale:
        lines.append("shl.b32 at, lane, 2; add.u32 at, at, $SCALES_SMEM;")
        lines += [f"st.shared.f32 [at+{4 * _WARP * i}], scale{i};" for i in each]
    lines.append(f"mbarrier.arrive.release.cta.shared::cta.b64 _, [$BARRIER], {128 // _WARP};")
    text = "\n".join(lines)
    return "{\n" + re.sub(r"\$([A-Z_]+)", lambda name: f"${_OPERANDS.index(name[1])}", text) + "\n}"
