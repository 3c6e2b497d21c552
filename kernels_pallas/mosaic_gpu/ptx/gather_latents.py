"""Rows of latents in 8 bits, by an index list, to where the tensor core reads them in bfloat16: PTX of a warp.

As `gather_rows`, but what is copied is half as long as what the tensor core reads, and lies where its first half will:
all copies of a tile are on their way together, without a register. As soon as a block of 8 rows has landed, lanes read
it and write over it: 8 e4m3 numbers become a chunk of 16 bytes. An e4m3 number, its bits moved by four places, is a
bfloat16 number that is 2^-120 of it, a subnormal one too. So one product gives the value: by 2^120 times the scale in
bfloat16, or two where a scale is too large for that. The rope part is bfloat16 already and is copied to its place.

Copies and conversions are loops: what is run once a tile and is as long as a tile's text would have to be fetched anew
each time, 7 cycles an instruction.
"""

import functools

from jax import Array
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith

from hisa_jax.kernels_pallas.mosaic_gpu.ptx.gather_rows import BARRIER_WORDS, HINT, KEEP, ROWS_PER_WARP, TileRows
from hisa_jax.kernels_pallas.mosaic_gpu.ptx.inline import NOUNROLL, REF, SPLAT, Row, address_of, i32, scope
from hisa_jax.kernels_pallas.mosaic_gpu.warpgroups import tiled
from hisa_jax.latents import GROUP, QuantizedLatents

_LANES = 8  # that copy the 128 bytes of a group of a row together
_ROWS = 32 // _LANES  # an instruction
_BLOCK = 8  # rows that the swizzle repeats after; of a group of values they are converted together
_BLOCKS = ROWS_PER_WARP // _BLOCK
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
        f""".reg .pred p, q, more, wide; .reg .b32 lane, c, r, row, from, t, bad, s, n, y, big, v<{8 * len(groups)}>;
.reg .b32 x<4>, s<{n_groups}>, copied, read0, read1, stored0, stored1, rope0, rope1; .reg .b64 a, source, rope;
mov.u32 lane, %laneid; and.b32 c, lane, {_LANES - 1}; shr.u32 from, lane, {_LANES.bit_length() - 1}; {KEEP}"""
    ]
    # A lane holds the scales of its own row.
    lines.append(f"setp.lt.s32 q, $ROW, 0; mad.wide.s32 a, $ROW, {4 * n_groups}, $SCALES;")
    for group in groups:
        lines.append(f"mov.b32 s{group}, 0; @!q ld.global.nc.b32 s{group}, [a+{4 * group}];")
    # Row r of a block begins at r * 128. Chunk j of what the tensor core reads lies there at (j ^ r) * 16. Of what is
    # copied, odd rows have the second half first: then no two of the lanes that read together meet in a bank.
    lines.append("""shl.b32 r, from, 7; add.u32 r, r, $TILE; and.b32 t, from, 1; shl.b32 t, t, 6;
shl.b32 copied, c, 4; xor.b32 copied, copied, t; add.u32 copied, copied, r;
shl.b32 read0, c, 3; add.u32 read0, read0, t; add.u32 read0, read0, r; xor.b32 read1, read0, 64;
xor.b32 stored0, c, from; shl.b32 stored0, stored0, 4; add.u32 stored0, stored0, r; xor.b32 stored1, stored0, 64;
mul.wide.u32 source, c, 16; add.u64 rope, source, $ROPE; add.u64 source, source, $VALUES;
mov.b32 rope0, stored0; mov.b32 rope1, stored1; mov.b32 r, from;""")
    lines.append(_copies_text(n_groups, groups, has_rope, block_bytes))
    # A lane's factor is 2^120 times its scale. Where that is too much for bfloat16, all take two products.
    lines.append("mov.b32 big, 0x7b807b80; mov.b32 t, 0;")
    for group in groups:
        s = f"s{group}"
        lines.append(f"and.b32 y, {s}, 0x7fffffff; max.u32 t, t, y; cvt.rn.bf16x2.f32 {s}, {s}, {s};")
    lines.append("setp.ge.u32 p, t, 0x43000000; vote.sync.any.pred wide, p, -1;")  # 128.0
    lines += [f"@!wide mul.rn.bf16x2 s{group}, s{group}, big;" for group in groups]
    lines.append(f"cp.async.wait_group {_BLOCKS - 1}; bar.warp.sync -1; mov.b32 n, 0;")
    pieces = [(group, i) for group in groups for i in range(_BLOCK // _ROWS)]
    lines += [_read_text(k, *piece, "") for k, piece in enumerate(pieces)]
    lines.append("@wide bra.uni convert_wide;")
    lines.append(_convert_text("convert", pieces, block_bytes, False) + " bra.uni converted;")
    lines.append(_convert_text("convert_wide", pieces, block_bytes, True))
    # The tensor core is to see what this lane has stored before its arrival.
    lines.append("converted: fence.proxy.async.shared::cta; mbarrier.arrive.shared::cta.b64 _, [$LANDED];")
    return "\n".join(lines) + "\n"


def _copies_text(n_groups: int, groups: tuple[int, ...], has_rope: bool, block_bytes: int) -> str:
    """A loop over blocks, each a group of copies. Addresses are a lane's own, for what `gather_rows` says of hints."""
    copy = f"cp.async.cg.shared.global{HINT}"
    lines = [f"mov.b32 n, 0; copy: {NOUNROLL}"]
    for i in range(_BLOCK // _ROWS):
        lines.append(f"""add.u32 t, r, {i * _ROWS}; shfl.sync.idx.b32 row, $ROW, t, 31, -1; setp.lt.s32 p, row, 0;
mad.wide.s32 a, row, {n_groups * GROUP}, source;""")
        lines += [f"{copy} [copied+{_offset(i, group)}], [a+{group * GROUP}], 16, p, policy;" for group in groups]
        if has_rope:
            lines.append(f"""mad.wide.s32 a, row, {_ROPE_BYTES}, rope;
{copy} [rope{i}+{_offset(i, n_groups)}], [a], 16, p, policy;""")
    lines.append(f"""add.u32 r, r, {_BLOCK}; add.u32 copied, copied, {block_bytes}; cp.async.commit_group;
add.u32 rope0, rope0, {block_bytes}; add.u32 rope1, rope1, {block_bytes};
add.u32 n, n, 1; setp.lt.u32 p, n, {_BLOCKS}; @p bra.uni copy;""")
    if has_rope:  # `noinc`: the arrival counts as one of those that the barrier was made for
        lines.append("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [$LANDED];")
    return "\n".join(lines)


def _convert_text(label: str, pieces: list[tuple[int, int]], block_bytes: int, is_wide: bool) -> str:
    """A loop over blocks. As soon as words of one are stored, those of the next are read into their registers."""
    lines = [f"{label}: {NOUNROLL}"]
    # With an empty group in each turn, all but the last ones are those up to the next block.
    lines.append(f"""cp.async.commit_group; cp.async.wait_group {_BLOCKS - 1};
bar.warp.sync -1; setp.lt.u32 more, n, {_BLOCKS - 1};""")  # all lanes have read what this one writes over
    lines.append(f"add.u32 read0, read0, {block_bytes}; add.u32 read1, read1, {block_bytes};")
    for k, (group, i) in enumerate(pieces):
        lines += [_store_text(k, group, i, is_wide), _read_text(k, group, i, "@more ")]
    lines.append(f"""add.u32 stored0, stored0, {block_bytes}; add.u32 stored1, stored1, {block_bytes};
add.u32 from, from, {_BLOCK}; add.u32 n, n, 1; @more bra.uni {label};""")
    return "\n".join(lines)


def _offset(i: int, group: int) -> int:
    """Where rows 4 i, ... of a group of values begin in a block."""
    return i * _ROWS * 128 + group * 2 * 128 * _BLOCK


def _read_text(k: int, group: int, i: int, guard: str) -> str:
    """A lane's four words of rows 4 i, ... of a block: two of each half of the group."""
    v, at = [f"v{4 * k + j}" for j in range(4)], _offset(i, group)
    return f"""{guard}ld.shared.v2.b32 {{{v[0]}, {v[1]}}}, [read0+{at}];
{guard}ld.shared.v2.b32 {{{v[2]}, {v[3]}}}, [read1+{at}];"""


def _store_text(k: int, group: int, i: int, is_wide: bool) -> str:
    """What `_read_text` has read, in bfloat16, to its place: a lane writes chunk c of both halves of its group."""
    v, at = [f"v{4 * k + j}" for j in range(4)], _offset(i, group)
    lines = [f"add.u32 r, from, {i * _ROWS}; shfl.sync.idx.b32 s, s{group}, r, 31, -1; mov.b32 bad, 0;"]
    for j in range(0, 4, 2):  # a byte of 0x7f or 0xff is NaN: then the scale is, too
        lines.append(f"""and.b32 t, {v[j]}, 0x7f7f7f7f; add.u32 t, t, 0x01010101; and.b32 y, {v[j + 1]}, 0x7f7f7f7f;
add.u32 y, y, 0x01010101; lop3.b32 bad, bad, t, y, 0xfe;""")
    lines.append("and.b32 bad, bad, 0x80808080; setp.ne.u32 p, bad, 0; selp.b32 s, 0x7fff7fff, s, p;")
    for half in range(2):
        pairs = [(word, selector) for word in v[2 * half : 2 * half + 2] for selector in (0x4140, 0x4342)]
        lines += [_pair_text(f"x{j}", *pair, is_wide) for j, pair in enumerate(pairs)]
        lines.append(f"st.shared.v4.b32 [stored{i}+{at + half * 128 * _BLOCK}], {{x0, x1, x2, x3}};")
    return "\n".join(lines)


def _pair_text(target: str, word: str, selector: int, is_wide: bool) -> str:
    """Two of a word's e4m3 bytes -> `target`, a pair of bfloat16, times the factor `s`.

    A byte is moved by four places, and its sign by eight: so that half of this is multiplications, which another unit
    of the multiprocessor makes than bitwise operations.
    """
    first = "mul.rn.bf16x2 t, t, big; " if is_wide else ""
    return f"""prmt.b32 y, {word}, 0, {selector:#x}; and.b32 t, y, 0x00800080; mul.lo.u32 t, t, 240;
mad.lo.u32 t, y, 16, t; {first}mul.rn.bf16x2 {target}, t, s;"""
