"""Rows of an array in device memory, by an index list, to where the tensor core reads them: in PTX, a warp at a time.

Hopper's copy engine takes no index list, so lanes copy 16 bytes each by `cp.async`, a warp 512 consecutive ones, and
compute the 128-byte swizzle themselves: in shared memory as `roles.tiled` lays it out, a tile of 8 rows by 128 bytes is
1024 bytes, and the 16-byte chunk c of its row r lies at r * 128 + (c ^ r) * 16. Tiles follow each other along a row.

A warp's row numbers are two registers a lane, rows `lane` and 32 + `lane` of a tile of 64; to Pallas they are scalars.
"""

import functools

import jax.numpy as jnp
from jax import Array
from jax.experimental.mosaic.gpu import FragmentedArray, utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith

from kernels_pallas.mosaic_gpu.lanes import address_of
from kernels_pallas.mosaic_gpu.roles import tiled
from kernels_pallas.types import Ref

ROWS = 64  # rows a tile
_CHUNK = 8  # values of 16 bits in 16 bytes
_SPLAT = plgpu.Layout.WG_SPLAT
_SCALAR = plgpu.ShapeDtypeStruct((), jnp.dtype(jnp.int32), layout=_SPLAT)


def load_word(ref: Ref, i: Array) -> Array:
    """ref[i], int32 in device memory, for a warp by itself."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), _SPLAT), return_type=_SCALAR)
    def load(_ctx, ref, i):
        pointer = address_of(ref, i.registers.item(), 1)
        word = utils.inline_ptx("ld.global.nc.b32 $0, [$1];", pointer, result_types=_i32(), has_side_effects=True)
        return FragmentedArray.splat(word, (), is_signed=True)

    return load(ref, i)


def fetch_rows(indices_gmem: Ref, t: Array, column: Array, first_row: Array, n_rows: int) -> tuple[Array, Array]:
    """Rows of indices[t, column : column + 64]: first_row + index, or -1 where it is not one of 0 .. n_rows - 1."""
    K = indices_gmem.shape[1]
    ptx = f"""{{ .reg .pred p; .reg .b32 at; .reg .b64 a;
mov.u32 at, %laneid; add.u32 at, at, $3; mul.wide.u32 a, at, 4; add.u64 a, a, $2;
{_fetch_one("$0", 0, K, n_rows)}{_fetch_one("$1", 32, K, n_rows)}}}"""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), _SPLAT, _SPLAT, _SPLAT), return_type=(_SCALAR, _SCALAR))
    def fetch(_ctx, indices, t, column, first_row):
        row = address_of(indices, t.registers.item(), K)
        results = utils.inline_ptx(
            ptx,
            row,
            column.registers.item(),
            first_row.registers.item(),
            result_types=(_i32(), _i32()),
            has_side_effects=True,
        )
        return tuple(FragmentedArray.splat(result, (), is_signed=True) for result in results)

    return fetch(indices_gmem, t, column, first_row)


def _fetch_one(result: str, offset: int, K: int, n_rows: int) -> str:
    return f"""setp.lt.s32 p, at, {K - offset}; mov.b32 {result}, -1; @p ld.global.nc.b32 {result}, [a+{4 * offset}];
setp.lt.u32 p, {result}, {n_rows}; add.s32 {result}, {result}, $4; @!p mov.b32 {result}, -1;
"""


def gather_rows(
    source_gmem: Ref, tiles_smem: Ref, slot: Array, low: Array, high: Array, first: int, n_columns: int
) -> None:
    """Starts copying columns first : first + n_columns of 64 rows of `source_gmem` to tiles_smem[slot]; row -1: zeros.

    Args:
        tiles_smem: [*, 64, E], as `roles.tiled`; low, high: from `fetch_rows`.
    """
    E, dtype = source_gmem.shape[1], source_gmem.dtype
    ptx = _gather_ptx(E, first // _CHUNK, n_columns // _CHUNK)
    arg_types = (plgpu.RefType(), plgpu.RefType(tiled(E, dtype)), _SPLAT, _SPLAT, _SPLAT)

    @plgpu.inline_mgpu(arg_types=arg_types)
    def gather(_ctx, source, tiles, slot, low, high):
        offset = arith.muli(slot.registers.item(), utils.c(ROWS * E, _i32()))
        place = utils.getelementptr(utils.memref_ptr(tiles), [offset], utils.dtype_to_ir_type(dtype))
        utils.inline_ptx(
            ptx,
            utils.memref_ptr(source),
            place,
            low.registers.item(),
            high.registers.item(),
            has_side_effects=True,
            convergent=True,
        )

    gather(source_gmem, tiles_smem, slot, low, high)


def wait_rows() -> None:
    """Waits for the copies of this warp and shows them to the tensor core; a barrier still has to tell its readers."""

    @plgpu.inline_mgpu()
    def wait(_ctx):
        utils.inline_ptx("cp.async.wait_all; fence.proxy.async.shared::cta;", has_side_effects=True, convergent=True)

    wait()


def store_bias(bias_smem: Ref, slot: Array, low: Array, high: Array) -> None:
    """bias[slot]: 0 for a row that is there, -inf for one that is not; [*, 64] float32 in shared memory."""
    one = "setp.lt.s32 p, {row}, 0; selp.b32 v, 0xff800000, 0, p; st.shared.b32 [at+{offset}], v;"
    ptx = f"""{{ .reg .pred p; .reg .b32 at, v; mov.u32 at, %laneid; shl.b32 at, at, 2; add.u32 at, at, $0;
{one.format(row="$1", offset=0)} {one.format(row="$2", offset=128)} }}"""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), _SPLAT, _SPLAT, _SPLAT))
    def store(_ctx, bias, slot, low, high):
        place = address_of(bias, slot.registers.item(), ROWS)
        utils.inline_ptx(ptx, place, low.registers.item(), high.registers.item(), has_side_effects=True)

    store(bias_smem, slot, low, high)


@functools.cache
def _gather_ptx(E: int, first: int, n_chunks: int) -> str:
    """$0: source, $1: a tile of 64 rows of E values in shared memory, $2, $3: row numbers."""
    tile_row = E // 64 * 1024  # bytes of 8 rows
    lines = [".reg .pred p; .reg .b32 lane, c, base, row, from, r, x<8>; .reg .b64 a, source; mov.u32 lane, %laneid;"]
    while n_chunks:
        width = next(w for w in (32, 16, 8) if w <= n_chunks)  # chunks of a row that one instruction copies
        rows = 32 // width
        lines.append(f"""and.b32 c, lane, {width - 1}; add.u32 c, c, {first}; mul.wide.u32 source, c, 16;
add.u64 source, source, $0; shr.u32 from, lane, {width.bit_length() - 1};
shr.u32 base, c, 3; shl.b32 base, base, 10; add.u32 base, base, $1; and.b32 c, c, 7;""")
        lines += [
            f"""add.u32 r, from, {i * rows % 8}; xor.b32 x{i}, r, c; shl.b32 x{i}, x{i}, 4; shl.b32 r, r, 7;
add.u32 x{i}, x{i}, r; add.u32 x{i}, x{i}, base;"""
            for i in range(8 // rows)
        ]
        for i in range(ROWS // rows):
            register, row = f"${2 + i * rows // 32}", i * rows % 32
            lane = str(row)
            if rows > 1:
                lines.append(f"add.u32 r, from, {row};")
                lane = "r"
            lines.append(f"""shfl.sync.idx.b32 row, {register}, {lane}, 31, -1; setp.lt.s32 p, row, 0;
mad.wide.s32 a, row, {2 * E}, source;
cp.async.cg.shared.global [x{i % (8 // rows)}+{i * rows // 8 * tile_row}], [a], 16, p;""")
        first, n_chunks = first + width, n_chunks - width
    return "{\n" + "\n".join(lines) + "\n}"


def _i32() -> ir.Type:
    return ir.IntegerType.get_signless(32)
