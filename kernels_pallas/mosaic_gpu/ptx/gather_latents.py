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

from hisa_jax.kernels_pallas.mosaic_gpu.ptx.gather_rows import BARRIER_WORDS, HINT, KEEP, ROWS_PER_WARP, TileRows
from hisa_jax.kernels_pallas.mosaic_gpu.ptx.inline import NOUNROLL, REF, SPLAT, Row, address_of, i32, scope
from hisa_jax.kernels_pallas.mosaic_gpu.warpgroups import tiled
from hisa_jax.latents import GROUP, QuantizedLatents

_LANES = 8  # that copy the 128 bytes of a group of a row together
_ROWS = 32 // _LANES  # an instruction
_BLOCK = 8  # rows that the swizzle repeats after; of a group of values they are converted together
_ROPE_BYTES = 128


def gather_latents(
    source: QuantizedLatents, row: Array, target: TileRows, groups: tuple[int, int], has_rope: bool, landed: Row
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
def _latents_ptx(row_bytes: int, n_groups: int, groups: tuple[int, int], has_rope: bool) -> str:
    return scope(latents_text(row_bytes, n_groups, groups, has_rope), OPERANDS)


OPERANDS = ("VALUES", "SCALES", "ROPE", "TILE", "ROW", "LANDED")


def latents_text(row_bytes: int, n_groups: int, groups: tuple[int, int], has_rope: bool) -> str:
    """$VALUES, $SCALES, $ROPE: sources, $TILE: 32 rows in shared memory, $ROW: the lane's row, $LANDED: a barrier.

    Args:
        row_bytes: of a row in shared memory, in bfloat16.
        n_groups: of a row; `groups`: those to bring.
    """
    block_bytes, group_bytes = _BLOCK * row_bytes, 2 * 128 * _BLOCK
    to_next_group = (groups[1] - groups[0]) * group_bytes
    lines = [
        f""".reg .pred p, q, more; .reg .b32 lane, c, r, row, from, t, bad, s, copied, read0, read1, stored0, stored1;
.reg .b32 big, at, at1, next, place, x, y, u, v<8>, n<8>, s<2>; .reg .b64 a, source, rope; mov.u32 lane, %laneid; {KEEP}
and.b32 c, lane, {_LANES - 1}; shr.u32 from, lane, {_LANES.bit_length() - 1}; mov.b32 big, 0x7b807b80;"""
    ]
    # A lane holds the scales of its own row.
    lines.append(f"setp.lt.s32 q, $ROW, 0; mad.wide.s32 a, $ROW, {4 * n_groups}, $SCALES;")
    for i, group in enumerate(groups):
        lines.append(f"mov.b32 s{i}, 0; @!q ld.global.nc.b32 s{i}, [a+{4 * group}];")
    # Row r of a block begins at r * 128. Chunk j of what the tensor core reads lies there at (j ^ r) * 16. Of what is
    # copied, odd rows have the second half first: then no two of the lanes that read together meet in a bank.
    lines.append("""shl.b32 r, from, 7; add.u32 r, r, $TILE; and.b32 t, from, 1; shl.b32 t, t, 6;
shl.b32 copied, c, 4; xor.b32 copied, copied, t; add.u32 copied, copied, r;
shl.b32 read0, c, 3; add.u32 read0, read0, t; add.u32 read0, read0, r; xor.b32 read1, read0, 64;
xor.b32 stored0, c, from; shl.b32 stored0, stored0, 4; add.u32 stored0, stored0, r; xor.b32 stored1, stored0, 64;
mul.wide.u32 source, c, 16; add.u64 rope, source, $ROPE; add.u64 source, source, $VALUES;""")
    # Loops, and no longer texts: what a multiprocessor runs at a time has to stay in its caches of instructions.
    lines.append(f"""mov.b32 at, 0; mov.b32 place, from; copy: {NOUNROLL}
add.u32 at1, at, stored1; add.u32 t, at, copied;""")
    lines.append("add.u32 u, at, stored0;" if has_rope else "")
    copy = f"cp.async.cg.shared.global{HINT}"
    for i in range(_BLOCK // _ROWS):
        lines.append(f"""add.u32 r, place, {i * _ROWS}; shfl.sync.idx.b32 row, $ROW, r, 31, -1; setp.lt.s32 p, row, 0;
mad.wide.s32 a, row, {n_groups * GROUP}, source;""")
        for group in groups:
            lines.append(f"{copy} [t+{_offset(i, group)}], [a+{group * GROUP}], 16, p, policy;")
        if has_rope:
            lines.append(f"""mad.wide.s32 a, row, {_ROPE_BYTES}, rope;
{copy} [{("u", "at1")[i]}+{_offset(i, n_groups)}], [a], 16, p, policy;""")
    lines.append(f"""add.u32 place, place, {_BLOCK}; add.u32 at, at, {block_bytes};
setp.lt.u32 p, at, {ROWS_PER_WARP // _BLOCK * block_bytes}; @p bra.uni copy;""")
    if has_rope:  # `noinc`: the arrival counts as one of those that the barrier was made for
        lines.append("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [$LANDED];")
    for i in range(len(groups)):
        lines.append(f"cvt.rn.bf16x2.f32 s{i}, s{i}, s{i};")
    # All blocks of a group, then those of the other one. Each is read while the one before is converted.
    lines.append("cp.async.wait_all; bar.warp.sync -1; mov.b32 at, 0; mov.b32 place, from;")
    lines.append("add.u32 t, at, read0; add.u32 u, at, read1;")
    lines += [_read_text(i, groups[0], "v", "") for i in range(_BLOCK // _ROWS)]
    lines.append(f"""convert: {NOUNROLL}
add.u32 next, at, {block_bytes}; setp.ge.u32 q, place, {ROWS_PER_WARP - _BLOCK};
@q sub.u32 next, next, {ROWS_PER_WARP // _BLOCK * block_bytes - to_next_group};
setp.ne.u32 more, next, {2 * to_next_group}; add.u32 t, next, read0; add.u32 u, next, read1;""")
    lines += [_read_text(i, groups[0], "n", "@more ") for i in range(_BLOCK // _ROWS)]
    lines.append("bar.warp.sync -1;")  # all lanes have read what this one writes over
    lines += [_store_text(i, groups[0]) for i in range(_BLOCK // _ROWS)]
    lines.append(" ".join(f"mov.b32 v{i}, n{i};" for i in range(8)))
    lines.append(f"""mov.b32 at, next; add.u32 place, place, {_BLOCK}; @q mov.b32 place, from; @q mov.b32 s0, s1;
@more bra.uni convert;""")
    # The tensor core is to see what this lane has stored before its arrival.
    lines.append("fence.proxy.async.shared::cta; mbarrier.arrive.shared::cta.b64 _, [$LANDED];")
    return "\n".join(lines) + "\n"


def _offset(i: int, group: int) -> int:
    """Where rows 4 i, ... of a group of values begin in a block."""
    return i * _ROWS * 128 + group * 2 * 128 * _BLOCK


def _read_text(i: int, group: int, name: str, guard: str) -> str:
    """The four words of a lane of rows 4 i, ... of a block: two of each half of the group, at `t` and `u`."""
    v, at = [f"{name}{4 * i + j}" for j in range(4)], _offset(i, group)
    return f"""{guard}ld.shared.v2.b32 {{{v[0]}, {v[1]}}}, [t+{at}];
{guard}ld.shared.v2.b32 {{{v[2]}, {v[3]}}}, [u+{at}];"""


def _store_text(i: int, group: int) -> str:
    """Words v in bfloat16 to their place: a lane writes chunk c of both halves of the group."""
    v = [f"v{4 * i + j}" for j in range(4)]
    lines = [f"add.u32 r, place, {i * _ROWS}; shfl.sync.idx.b32 s, s0, r, 31, -1; mov.b32 bad, 0;"]
    for word in v:  # a byte of 0x7f or 0xff is NaN: then the scale is, too
        lines.append(
            f"and.b32 t, {word}, 0x7f7f7f7f; add.u32 t, t, 0x01010101; lop3.b32 bad, t, 0x80808080, bad, 0xea;"
        )
    lines.append(f"setp.ne.u32 p, bad, 0; selp.b32 s, 0x7fff7fff, s, p; add.u32 at1, at, stored{i};")
    for half in range(2):
        stored = []
        for j in range(2):
            word = v[2 * half + j]
            # In place: the upper pair into the word itself.
            lines += [_pair_text("x" if j == 0 else "u", word, 0x1404), _pair_text(word, word, 0x3424)]
            stored += ["x" if j == 0 else "u", word]
        lines.append(f"st.shared.v4.b32 [at1+{_offset(i, group) + half * 128 * _BLOCK}], {{{', '.join(stored)}}};")
    return "\n".join(lines)


def _pair_text(target: str, word: str, selector: int) -> str:
    """Two of a word's e4m3 bytes -> `target`, a pair of bfloat16, times 2^120 and the scale `s`."""
    return f"""prmt.b32 y, {word}, 0, {selector:#x}; shr.u32 t, y, 4; and.b32 t, t, 0x07f007f0;
lop3.b32 t, t, y, 0x80008000, 0xf8; mul.rn.bf16x2 t, t, big; mul.rn.bf16x2 {target}, t, s;"""
