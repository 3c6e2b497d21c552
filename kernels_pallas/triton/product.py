"""Products of e4m3 numbers as Hopper's tensor core adds them up, for Triton.

Pallas asks Triton for sums in whole float32, which it makes of float16 products with half of the tensor core's rate and
a conversion for every number. So this is a primitive of our own, which allows what Mosaic's kernels and every library's
do: the tensor core keeps its own sums, of about 14 bits beside the greatest term.
"""

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax._src.pallas.triton import lowering
from jax.extend import core as jax_core
from jax.interpreters import mlir
from jaxlib.mlir import ir
from jaxlib.triton import dialect

_product = jax_core.Primitive("product")


def product(a: Array, b: Array, acc: Array) -> Array:
    """acc + a @ b.T: [M, K], [N, K] of one dtype, [M, N] float32; M, N and K are at least 16."""
    return _product.bind(a, b, acc)


def _reference(a: Array, b: Array, acc: Array) -> Array:
    wide = a.dtype if a.dtype == jnp.bfloat16 else jnp.float32  # in which every product is exact
    terms = lax.dot_general(a.astype(wide), b.astype(wide), (((1,), (1,)), ((), ())), preferred_element_type=acc.dtype)
    return acc + terms


@_product.def_abstract_eval
def _abstract_eval(a: jax.core.ShapedArray, b: jax.core.ShapedArray, acc: jax.core.ShapedArray) -> jax.core.ShapedArray:
    return acc


mlir.register_lowering(_product, mlir.lower_fun(_reference, multiple_results=False))


@lowering.register_lowering(_product)
def _lower(ctx: lowering.LoweringRuleContext, a: ir.Value, b: ir.Value, acc: ir.Value) -> ir.Value:
    K = ctx.avals_in[0].shape[1]
    return dialect.dot(a, dialect.trans(b, (1, 0)), acc, max_num_imprecise_acc=K)
