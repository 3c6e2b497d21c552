"""Rows that a page table scatters over device memory, a span of them to shared memory: in PTX, by one warp.

Each lane looks its rows up in the table and has the copy engine bring them, a bulk copy a row: the engine takes no list
of rows. Rows then lie side by side without swizzle, `PAD` bytes apart, and their scales
beside them. Copies and lanes arrive at a barrier of Pallas, together as one of its arrivals.
"""

import functools
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir.dialects import arith

from hisa_jax.kernels_pallas.mosaic_gpu.barriers import barrier_address
from hisa_jax.kernels_pallas.mosaic_gpu.ptx.inline import REF, SPLAT, address_of, i32, scope
from hisa_jax.kernels_pallas.types import Ref

PAD = 16  # bytes: rows must begin at a multiple of so many
_WARP = 32
# What the $NAMEs of the text stand for, in order.
_OPERANDS = ("TABLE", "ROWS", "SCALES", "KEYS", "SCALES_SMEM", "BARRIER", "FIRST")


class Source(NamedTuple):
    """Rows in device memory."""

    rows: Ref  # [n_rows, parts, D]
    scales: Ref | None  # [n_rows]
    table: Ref  # names rows, clipped to those that there are


class Target(NamedTuple):
    """Slots of shared memory, each of tiles * rows / len(full) rows."""

    rows: Ref  # [tiles, rows a tile, D * parts and `PAD` bytes]
    scales: Ref | None  # [tiles, rows a tile]
    full: Ref  # barriers, one a slot


def copy_rows(source: Source, target: Target, slot: Array, first: Array) -> None:
    """Starts copying the rows that table[first], table[first + 1], ... name to a slot, and arrives at its barrier."""
    (n_rows, parts, D), n_slots = source.rows.shape, target.full.shape[0]
    n, has_scale = target.rows.shape[0] * target.rows.shape[1] // n_slots, source.scales is not None
    row_bytes = parts * D * jnp.dtype(source.rows.dtype).itemsize
    ptx = copy_ptx(n, row_bytes, n_rows, source.table.shape[0], has_scale)
    refs = [source.rows, target.rows, source.table] + ([source.scales, target.scales] if has_scale else [])
    scalars = [barrier_address(target.full), slot, first]

    @plgpu.inline_mgpu(arg_types=(*(REF for _ in refs), *(SPLAT for _ in scalars)))
    def copy(_ctx, rows, tiles, table, *rest):
        barrier, slot, first = (x.registers.item() for x in rest[-len(scalars) :])
        row = arith.muli(slot, utils.c(n, i32()))
        scales, scale_tiles = rest[:2] if has_scale else (table, tiles)
        operands = {
            "TABLE": utils.memref_ptr(table),
            "ROWS": utils.memref_ptr(rows),
            "SCALES": utils.memref_ptr(scales),
            "KEYS": address_of(tiles, row, (row_bytes + PAD) // 4),
            "SCALES_SMEM": address_of(scale_tiles, row, 1),
            "BARRIER": arith.addi(barrier, arith.muli(slot, utils.c(8, i32()))),
            "FIRST": first,
        }
        utils.inline_ptx(ptx, *(operands[name] for name in _OPERANDS), has_side_effects=True, convergent=True)

    copy(*refs, *scalars)


@functools.cache
def copy_ptx(n: int, row_bytes: int, n_rows: int, table_size: int, has_scale: bool) -> str:
    """n rows, a multiple of 32; a lane takes every 32nd."""
    each = range(n // _WARP)
    names = lambda name: ", ".join(f"{name}{i}" for i in each)  # noqa: E731
    lines = [
        f""".reg .b32 lane, at, {names("row")}; .reg .f32 {names("scale")}; .reg .b64 a;
mov.u32 lane, %laneid; mbarrier.expect_tx.shared::cta.b64 [$BARRIER], {len(each) * row_bytes};"""
    ]
    # All at once, so that one wait is for all of them. Columns after the table are seen by no query.
    lines += [
        f"""add.s32 at, lane, $FIRST; add.s32 at, at, {_WARP * i}; min.s32 at, at, {table_size - 1};
mul.wide.s32 a, at, 4; add.s64 a, a, $TABLE; ld.global.nc.b32 row{i}, [a];"""
        for i in each
    ]
    lines += [f"max.s32 row{i}, row{i}, 0; min.s32 row{i}, row{i}, {n_rows - 1};" for i in each]
    if has_scale:
        lines += [f"mul.wide.s32 a, row{i}, 4; add.s64 a, a, $SCALES; ld.global.nc.f32 scale{i}, [a];" for i in each]
    lines.append(f"mad.lo.u32 at, lane, {row_bytes + PAD}, $KEYS;")
    for i in each:
        # The engine counts bytes down at the barrier; the lane expected all of its rows' bytes above.
        lines.append(
            f"""mul.wide.s32 a, row{i}, {row_bytes}; add.s64 a, a, $ROWS;
cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [at], [a], {row_bytes}, [$BARRIER];
add.u32 at, at, {_WARP * (row_bytes + PAD)};"""
        )
    if has_scale:
        lines.append("shl.b32 at, lane, 2; add.u32 at, at, $SCALES_SMEM;")
        lines += [f"st.shared.f32 [at+{4 * _WARP * i}], scale{i};" for i in each]
    # A warp stands for a warp-group, whose arrivals Pallas counts by thread: each lane arrives four times.
    lines.append(f"mbarrier.arrive.release.cta.shared::cta.b64 _, [$BARRIER], {128 // _WARP};")
    return scope("\n".join(lines) + "\n", _OPERANDS)
