"""Where a Pallas barrier lies in shared memory, for loops of PTX that wait and arrive themselves.

`plgpu.inline_mgpu` takes references and arrays, not barriers, hence a primitive of our own. It has no meaning in
interpret mode, where no PTX runs.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax._src.pallas.mosaic_gpu import core as gpu_core
from jax._src.pallas.mosaic_gpu import lowering
from jax.experimental.mosaic import gpu as mgpu
from jax.extend import core as jax_core
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm

from hisa_jax.kernels_pallas.types import Ref

_barrier_address = jax_core.Primitive("barrier_address")


@_barrier_address.def_effectful_abstract_eval
def _abstract_eval(barrier: Ref) -> tuple[Any, set]:
    return jax.core.ShapedArray((), jnp.dtype(jnp.int32)), {gpu_core._memory_effect}


@lowering.register_lowering_rule(_barrier_address, *gpu_core.WGxWARP_SEMANTICS)
@lowering.register_lowering_rule(_barrier_address, mgpu.LoweringSemantics.Warpgroup)
def _lower(ctx: Any, barrier: Any) -> ir.Value:
    return llvm.ptrtoint(ir.IntegerType.get_signless(32), barrier.barrier_ref.base_address)


def barrier_address(barriers: Ref) -> Array:
    """Int32 shared-memory address of the first of `barriers`, a whole array of them; each takes 8 bytes."""
    return _barrier_address.bind(barriers)
