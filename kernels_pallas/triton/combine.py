"""Attention over parts of lists added up: by the log-sum-exps of the parts, in one launch.

Floor, 32 queries of dsv32 in two parts on an H200: 21 MB / 4.3 TB/s = 5 us, of one query in 16 parts the launch.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jax.typing import DTypeLike

from hisa_jax.kernels_pallas.triton.combine_body import combine_body

_VALUES = 8192  # a program, of all parts
_MOST_ROWS = 4  # of one sequence's 64 heads 16 programs


def combine(partial: Array, lse: Array, dtype: DTypeLike, interpret: bool) -> tuple[Array, Array]:
    """[splits, ..., V] float32, [splits, ...] -> [..., V] of a dtype, [...]: partial results to the whole one.

    Of their rows, heads of queries, there is a multiple of 4.
    """
    n_splits, *rows, V = partial.shape
    partial, lse = partial.reshape(n_splits, -1, V), lse.reshape(n_splits, -1)
    tile = 1 << (max(1, min(_VALUES // (n_splits * V), _MOST_ROWS)).bit_length() - 1)
    spec = lambda *shape: pl.BlockSpec((tile, *shape), lambda i: (i, *(0 for _ in shape)))  # noqa: E731
    o, lse = pl.pallas_call(
        combine_body,
        grid=(lse.shape[1] // tile,),
        in_specs=[
            pl.BlockSpec((n_splits, tile, V), lambda i: (0, i, 0)),
            pl.BlockSpec((n_splits, tile), lambda i: (0, i)),
        ],
        out_specs=[spec(V), spec()],
        out_shape=[
            jax.ShapeDtypeStruct(partial.shape[1:], dtype),
            jax.ShapeDtypeStruct(lse.shape[1:], jnp.float32),
        ],
        compiler_params=plt.CompilerParams(num_warps=4, num_stages=2),
        name="sparse_attention_combine",
        interpret=interpret,
    )(partial, lse)
    return o.reshape(*rows, V), lse.reshape(*rows)
