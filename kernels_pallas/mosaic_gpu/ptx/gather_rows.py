"""Rows of an array in device memory, by an index list, to where the tensor core reads them: in PTX, a warp at a time.

Hopper's copy engine takes no index list, so lanes copy 16 bytes each by `cp.async` and compute the 128-byte swizzle
themselves. In shared memory as `warpgroups.tiled` lays it out, a tile of 8 rows by 128 bytes is 1024 bytes, and the
16-byte chunk c of its row r lies at r * 128 + (c ^ r) * 16. Tiles follow each other along a row.

A warp copies 32 rows or fewer; each lane holds the number of one of them, which to Pallas is a scalar. The copies
themselves arrive at a barrier when they have landed, so that a warp need not wait for them. Such barriers are words of
shared memory that `init_landed` makes: whoever waits at one counts its phases.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

from jax import Array
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith

from hisa_jax.kernels_pallas.mosaic_gpu.ptx.inline import (
    NOUNROLL,
    REF,
    SCALAR,
    SPLAT,
    Row,
    address_of,
    i32,
    scalar,
    scope,
)
from hisa_jax.kernels_pallas.mosaic_gpu.warpgroups import tiled
from hisa_jax.kernels_pallas.types import Ref

ROWS_PER_WARP = 32  # one a lane
BARRIER_WORDS = 2
_CHUNK = 16  # bytes a lane copies at a time
_BLOCK = 8  # rows that the swizzle repeats after
_UNROLLED = 20  # of more copies a loop is made: the code of a tile is to stay in the caches of instructions
OPERANDS = ("SOURCE", "TILE", "ROW", "LANDED")
# For a copy that asks L2 to evict other data first.
HINT, KEEP = ".L2::cache_hint", ".reg .b64 policy; createpolicy.fractional.L2::evict_last.b64 policy, 1.0;"


def load_word(ref: Ref, i: Array) -> Array:
    """ref[i], int32 in device memory, for a warp by itself."""

    @plgpu.inline_mgpu(arg_types=(REF, SPLAT), return_type=SCALAR)
    def load(_ctx, ref, i):
        pointer = address_of(ref, i.registers.item(), 1)
        word = utils.inline_ptx("ld.global.nc.b32 $0, [$1];", pointer, result_types=i32(), has_side_effects=True)
        return scalar(word)

    return load(ref, i)


def load_lane_word(ref: Ref, t: Array, column: Array) -> Array:
    """ref[t, column + lane], int32 in device memory; -1 beyond its last column."""
    K = ref.shape[1]
    ptx = f"""{{ .reg .pred p; .reg .b32 at; .reg .b64 a; mov.u32 at, %laneid; add.u32 at, at, $2;
setp.lt.s32 p, at, {K}; mul.wide.u32 a, at, 4; add.u64 a, a, $1; mov.b32 $0, -1; @p ld.global.nc.b32 $0, [a]; }}"""

    @plgpu.inline_mgpu(arg_types=(REF, SPLAT, SPLAT), return_type=SCALAR)
    def load(_ctx, ref, t, column):
        row = address_of(ref, t.registers.item(), K)
        word = utils.inline_ptx(ptx, row, column.registers.item(), result_types=i32(), has_side_effects=True)
        return scalar(word)

    return load(ref, t, column)


class TileRows(NamedTuple):
    """The rows of shared memory that a warp fills: tiles[slot, first : first + n].

    Attributes: `tiles`: [slots, rows, E], laid out as `warpgroups.tiled`; `first`, `n`: multiples of 8, n up to 32.
    """

    tiles: Ref
    slot: Array
    first: Array
    n: int = ROWS_PER_WARP


def gather_rows(
    source: Ref,
    row: Array,
    target: TileRows,
    columns: Sequence[tuple[int, int]],
    landed: Row | None,
    keeps: bool = False,
    ahead: int = 0,
) -> None:
    """Starts copying the rows of the target's first lanes of `source` [*, E] to it, zeros for row -1.

    Each of the 32 lanes arrives at the barrier `landed`, if given, when all its copies so far have landed.

    Args:
        columns: pieces as (first column, how many), each 128, 256 or 512 bytes wide.
        keeps: asks L2 to evict other data first.
        ahead: bytes around each that L2 is to bring, too.
    """
    E, dtype, rows = source.shape[1], source.dtype, target.tiles.shape[1]
    each = _CHUNK // dtype.itemsize
    pieces = tuple((start // each, n // each) for start, n in columns)
    ptx = scope(rows_text(E * dtype.itemsize, pieces, target.n, keeps, landed is not None, ahead), OPERANDS)
    barrier = () if landed is None else (landed.ref, landed.row)

    @plgpu.inline_mgpu(
        arg_types=(REF, plgpu.RefType(tiled(E, dtype)), SPLAT, SPLAT, SPLAT, *(REF, SPLAT)[: len(barrier)])
    )
    def gather(_ctx, source, tiles, row, slot, first, *barrier):
        row_of_tiles = arith.addi(arith.muli(slot.registers.item(), utils.c(rows, i32())), first.registers.item())
        offset = arith.muli(row_of_tiles, utils.c(E * dtype.itemsize, i32()))
        operands = [
            utils.memref_ptr(source),
            utils.getelementptr(utils.memref_ptr(tiles), [offset], ir.IntegerType.get_signless(8)),
            row.registers.item(),
        ]
        if barrier:
            operands.append(address_of(barrier[0], barrier[1].registers.item(), BARRIER_WORDS))
        utils.inline_ptx(ptx, *operands, has_side_effects=True, convergent=True)

    gather(source, target.tiles, row, target.slot, target.first, *barrier)


def gather_scales(scales: Ref, row: Array, target: Row, first: Array) -> None:
    """Starts copying scales[row] of each lane to target[first + lane], 0 for row -1.

    They land before the barrier of the `gather_rows` that comes next.
    """
    ptx = """{ .reg .pred p; .reg .b32 at; .reg .b64 a; mov.u32 at, %laneid; shl.b32 at, at, 2; add.u32 at, at, $1;
setp.lt.s32 p, $2, 0; mad.wide.s32 a, $2, 4, $0; cp.async.ca.shared.global [at], [a], 4, p; }"""

    @plgpu.inline_mgpu(arg_types=(REF, SPLAT, REF, SPLAT, SPLAT))
    def gather(_ctx, scales, row, slots, slot, first):
        there = address_of(slots, slot.registers.item(), target.width, first.registers.item())
        utils.inline_ptx(ptx, utils.memref_ptr(scales), there, row.registers.item(), has_side_effects=True)

    gather(scales, row, target.ref, target.row, first)


def store_bias(bias: Row, first: Array, n: int, row: Array, landed: Row) -> None:
    """bias[first + lane] = 0 for a row that is there, -inf for row -1, of the first n lanes.

    Each of these arrives at the barrier `landed`.
    """
    ptx = f"""{{ .reg .pred p, q; .reg .b32 at, v; mov.u32 at, %laneid; setp.lt.u32 q, at, {n}; shl.b32 at, at, 2;
add.u32 at, at, $0; setp.lt.s32 p, $1, 0; selp.b32 v, 0xff800000, 0, p; @q st.shared.b32 [at], v;
@q mbarrier.arrive.shared::cta.b64 _, [$2]; }}"""

    @plgpu.inline_mgpu(arg_types=(REF,) * 2 + (SPLAT,) * 4)
    def store(_ctx, ref, barriers, slot, first, row, barrier):
        target = address_of(ref, slot.registers.item(), bias.width, first.registers.item())
        there = address_of(barriers, barrier.registers.item(), BARRIER_WORDS)
        utils.inline_ptx(ptx, target, row.registers.item(), there, has_side_effects=True)

    store(bias.ref, landed.ref, bias.row, first, row, landed.row)


def init_landed(landed_smem: Ref, arrivals: Sequence[int]) -> None:
    """Makes barriers of so many arrivals, for a warp-group; its next arrival at a barrier of Pallas shows them."""
    inits = "".join(f"@p mbarrier.init.shared::cta.b64 [$0+{8 * i}], {n};" for i, n in enumerate(arrivals))
    ptx = f"{{ .reg .pred p; .reg .b32 t; mov.u32 t, %tid.x; and.b32 t, t, 127; setp.eq.u32 p, t, 0; {inits} }}"

    @plgpu.inline_mgpu(arg_types=(REF,))
    def init(_ctx, landed):
        utils.inline_ptx(ptx, utils.memref_ptr(landed), has_side_effects=True)

    init(landed_smem)


def wait_landed(landed: Row, phase: Array) -> None:
    """Waits until the barrier has completed phase 0, 1, ... and lets the tensor core see what has landed."""
    ptx = """{ .reg .pred p; again: mbarrier.try_wait.parity.shared::cta.b64 p, [$0], $1; @!p bra again;
fence.proxy.async.shared::cta; }"""

    @plgpu.inline_mgpu(arg_types=(REF, SPLAT, SPLAT))
    def wait(_ctx, barriers, barrier, parity):
        there = address_of(barriers, barrier.registers.item(), BARRIER_WORDS)
        utils.inline_ptx(ptx, there, parity.registers.item(), has_side_effects=True)

    wait(landed.ref, landed.row, phase % 2)


@functools.cache
def rows_text(
    row_bytes: int, pieces: tuple[tuple[int, int], ...], n_rows: int, keeps: bool, arrives: bool = True, ahead: int = 0
) -> str:
    """$SOURCE: an address, $TILE: rows in shared memory, $ROW: the lane's row, $LANDED: a barrier; pieces in chunks."""
    lines = [".reg .pred p; .reg .b32 lane, c, row, r, to; .reg .b64 a; mov.u32 lane, %laneid;"]
    hint, policy = (HINT, ", policy") if keeps else ("", "")
    if keeps:
        lines.append(KEEP)
    if ahead:
        hint += f".L2::{ahead}B"
    # Pieces of one width share rows and addresses. The swizzle repeats every 8 rows: so many addresses are kept.
    widths = {width: [first for first, n in pieces if n == width] for _, width in pieces}
    for width, firsts in widths.items():  # in chunks; an instruction copies `width` of each of 32 // width rows
        assert all((first - firsts[0]) % 8 == 0 for first in firsts)
        lines.append(f""".reg .b32 from{width}, x{width}_<{_BLOCK * width // 32}>; .reg .b64 source{width};
and.b32 c, lane, {width - 1}; add.u32 c, c, {firsts[0]}; mul.wide.u32 source{width}, c, 16;
add.u64 source{width}, source{width}, $SOURCE; shr.u32 from{width}, lane, {width.bit_length() - 1};
shr.u32 to, c, 3; shl.b32 to, to, 10; add.u32 to, to, $TILE; and.b32 c, c, 7;""")
        lines += [
            f"""add.u32 r, from{width}, {i * 32 // width}; xor.b32 row, r, c; shl.b32 row, row, 4; shl.b32 r, r, 7;
add.u32 r, r, row; add.u32 x{width}_{i}, r, to;"""
            for i in range(_BLOCK * width // 32)
        ]
    n_blocks = n_rows // _BLOCK
    if n_blocks * sum(_BLOCK * width // 32 for _, width in pieces) > _UNROLLED:
        lines += [".reg .b32 n; mov.b32 n, 0; copy:", NOUNROLL, *_block_text(row_bytes, widths, 0, hint, policy)]
        # Addresses are a lane's own. One with a part that all lanes share is written wrongly, with a hint, by ptxas up
        # to 13.0: the GPU then takes the policy for an illegal instruction.
        for width in widths:
            lines.append(f"add.u32 from{width}, from{width}, {_BLOCK};")
            lines += [f"add.u32 x{width}_{i}, x{width}_{i}, {_BLOCK * row_bytes};" for i in range(_BLOCK * width // 32)]
        lines.append(f"add.u32 n, n, 1; setp.lt.u32 p, n, {n_blocks}; @p bra.uni copy;")
    else:  # nothing is changed that a copy before may still have to read: none waits for another
        for block in range(n_blocks):
            lines += _block_text(row_bytes, widths, block, hint, policy)
    if arrives:  # `noinc`: the arrival counts as one of those that the barrier was made for
        lines.append("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [$LANDED];")
    return "\n".join(lines) + "\n"


def _block_text(row_bytes: int, widths: dict[int, list[int]], block: int, hint: str, policy: str) -> list[str]:
    """Copies of 8 rows, `block` times 8 rows after those whose addresses are kept."""
    lines = []
    for width, firsts in widths.items():
        for i in range(_BLOCK * width // 32):
            # The row's number comes from its lane; the predicate fills 16 bytes with zeros instead of copying.
            lines.append(f"""add.u32 r, from{width}, {block * _BLOCK + i * 32 // width};
shfl.sync.idx.b32 row, $ROW, r, 31, -1; setp.lt.s32 p, row, 0; mad.wide.s32 a, row, {row_bytes}, source{width};""")
            for first in firsts:
                at = block * _BLOCK * row_bytes + (first - firsts[0]) * 8 * _CHUNK
                lines.append(
                    f"cp.async.cg.shared.global{hint} [x{width}_{i}+{at}], [a+{(first - firsts[0]) * _CHUNK}], 16, p"
                    f"{policy};"
                )
    return lines
