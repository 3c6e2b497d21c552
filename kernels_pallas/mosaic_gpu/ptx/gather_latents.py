"""Rows of latents in 8 bits, by an index list, to where the tensor core reads them in bfloat16: PTX of a warp.

As `gather_rows`, but values go through registers: 16 e4m3 numbers a load, which become two chunks of 16 bytes. An e4m3
number, its bits moved by four places, is a bfloat16 number that is 2^-120 of it, a subnormal one too. So two products
give the value: by 2^120, which is exact, and by the scale in bfloat16. The rope part is bfloat16 already and is copied.
"""

import functools

from jax import Array
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith

from hisa_jax.kernels_pallas.mosaic_gpu.ptx.gather_rows import BARRIER_WORDS, ROWS_PER_WARP, TileRows
from hisa_jax.kernels_pallas.mosaic_gpu.ptx.inline import REF, SPLAT, Row, address_of, i32, scope
from hisa_jax.kernels_pallas.mosaic_gpu.warpgroups import tiled
from hisa_jax.latents import GROUP, QuantizedLatents

_LANES = 8  # that load the 128 bytes of a group of a row together
_ROWS = 32 // _LANES  # an instruction
_LOADS = ROWS_PER_WARP // _ROWS  # of a group; ptxas keeps about five in flight, and converts meanwhile
_ROPE_BYTES = 128


def gather_latents(
    source: QuantizedLatents, row: Array, target: TileRows, groups: tuple[int, ...], has_rope: bool, landed: Row
) -> None:
    """Brings the lanes' rows of latents to a target in bfloat16, zeros for row -1.

    Each of the 32 lanes arrives at the barrier `landed` once, with a rope part a second time when that has landed.

    Args:
        source: refs [*, V], [*, V / 128], [*, 64].
        groups: which of the groups of 128 values; `has_rope`: the features after them, too.
    """
    E = source.values.shape[1] + source.rope.shape[1]
    dtype, rows = source.rope.dtype, target.tiles.shape[1]
    row_bytes = E * dtype.itemsize
    ptx = _latents_ptx(row_bytes, source.scales.shape[1], groups, has_rope)

    @plgpu.inline_mgpu(arg_types=(REF, REF, REF, plgpu.RefType(tiled(E, dtype)), REF, SPLAT, SPLAT, SPLAT, SPLAT))
    def gather(_ctx, values, scales, rope, tiles, barriers, row, slot, first, barrier):
        row_of_tiles = arith.addi(arith.muli(slot.registers.item(), utils.c(rows, i32())), first.registers.item())
        offset = arith.muli(row_of_tiles, utils.c(row_bytes, i32()))
        utils.inline_ptx(
            ptx,
            *map(utils.memref_ptr, (values, scales, rope)),
            utils.getelementptr(utils.memref_ptr(tiles), [offset], ir.IntegerType.get_signless(8)),
            row.registers.item(),
            address_of(barriers, barrier.registers.item(), BARRIER_WORDS),
            has_side_effects=True,
            convergent=True,
        )

    gather(
        source.values, source.scales, source.rope, target.tiles, landed.ref, row, target.slot, target.first, landed.row
    )


@functools.cache
def _latents_ptx(row_bytes: int, n_groups: int, groups: tuple[int, ...], has_rope: bool) -> str:
    return scope(latents_text(row_bytes, n_groups, groups, has_rope), OPERANDS)


OPERANDS = ("VALUES", "SCALES", "ROPE", "TILE", "ROW", "LANDED")


def latents_text(row_bytes: int, n_groups: int, groups: tuple[int, ...], has_rope: bool) -> str:
    """$VALUES, $SCALES, $ROPE: sources, $TILE: 32 rows in shared memory, $ROW: the lane's row, $LANDED: a barrier.

    Args:
        row_bytes: of a row in shared memory, in bfloat16.
        n_groups: of a row; `groups`: those to bring.
    """
    tile_row = 8 * row_bytes  # bytes of 8 rows in shared memory
    lines = [
        f""".reg .pred p, q; .reg .b32 lane, own, c, r, row, from, t, u, bad, s, at0, at1, x, y, big, v<{4 * _LOADS}>;
.reg .b32 s<{n_groups}>; .reg .b64 a, source; mov.u32 lane, %laneid; mov.b32 big, 0x7b807b80;
and.b32 c, lane, {_LANES - 1}; shr.u32 from, lane, {_LANES.bit_length() - 1};"""
    ]
    if has_rope:
        lines.append(_rope_text(tile_row, n_groups))
    # A lane holds the scales of its own row, as pairs of bfloat16.
    lines.append(f"setp.lt.s32 q, $ROW, 0; mad.wide.s32 a, $ROW, {4 * n_groups}, $SCALES;")
    for group in groups:
        lines.append(f"mov.b32 s{group}, 0; @!q ld.global.nc.b32 s{group}, [a+{4 * group}];")
    for group in groups:
        lines.append(f"cvt.rn.bf16x2.f32 s{group}, s{group}, s{group};")
    for group in groups:
        lines.append(
            f"mul.wide.u32 source, c, 16; add.u64 source, source, $VALUES; add.u64 source, source, {group * GROUP};"
        )
        for i in range(_LOADS):
            quad = ", ".join(f"v{4 * i + j}" for j in range(4))
            lines.append(f"""add.u32 r, from, {i * _ROWS}; shfl.sync.idx.b32 row, $ROW, r, 31, -1;
setp.ge.s32 p, row, 0; mad.wide.s32 a, row, {n_groups * GROUP}, source;
{" ".join(f"mov.b32 v{4 * i + j}, 0;" for j in range(4))} @p ld.global.nc.L1::no_allocate.v4.b32 {{{quad}}}, [a];""")
        for i in range(_LOADS):
            lines.append(_store_text(i, group, tile_row))
    # The tensor core is to see what this lane has stored before its arrival.
    lines.append("fence.proxy.async.shared::cta; mbarrier.arrive.shared::cta.b64 _, [$LANDED];")
    return "\n".join(lines) + "\n"


def _store_text(i: int, group: int, tile_row: int) -> str:
    """The four words v of load i -> two chunks of bfloat16 in the row 4 i + `from`."""
    v = [f"v{4 * i + j}" for j in range(4)]
    lines = [f"add.u32 r, from, {i * _ROWS}; shfl.sync.idx.b32 s, s{group}, r, 31, -1; mov.b32 bad, 0;"]
    for word in v:  # a byte of 0x7f or 0xff is NaN: then the scale is, too
        lines.append(
            f"and.b32 t, {word}, 0x7f7f7f7f; add.u32 t, t, 0x01010101; lop3.b32 bad, t, 0x80808080, bad, 0xea;"
        )
    lines.append("setp.ne.u32 p, bad, 0; selp.b32 s, 0x7fff7fff, s, p;")
    # Row r of a tile of 8 rows by 128 bytes begins at r * 128; its chunk j lies at (j ^ r) * 16.
    lines.append("""and.b32 r, r, 7; shl.b32 at1, c, 1; and.b32 t, at1, 7; xor.b32 t, t, r; shl.b32 t, t, 4;
shr.u32 at1, at1, 3; shl.b32 at1, at1, 10; add.u32 at1, at1, $TILE; shl.b32 r, r, 7; add.u32 at1, at1, r;
add.u32 at0, at1, t; xor.b32 t, t, 16; add.u32 at1, at1, t;""")
    at = f"{i * _ROWS // 8 * tile_row + group * 2 * 1024}"
    for half, address in enumerate(("at0", "at1")):
        stored = []
        for j in range(2):
            word = v[2 * half + j]
            # In place: the upper pair into the word itself.
            lines += [_pair_text("x" if j == 0 else "u", word, 0x1404), _pair_text(word, word, 0x3424)]
            stored += ["x" if j == 0 else "u", word]
        lines.append(f"st.shared.v4.b32 [{address}+{at}], {{{', '.join(stored)}}};")
    return "\n".join(lines)


def _pair_text(target: str, word: str, selector: int) -> str:
    """Two of a word's e4m3 bytes -> `target`, a pair of bfloat16, times 2^120 and the scale `s`."""
    return f"""prmt.b32 y, {word}, 0, {selector:#x}; shr.u32 t, y, 4; and.b32 t, t, 0x07f007f0;
lop3.b32 t, t, y, 0x80008000, 0xf8; mul.rn.bf16x2 t, t, big; mul.rn.bf16x2 {target}, t, s;"""


def _rope_text(tile_row: int, n_groups: int) -> str:
    """Copies of the rope parts, which arrive when they have landed."""
    lines = ["mul.wide.u32 source, c, 16; add.u64 source, source, $ROPE;"]
    for i in range(_LOADS):
        lines.append(f"""add.u32 r, from, {i * _ROWS}; shfl.sync.idx.b32 row, $ROW, r, 31, -1; setp.lt.s32 p, row, 0;
mad.wide.s32 a, row, {_ROPE_BYTES}, source; and.b32 r, r, 7; xor.b32 t, c, r; shl.b32 t, t, 4; shl.b32 r, r, 7;
add.u32 t, t, r; add.u32 t, t, $TILE;
cp.async.cg.shared.global [t+{i * _ROWS // 8 * tile_row + n_groups * 2 * 1024}], [a], 16, p;""")
    # `noinc`: the arrival counts as one of those that the barrier was made for.
    lines.append("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [$LANDED];")
    return "\n".join(lines)
