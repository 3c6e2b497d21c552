"""What the warp-groups of `sparse_mla` do in PTX: stores without barriers, and a vote."""

import functools

from jax import Array
from jax.experimental.mosaic.gpu import FragmentedArray, utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import vector

from hisa_jax.kernels_pallas.mosaic_gpu.ptx.inline import REF, SCALAR, SPLAT, address_of, i32, scalar
from hisa_jax.kernels_pallas.mosaic_gpu.warpgroups import tiled
from hisa_jax.kernels_pallas.types import Ref

PER_HEAD = plgpu.Layout.WGMMA.reduce(1)
_QUAD = 4  # lanes that have a row of an accumulator
_ptx = functools.partial(utils.inline_ptx, has_side_effects=True)


def store_p(p_smem: Ref, p: Array) -> None:
    """p_smem[...] = p, without the barriers of the warp-group that Pallas has around a store."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(tiled(p_smem.shape[1], p_smem.dtype)), plgpu.Layout.WGMMA))
    def store(_ctx, target, p):
        p.store_tiled(target, swizzle=128)

    store(p_smem, p)


def store_rows(ref: Ref, row: Array, values: Array) -> None:
    """ref[row] = values, one a head, without any barrier."""
    ptx = """{ .reg .pred p; .reg .b32 at, x; mov.u32 at, %tid.x; and.b32 x, at, 3; setp.eq.u32 p, x, 0;
shr.u32 x, at, 5; and.b32 x, x, 3; shl.b32 x, x, 6; and.b32 at, at, 28; add.u32 at, at, x; add.u32 at, at, $0;
@p st.shared.f32 [at], $1; @p st.shared.f32 [at+32], $2; }"""
    width = ref.shape[1]

    @plgpu.inline_mgpu(arg_types=(REF, SPLAT, PER_HEAD))
    def store(_ctx, ref, row, values):
        _ptx(ptx, address_of(ref, row.registers.item(), width), *_two_rows(values))

    store(ref, row, values)


def store_output(target_gmem: Ref, values: Array) -> None:
    """Writes an accumulator in bfloat16 in pieces of 16 bytes of a row, others as they lie in registers.

    Pallas writes what a lane has side by side, 4 bytes of bfloat16: half of a sector at a time.
    """

    @plgpu.inline_mgpu(arg_types=(REF, plgpu.Layout.WGMMA))
    def store(_ctx, target, values):
        if utils.bitwidth(values.mlir_dtype) == 32:
            values.store_untiled(target, optimized=False)
            return
        (row_stride, _), _ = ir.MemRefType(target.type).get_strides_and_offset()
        # Of each 8 columns the rows r and r + 8 of a warp's 16.
        words = [utils.bitcast(x, i32()) for x in values.registers.flat]
        _ptx(output_text(len(words) // (2 * _QUAD), 2 * row_stride), *words, utils.memref_ptr(target), convergent=True)

    store(target_gmem, values)


@functools.cache
def output_text(n_pieces: int, row_bytes: int) -> str:
    """64 rows of `n_pieces` times 32 columns, by a warp-group.

    Operands are words of two columns, of each 8 columns those of a row and of the 8th row after it, and last where they
    go. Four lanes have 8 columns of a row; they exchange words until each has all of every fourth 8 columns.
    """
    lines = [
        f"""{{ .reg .pred odd, high; .reg .b32 t, row, s0, s1, r0, r1, x<4>; .reg .b64 a, at;
mov.u32 t, %tid.x; and.b32 row, t, 127; shr.u32 row, row, 5; shl.b32 row, row, 4; and.b32 s0, t, 31;
shr.u32 s0, s0, 2; add.u32 row, row, s0; mul.wide.u32 at, row, {row_bytes}; add.u64 at, at, ${2 * _QUAD * n_pieces};
and.b32 s0, t, 3; mul.wide.u32 a, s0, 16; add.u64 at, at, a;
and.b32 s0, t, 1; setp.ne.u32 odd, s0, 0; and.b32 s0, t, 2; setp.ne.u32 high, s0, 0;"""
    ]
    for piece in range(n_pieces):
        for half in range(2):
            w = [f"${2 * (_QUAD * piece + i) + half}" for i in range(_QUAD)]
            # First with the neighbour, then with the pair of lanes beside: each sends what the other one collects.
            lines.append(f"""selp.b32 s0, {w[0]}, {w[1]}, odd; selp.b32 s1, {w[2]}, {w[3]}, odd;
shfl.sync.bfly.b32 r0, s0, 1, 31, -1; shfl.sync.bfly.b32 r1, s1, 1, 31, -1;
selp.b32 x0, r0, {w[0]}, odd; selp.b32 x1, {w[1]}, r0, odd; selp.b32 x2, r1, {w[2]}, odd; selp.b32 x3, {w[3]}, r1, odd;
selp.b32 s0, x0, x2, high; selp.b32 s1, x1, x3, high;
shfl.sync.bfly.b32 r0, s0, 2, 31, -1; shfl.sync.bfly.b32 r1, s1, 2, 31, -1;
selp.b32 x0, r0, x0, high; selp.b32 x1, r1, x1, high; selp.b32 x2, x2, r0, high; selp.b32 x3, x3, r1, high;""")
            # Latents are to stay in L2, and what is written is not read here.
            lines.append(f"st.global.cs.v4.b32 [at+{8 * half * row_bytes + 64 * piece}], {{x0, x1, x2, x3}};")
    return "\n".join(lines) + " }"


def show_stores() -> None:
    """Lets the tensor core see this thread's stores: `commit_smem` without its barrier of the warp-group."""

    @plgpu.inline_mgpu()
    def fence(_ctx):
        _ptx("fence.proxy.async.shared::cta;")

    fence()


def any_decay(decay: Array, total: Array) -> Array:
    """1 if one of the rows of this warp decays, else 0: an int32 that may differ between warps.

    `total`, not below zero, came from shared memory, too. Looked at here, it is in registers before the slot goes back.
    """
    ptx = """{ .reg .pred p; setp.neu.f32 p, $1, 0f3f800000; setp.neu.or.f32 p, $2, 0f3f800000, p;
setp.lt.or.f32 p, $3, 0f00000000, p; setp.lt.or.f32 p, $4, 0f00000000, p;
vote.sync.any.pred p, p, -1; selp.b32 $0, 1, 0, p; }"""

    @plgpu.inline_mgpu(arg_types=(PER_HEAD, PER_HEAD), return_type=SCALAR)
    def vote(_ctx, decay, total):
        return scalar(_ptx(ptx, *_two_rows(decay), *_two_rows(total), result_types=i32(), convergent=True))

    return vote(decay, total)


def opaque_zero() -> Array:
    """0, but the compiler does not know: else it keeps the address of every step of a product in registers."""

    @plgpu.inline_mgpu(return_type=SCALAR)
    def zero(_ctx):
        return scalar(_ptx("mov.b32 $0, 0;", result_types=i32()))

    return zero()


def _two_rows(values: FragmentedArray) -> list[ir.Value]:
    """Of an array with a value a head: a thread's two, of rows 8 apart, the same in four lanes."""
    return [vector.extract(register, dynamic_position=[], static_position=[0]) for register in values.registers.flat]
