"""Device code that reads keys by rows of 32 bits in VMEM: two bfloat16 tokens side by side, a pair, or four of 8 bits.

A load takes up to eight such rows from any one on, or every n-th, where one of bfloat16 begins with a whole tile of
16 tokens. Pallas' interpreter knows no other dtype of a reference: it takes the same tokens as they are.
"""

import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike

from hisa_jax.kernels_pallas.mosaic_tpu.config import SUBLANES
from hisa_jax.kernels_pallas.types import Interpret, Ref


def tokens_a_row(dtype: DTypeLike) -> int:
    """Tokens side by side in a row of 32 bits: the smallest unit."""
    return 4 // jnp.dtype(dtype).itemsize


def strided_pairs(
    keys_vmem: Ref,
    first: Array,
    size: int,
    starts: tuple[int, ...],
    stride: int,
    interpret: Interpret,
    multiple: int | None = None,
) -> Array:
    """Of `size` pairs from pair number `first` on: every `stride`-th of those from each start on.

    Args:
        keys_vmem: [1, N, D] bfloat16.
        multiple: that `first` is of, itself one of 8: `size` if None. A load does not start at any other row.

    Returns: [2 * n, D], the pairs of the first start first.
    """
    n = -(-size // stride)
    if interpret:
        pairs = keys_vmem[0, pl.ds(2 * first, 2 * size)].reshape(size, 2, -1)
        return jnp.concatenate([pairs[start::stride].reshape(2 * n, -1) for start in starts], axis=0)
    rows = keys_vmem.bitcast(jnp.int32).at[0, pl.ds(pl.multiple_of(first, multiple or size), size)]
    parts = [rows[pl.ds(start, n, stride=stride)] for start in starts]
    return pltpu.bitcast(jnp.concatenate(parts, axis=0), keys_vmem.dtype)


def copy_pairs(keys_vmem: Ref, pair: Array | int, to_vmem: Ref, at: int, interpret: Interpret) -> None:
    """Copies eight pairs (of 8-bit keys fours), from one on to another on, in references of [N, D]: a load, a store."""
    if interpret:
        n = tokens_a_row(keys_vmem.dtype)
        to_vmem[pl.ds(n * at, n * SUBLANES)] = keys_vmem[pl.ds(n * pair, n * SUBLANES)]
    else:
        to_vmem.bitcast(jnp.int32)[pl.ds(at, SUBLANES)] = keys_vmem.bitcast(jnp.int32)[pl.ds(pair, SUBLANES)]
