"""One key a thread: the end of scoring, where Pallas would keep every key's sum in four threads.

The accumulator of n_keys keys by H heads leaves a key's row in four neighbouring lanes, each with a quarter of the
heads of two (64 rows) or four (128 rows) keys. Summing by reduce-scatter leaves each lane one key of its own: 3
shuffles instead of 8, and everything after the sum (scale, sort key, mask, store) done once a key, not four times.
Arrays in *lane order* are [128] with a value a thread; `keys_of_lanes` says which key that is. In interpret mode lane
order is key order.
"""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import FragmentedArray, WGStridedFragLayout, utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, vector
from jaxlib.mlir.dialects import math as mlir_math

from hisa_jax.kernels_pallas.mosaic_gpu.ptx.inline import REF, SCALAR, SPLAT, address_of, i32, scalar
from hisa_jax.kernels_pallas.mosaic_gpu.warpgroups import HEAD_COLUMN
from hisa_jax.kernels_pallas.types import Interpret, Ref

N_LANES = 128
LANES = plgpu.Layout.WG_STRIDED((N_LANES,), vec_size=1)


def multiply_and_sum(
    k_parts: list,
    q_heads: Ref,
    w: Array,
    release: Callable[[], None],
    interpret: Interpret,
    *,
    meanwhile: Callable[[], None] = lambda: None,
) -> Array:
    """sum_h w[h] * relu(sum_p k_parts[p] . q_heads[h]): refs [n_keys, D], a ref [H, D], [H] -> lane order.

    `release` is called when the tensor core has read its operands, `meanwhile` before that.
    """
    products = multiply(k_parts, q_heads, meanwhile)
    release()
    return head_sum(products, w, interpret)


def multiply(k_parts: list, q_heads: Ref, meanwhile: Callable[[], None] = lambda: None) -> Array:
    """sum_p k_parts[p] . q_heads: refs [n_keys, D], a ref [H, D] -> [n_keys, H] float32.

    `meanwhile` is called while the product is in flight.
    """

    def into(acc: Ref) -> Array:
        for k_part in k_parts:
            plgpu.wgmma(acc, k_part, q_heads.T)
        meanwhile()
        return acc[...]

    return pl.run_scoped(into, plgpu.ACC((k_parts[0].shape[0], q_heads.shape[0]), jnp.float32))


def head_sum(products: Array, w: Array, interpret: Interpret) -> Array:
    """sum_h w[h] * relu(products[:, h]): [n_keys, H], [H] -> lane order."""
    if interpret:
        return jnp.sum(jnp.maximum(products, 0.0) * w[None, :], axis=1)

    @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA, HEAD_COLUMN), return_type=_lanes(jnp.float32))
    def reduce(_ctx, products, w):
        sums: list = []  # of the keys that this thread has a share of: in each half of the tile two, 8 rows apart
        for half in range(products.registers.shape[0]):
            for g in range(2):
                total = None
                for octet in range(products.registers.shape[1]):
                    pair, weights = products.registers[half, octet, 0, 0, g].item(), w.registers[octet].item()
                    for column in range(2):
                        # One multiply-add a product; the first is a product alone, which saves clearing the sum.
                        x = arith.maximumf(element(pair, column), utils.c(0.0, ir.F32Type.get()))
                        weight = element(weights, column)
                        total = arith.mulf(x, weight) if total is None else mlir_math.fma(x, weight, total)
                sums.append(total)
        return _to_lanes(_scatter_sum(sums))

    return reduce(products, w)


def keys_of_lanes(n_keys: int, interpret: Interpret) -> Array:
    """[128] int32: the key (row of the tile) that a thread owns. With 64 rows two threads share one."""
    if interpret:
        return jnp.arange(n_keys, dtype=jnp.int32)

    @plgpu.inline_mgpu(return_type=_lanes(jnp.int32))
    def keys(_ctx):
        return _to_lanes(key_of_lane(n_keys), is_signed=True)

    return keys()


def load_lanes(ref: Ref, row: Array, n_keys: int, interpret: Interpret) -> Array:
    """ref[row] in lane order; `ref`: [*, n_keys] float32 in shared memory."""
    if interpret:
        return ref[row]
    width = ref.shape[-1]

    @plgpu.inline_mgpu(arg_types=(REF, SPLAT), return_type=_lanes(jnp.float32))
    def load(_ctx, ref, row):
        address = address_of(ref, row.registers.item(), width, key_of_lane(n_keys))
        value = utils.inline_ptx(
            "ld.shared.f32 $0, [$1];", address, result_types=ir.F32Type.get(), has_side_effects=True
        )
        return _to_lanes(value)

    return load(ref, row)


def load_word(ref: Ref, row: Array, column: Array | int, interpret: Interpret) -> Array:
    """ref[row, column], int32 in shared memory: a warp by itself may not load by indexing."""
    if interpret:
        return ref[row, column]
    width = ref.shape[1]

    @plgpu.inline_mgpu(arg_types=(REF, SPLAT, SPLAT), return_type=SCALAR)
    def load(_ctx, ref, row, column):
        address = address_of(ref, row.registers.item(), width, column.registers.item())
        word = utils.inline_ptx("ld.shared.b32 $0, [$1];", address, result_types=i32(), has_side_effects=True)
        return scalar(word)

    return load(ref, row, jnp.asarray(column, jnp.int32))


def store_lanes(ref: Ref, row: Array, first: Array, n_keys: int, values: Array, interpret: Interpret) -> None:
    """Writes lane-order words to ref[row, first : first + n_keys]; `ref` is whole, 2-D, shared or global."""
    if interpret:
        ref[row, pl.ds(first, n_keys)] = values
        return
    width = ref.shape[1]

    @plgpu.inline_mgpu(arg_types=(REF, SPLAT, SPLAT, LANES))
    def store(_ctx, ref, row, first, values):
        column = arith.addi(first.registers.item(), key_of_lane(n_keys))
        pointer = address_of(ref, row.registers.item(), width, column)
        space = "shared" if utils.is_smem_ref(ref) else "global"
        value = element(values.registers.flat[0], 0)
        utils.inline_ptx(f"st.{space}.b32 [$0], $1;", pointer, value, has_side_effects=True)

    store(ref, row, first, values)


def key_of_lane(n_keys: int) -> ir.Value:
    """The row of the accumulator that `_scatter_sum` leaves in this thread."""
    word = i32()
    thread = utils.inline_ptx("mov.u32 $0, %tid.x;", result_types=word)
    bits = lambda low, n: arith.andi(arith.shrui(thread, utils.c(low, word)), utils.c((1 << n) - 1, word))  # noqa: E731
    times = lambda x, factor: arith.muli(x, utils.c(factor, word))  # noqa: E731
    within = arith.addi(times(bits(5, 2), 16), bits(2, 3))  # 16 rows a warp, a row of 8 in four lanes
    if n_keys == 64:
        return arith.addi(within, times(bits(0, 1), 8))
    return arith.addi(within, arith.addi(times(bits(0, 1), 64), times(bits(1, 1), 8)))


def _scatter_sum(sums: list[ir.Value]) -> ir.Value:
    """Sums over the four lanes of a row, each lane keeping one of the lane's two or four rows (see `key_of_lane`)."""
    lane = utils.inline_ptx("mov.u32 $0, %laneid;", result_types=i32())
    for bit in (1, 2):
        # Each lane gives away the half of its rows that the lane `bit` further keeps, and adds what it is given.
        is_upper = arith.cmpi(arith.CmpIPredicate.ne, arith.andi(lane, utils.c(bit, i32())), utils.c(0, i32()))
        if len(sums) == 1:
            sums = [arith.addf(sums[0], utils.shfl_bfly(sums[0], bit))]
            continue
        lower, upper = sums[: len(sums) // 2], sums[len(sums) // 2 :]
        sums = [
            arith.addf(arith.select(is_upper, high, low), utils.shfl_bfly(arith.select(is_upper, low, high), bit))
            for low, high in zip(lower, upper, strict=True)
        ]
    return sums[0]


def _lanes(dtype: DTypeLike) -> plgpu.ShapeDtypeStruct:
    return plgpu.ShapeDtypeStruct((N_LANES,), jnp.dtype(dtype), layout=LANES)


def _to_lanes(value: ir.Value, is_signed: bool | None = None) -> FragmentedArray:
    register = vector.broadcast(ir.VectorType.get((1,), value.type), value)
    return FragmentedArray(
        _registers=np.array([register], dtype=object),
        _layout=WGStridedFragLayout((N_LANES,), vec_size=1),
        _is_signed=is_signed,
    )


def element(register: ir.Value, i: int) -> ir.Value:
    return vector.extract(register, dynamic_position=[], static_position=ir.DenseI64ArrayAttr.get([i]))
