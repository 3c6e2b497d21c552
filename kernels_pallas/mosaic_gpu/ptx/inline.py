"""What the functions in PTX share: types of their operands, their text, and rows of words in memory."""

import re
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from jax.experimental.mosaic.gpu import FragmentedArray, utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith

from hisa_jax.kernels_pallas.types import Ref

# How operands of `plgpu.inline_mgpu` are declared: a whole reference, a scalar that all threads hold, an int32 result.
REF = plgpu.RefType()
SPLAT = plgpu.Layout.WG_SPLAT
SCALAR = plgpu.ShapeDtypeStruct((), jnp.dtype(jnp.int32), layout=SPLAT)
# Waits for all of a warp-group, in a register `id`. Barriers 1, 2, ... of the CTA are one each: the others run on.
WARPGROUP_BARRIER = "mov.u32 id, %tid.x; shr.u32 id, id, 7; add.u32 id, id, 1; bar.sync id, 128;\n"
NOUNROLL = '.pragma "nounroll";'  # after the label of a loop

# Register x, float32, -> `sort_key`, by `t`. The maximum drops NaN; the addition makes -0.0, which must tie with 0.0,
# positive.
SORT_KEY = """max.f32 x, x, 0fFF800000; add.f32 x, x, 0f00000000; mov.b32 sort_key, x;
shr.s32 t, sort_key, 31; and.b32 t, t, 0x7fffffff; xor.b32 sort_key, sort_key, t;"""


class Row(NamedTuple):
    """One row of words of 32 bits in a whole, contiguous reference.

    Attributes: `ref`, in which a row has `width` words; `row`, int32, which of them.
    """

    ref: Ref
    row: Array
    width: int


def numbered(text: str, operands: tuple[str, ...]) -> str:
    """PTX whose $NAMEs become operands by their number, in this order."""
    return re.sub(r"\$([A-Z_]+)", lambda name: f"${operands.index(name[1])}", text)


def scope(body: str, operands: tuple[str, ...]) -> str:
    """The same with registers and labels of its own: a text may be in a program several times."""
    return "{\n" + numbered(body, operands) + "}"


def address_of(ref: ir.Value, row: ir.Value, width: int, column: ir.Value | None = None) -> ir.Value:
    """Pointer to ref[row, column] of a whole contiguous ref of 32-bit words, `width` a row."""
    i64 = ir.IntegerType.get_signless(64)  # rows times width outgrows 32 bits in device memory
    word = arith.muli(arith.extui(i64, row), utils.c(width, i64))
    if column is not None:
        word = arith.addi(word, arith.extui(i64, column))
    return utils.getelementptr(utils.memref_ptr(ref), [word], i32())


def scalar(word: ir.Value) -> FragmentedArray:
    """An int32 that all threads hold, as Pallas takes it (and between warps it may differ after all)."""
    return FragmentedArray.splat(word, (), is_signed=True)


def i32() -> ir.Type:
    """Of the context at hand, so no constant of the module."""
    return ir.IntegerType.get_signless(32)
