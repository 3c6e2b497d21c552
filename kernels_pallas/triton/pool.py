"""Mean key of each block, in parts that the tensor core can take.
    sum_p o[n, p] * scale[n] = mean over the block's tokens of k_scale[s] * k[s]         float32 sums, rounded once

Floor, 64K keys of dsv32 in e4m3 on an H200: 8.7 MB / 4.3 TB/s = 2 us; the launch is most of what it takes. e4m3
carries 4 bits of a number, so a mean becomes two e4m3 numbers (the second holds what the first left) under one scale
a block; bfloat16 carries 8 by itself, float32 all.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jax.typing import DTypeLike

from hisa_jax.kernels_pallas.triton.pool_body import pool_body

_NUM_WARPS = 4


def parts_of(dtype: DTypeLike) -> int:
    """How many numbers of the keys' dtype make up a mean."""
    return 2 if jnp.dtype(dtype).itemsize == 1 else 1


def is_addressable(size: int, dtype: DTypeLike) -> bool:
    """Whether a kernel can address so many elements: up to 4 GiB Pallas counts them in 32 bits, with a sign."""
    return jnp.dtype(dtype).itemsize > 1 or size <= 2**31


def check_addressable(k: Array, name: str = "k") -> None:
    """Raises ValueError: keys that a kernel cannot address whole."""
    if not is_addressable(k.size, k.dtype):
        raise ValueError(
            f"triton: {name} has {k.size} elements of one byte, wanted at most {2**31} in all of a batch or cache, "
            'or implementation="xla"'
        )


@functools.partial(jax.jit, static_argnames=("block_size", "interpret"))
def pool(
    k: Array, k_scale: Array | None, counts: Array | np.ndarray, *, block_size: int, interpret: bool = False
) -> tuple[Array, Array | None]:
    """[S, D], [S], [n] -> [n, parts, D] in the dtype of k, [n] float32 scale (None for bfloat16).

    Args:
        counts: tokens present in each block of `block_size` rows, the first ones; S = n * block_size.
    """
    n, D = counts.shape[0], k.shape[1]
    if not is_addressable(k.size, k.dtype):
        # Blocks do not meet, so keys beyond what a kernel can address are pooled half by half.
        middle = n // 2
        halves = [(slice(middle * block_size), slice(middle)), (slice(middle * block_size, None), slice(middle, None))]
        options: dict = {"block_size": block_size, "interpret": interpret}
        parts = [pool(k[rows], None if k_scale is None else k_scale[rows], counts[n], **options) for rows, n in halves]
        return jax.tree.map(lambda *x: jnp.concatenate(x), *parts)
    n_parts = parts_of(k.dtype)
    in_specs = [pl.BlockSpec((block_size, D), lambda b: (b, 0)), pl.BlockSpec((1,), lambda b: (b,))]
    operands = [k, counts]
    if k_scale is not None:
        in_specs.append(pl.BlockSpec((block_size,), lambda b: (b,)))
        operands.append(k_scale)
    means, scale = pl.pallas_call(
        functools.partial(pool_body, n_parts=n_parts),
        grid=(n,),
        in_specs=in_specs,
        out_specs=[pl.BlockSpec((None, n_parts, D), lambda b: (b, 0, 0)), pl.BlockSpec((1,), lambda b: (b,))],
        out_shape=[jax.ShapeDtypeStruct((n, n_parts, D), k.dtype), jax.ShapeDtypeStruct((n,), jnp.float32)],
        compiler_params=plt.CompilerParams(num_warps=_NUM_WARPS, num_stages=1),
        name="hisa_pool",
        interpret=interpret,
    )(*operands)
    return means, scale if n_parts > 1 else None
