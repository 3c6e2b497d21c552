"""Rows of latents in 8 bits, by an index list, to where the tensor core reads them in bfloat16: PTX of a warp.

As `gather_rows`, but what is copied is half as long as what the tensor core reads, and lies where its first half will:
all copies of a tile are on their way together, without a register. When they have landed, lanes read 8 rows of a group
of values and write over them: 8 e4m3 numbers become a chunk of 16 bytes. An e4m3 number, its bits moved by four places,
is a bfloat16 number that is 2^-120 of it, a subnormal one too. So two products give the value: by 2^120, which is
exact, and by the scale in bfloat16. The rope part is bfloat16 already and is copied to its place.
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

_LANES = 8  # that copy the 128 bytes of a group of a row together
_ROWS = 32 // _LANES  # an instruction
_BLOCK = 8  # rows that the swizzle repeats after; of a group of values they are converted together
_STEPS = 2  # half of the rows are converted while the other half is on its way
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
    block_bytes = _BLOCK * row_bytes
    lines = [
        f""".reg .pred p, q; .reg .b32 lane, c, r, row, from, t, bad, s, copied, read0, read1, stored0, stored1, big;
.reg .b32 x, y, u, v<16>, s<{n_groups}>; .reg .b64 a, source; mov.u32 lane, %laneid; mov.b32 big, 0x7b807b80;
and.b32 c, lane, {_LANES - 1}; shr.u32 from, lane, {_LANES.bit_length() - 1};"""
    ]
    # A lane holds the scales of its own row.
    lines.append(f"setp.lt.s32 q, $ROW, 0; mad.wide.s32 a, $ROW, {4 * n_groups}, $SCALES;")
    for group in groups:
        lines.append(f"mov.b32 s{group}, 0; @!q ld.global.nc.b32 s{group}, [a+{4 * group}];")
    if has_rope:
        lines.append(_rope_text(block_bytes, n_groups))
    # Row r of a block begins at r * 128. Chunk j of what the tensor core reads lies there at (j ^ r) * 16. Of what is
    # copied, odd rows have the second half first: then no two of the lanes that read together meet in a bank.
    lines.append("""shl.b32 r, from, 7; add.u32 r, r, $TILE; and.b32 t, from, 1; shl.b32 t, t, 6;
shl.b32 copied, c, 4; xor.b32 copied, copied, t; add.u32 copied, copied, r;
shl.b32 read0, c, 3; add.u32 read0, read0, t; add.u32 read0, read0, r; xor.b32 read1, read0, 64;
xor.b32 stored0, c, from; shl.b32 stored0, stored0, 4; add.u32 stored0, stored0, r; xor.b32 stored1, stored0, 64;
mul.wide.u32 source, c, 16; add.u64 source, source, $VALUES;""")
    n_loads = ROWS_PER_WARP // _ROWS
    for i in range(n_loads):
        lines.append(f"""add.u32 r, from, {i * _ROWS}; shfl.sync.idx.b32 row, $ROW, r, 31, -1; setp.lt.s32 p, row, 0;
mad.wide.s32 a, row, {n_groups * GROUP}, source;""")
        for group in groups:
            at = _offset(i, group, block_bytes)
            lines.append(f"cp.async.cg.shared.global [copied+{at}], [a+{group * GROUP}], 16, p;")
        if (i + 1) % (n_loads // _STEPS) == 0:
            lines.append("cp.async.commit_group;")
    for group in groups:
        lines.append(f"cvt.rn.bf16x2.f32 s{group}, s{group}, s{group};")
    blocks = [(block, group) for block in range(ROWS_PER_WARP // _BLOCK) for group in groups]
    for step in range(_STEPS):
        lines.append(f"cp.async.wait_group {_STEPS - 1 - step}; bar.warp.sync -1;")
        some = blocks[step * len(blocks) // _STEPS : (step + 1) * len(blocks) // _STEPS]
        lines.append(_read_text(*some[0], 0, block_bytes))
        for i, block in enumerate(some):
            if i + 1 < len(some):
                lines.append(_read_text(*some[i + 1], (i + 1) % 2, block_bytes))
            lines.append("bar.warp.sync -1;")  # all lanes have read what this one writes over
            lines.append(_store_text(*block, i % 2, block_bytes))
    # The tensor core is to see what this lane has stored before its arrival.
    lines.append("fence.proxy.async.shared::cta; mbarrier.arrive.shared::cta.b64 _, [$LANDED];")
    return "\n".join(lines) + "\n"


def _offset(i: int, group: int, block_bytes: int) -> int:
    """Where rows 4 i, ... of a group of values begin in shared memory."""
    per_block = _BLOCK // _ROWS
    return i // per_block * block_bytes + i % per_block * _ROWS * 128 + group * 2 * 128 * _BLOCK


def _words(i: int, buffer: int) -> list[str]:
    """The four words of a lane of rows 4 i, ... of a block: two of each half of its group."""
    return [f"v{8 * buffer + 4 * i + j}" for j in range(4)]


def _read_text(block: int, group: int, buffer: int, block_bytes: int) -> str:
    lines = []
    for i in range(_BLOCK // _ROWS):
        v, at = _words(i, buffer), _offset(block * _BLOCK // _ROWS + i, group, block_bytes)
        lines.append(f"""ld.shared.v2.b32 {{{v[0]}, {v[1]}}}, [read0+{at}];
ld.shared.v2.b32 {{{v[2]}, {v[3]}}}, [read1+{at}];""")
    return "\n".join(lines)


def _store_text(block: int, group: int, buffer: int, block_bytes: int) -> str:
    """What `_read_text` has read, in bfloat16, to its place: a lane writes chunk c of both halves of its group."""
    lines = []
    for i in range(_BLOCK // _ROWS):
        v, at = _words(i, buffer), _offset(block * _BLOCK // _ROWS + i, group, block_bytes)
        lines.append(f"add.u32 r, from, {block * _BLOCK + i * _ROWS}; shfl.sync.idx.b32 s, s{group}, r, 31, -1;")
        lines.append("mov.b32 bad, 0;")
        for word in v:  # a byte of 0x7f or 0xff is NaN: then the scale is, too
            lines.append(
                f"and.b32 t, {word}, 0x7f7f7f7f; add.u32 t, t, 0x01010101; lop3.b32 bad, t, 0x80808080, bad, 0xea;"
            )
        lines.append("setp.ne.u32 p, bad, 0; selp.b32 s, 0x7fff7fff, s, p;")
        for half in range(2):
            stored = []
            for j in range(2):
                word = v[2 * half + j]
                # In place: the upper pair into the word itself.
                lines += [_pair_text("x" if j == 0 else "u", word, 0x1404), _pair_text(word, word, 0x3424)]
                stored += ["x" if j == 0 else "u", word]
            lines.append(f"st.shared.v4.b32 [stored{i}+{at + half * 128 * _BLOCK}], {{{', '.join(stored)}}};")
    return "\n".join(lines)


def _pair_text(target: str, word: str, selector: int) -> str:
    """Two of a word's e4m3 bytes -> `target`, a pair of bfloat16, times 2^120 and the scale `s`."""
    return f"""prmt.b32 y, {word}, 0, {selector:#x}; shr.u32 t, y, 4; and.b32 t, t, 0x07f007f0;
lop3.b32 t, t, y, 0x80008000, 0xf8; mul.rn.bf16x2 t, t, big; mul.rn.bf16x2 {target}, t, s;"""


def _rope_text(block_bytes: int, n_groups: int) -> str:
    """Copies of the rope parts, which arrive when they have landed."""
    lines = ["mul.wide.u32 source, c, 16; add.u64 source, source, $ROPE;"]
    for i in range(ROWS_PER_WARP // _ROWS):
        lines.append(f"""add.u32 r, from, {i * _ROWS}; shfl.sync.idx.b32 row, $ROW, r, 31, -1; setp.lt.s32 p, row, 0;
mad.wide.s32 a, row, {_ROPE_BYTES}, source; and.b32 r, r, 7; xor.b32 t, c, r; shl.b32 t, t, 4; shl.b32 r, r, 7;
add.u32 t, t, r; add.u32 t, t, $TILE;
cp.async.cg.shared.global [t+{i * _ROWS // _BLOCK * block_bytes + n_groups * 2 * 1024}], [a], 16, p;""")
    # `noinc`: the arrival counts as one of those that the barrier was made for.
    lines.append("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [$LANDED];")
    return "\n".join(lines)
