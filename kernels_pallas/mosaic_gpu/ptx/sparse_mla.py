"""What the warp-groups of `sparse_mla` do in PTX: stores without barriers, a vote, turns at the tensor core."""

import functools

from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import FragmentedArray, utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import vector

from hisa_jax.kernels_pallas.mosaic_gpu.ptx.gather_rows import BARRIER_WORDS
from hisa_jax.kernels_pallas.mosaic_gpu.ptx.inline import REF, SCALAR, SPLAT, Row, address_of, i32, scalar
from hisa_jax.kernels_pallas.mosaic_gpu.warpgroups import tiled
from hisa_jax.kernels_pallas.types import Ref

PER_HEAD = plgpu.Layout.WGMMA.reduce(1)
_FIRST_THREAD = "{ .reg .pred p, q; .reg .b32 x; mov.u32 x, %tid.x; and.b32 x, x, 127; setp.eq.u32 q, x, 0;"
_ptx = functools.partial(utils.inline_ptx, has_side_effects=True)


def store_p(k_smem: Ref, slot: Array, first: int, p: Array) -> None:
    """k_smem[slot, :, first :] = p, with one barrier of the warp-group where Pallas has two around a store.

    No fence: whoever multiplies by it loads it to registers first.
    """

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(tiled(k_smem.shape[2], k_smem.dtype)), plgpu.Layout.WGMMA))
    def store(_ctx, target, p):
        utils.warpgroup_barrier()  # the slowest warp may still be multiplying by what lies there
        p.store_tiled(target, swizzle=128)

    store(k_smem.at[slot, :, pl.ds(first, p.shape[1])], p)


def store_rows(ref: Ref, slot: Array, values: Array) -> None:
    """ref[slot] = values, one a head, without any barrier."""
    ptx = """{ .reg .pred p; .reg .b32 at, x; mov.u32 at, %tid.x; and.b32 x, at, 3; setp.eq.u32 p, x, 0;
shr.u32 x, at, 5; and.b32 x, x, 3; shl.b32 x, x, 6; and.b32 at, at, 28; add.u32 at, at, x; add.u32 at, at, $0;
@p st.shared.f32 [at], $1; @p st.shared.f32 [at+32], $2; }"""
    width = ref.shape[1]

    @plgpu.inline_mgpu(arg_types=(REF, SPLAT, PER_HEAD))
    def store(_ctx, ref, slot, values):
        _ptx(ptx, address_of(ref, slot.registers.item(), width), *_two_rows(values))

    store(ref, slot, values)


def store_output(target_gmem: Ref, values: Array) -> None:
    """Writes an accumulator as it lies in registers, 16 bytes of a row at a time: Pallas refuses that from 0.12 on."""

    @plgpu.inline_mgpu(arg_types=(REF, plgpu.Layout.WGMMA))
    def store(_ctx, target, values):
        values.store_untiled(target, optimized=False)

    store(target_gmem, values)


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


def claim(turns: Row, landed: tuple[Row, Row], phase: Array, may: Array) -> None:
    """Says whether this warp-group is to multiply first: if `may` is 1, and this phase of both barriers complete."""
    ptx = """.reg .pred r; mbarrier.test_wait.parity.shared::cta.b64 p, [$1], $3;
mbarrier.test_wait.parity.shared::cta.b64 r, [$2], $3; and.pred p, p, r; selp.b32 x, $4, 0, p;
@q st.shared.b32 [$0], x; }"""

    @plgpu.inline_mgpu(arg_types=(REF, REF) + (SPLAT,) * 5)
    def set_turn(_ctx, turns, barriers, slot, first, second, parity, may):
        turn = address_of(turns, slot.registers.item(), 1)
        there = (address_of(barriers, barrier.registers.item(), BARRIER_WORDS) for barrier in (first, second))
        _ptx(_FIRST_THREAD + ptx, turn, *there, parity.registers.item(), may.registers.item())

    set_turn(turns.ref, landed[0].ref, turns.row, landed[0].row, landed[1].row, phase % 2, may)


def arrive(barriers: Row) -> None:
    """Each thread arrives at a barrier made by `init_landed`."""

    @plgpu.inline_mgpu(arg_types=(REF, SPLAT))
    def one(_ctx, barriers, barrier):
        _ptx(
            "mbarrier.arrive.shared::cta.b64 _, [$0];",
            address_of(barriers, barrier.registers.item(), BARRIER_WORDS),
        )

    one(barriers.ref, barriers.row)


def let_first(turns: Row, multiplied: Row, phase: Array) -> None:
    """Waits, where another warp-group is to multiply first, until it has completed this phase of its barrier.

    It is a matter of speed: no result depends on it. A loop that reads a word of shared memory until it changes would
    take from the tensor core what its operands come through.
    """
    ptx = """{ .reg .pred p; .reg .b32 x; ld.shared.b32 x, [$0]; setp.eq.b32 p, x, 0; @p bra done;
again: mbarrier.try_wait.parity.shared::cta.b64 p, [$1], $2; @!p bra again; done: }"""

    @plgpu.inline_mgpu(arg_types=(REF, REF) + (SPLAT,) * 3)
    def wait(_ctx, turns, barriers, slot, barrier, parity):
        turn = address_of(turns, slot.registers.item(), 1)
        there = address_of(barriers, barrier.registers.item(), BARRIER_WORDS)
        _ptx(ptx, turn, there, parity.registers.item())

    wait(turns.ref, multiplied.ref, turns.row, multiplied.row, phase % 2)


def _two_rows(values: FragmentedArray) -> list[ir.Value]:
    """Of an array with a value a head: a thread's two, of rows 8 apart, the same in four lanes."""
    return [vector.extract(register, dynamic_position=[], static_position=[0]) for register in values.registers.flat]
