"""The tokens that a scan has marked, as lists: what bits are set in each row of masks, in order.

Floor, 4096 queries of 64K that mark 10,000 tokens each: 34 MB of bits and 164 MB of lists, 46 us.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from hisa_jax.kernels_pallas.triton.list_tokens_body import Inputs, list_tokens_body
from hisa_jax.kernels_pallas.types import Ref

_TILE = 1024  # words at a time
_NUM_WARPS = 4


@functools.partial(jax.jit, static_argnames=("capacity", "interpret"))
def list_tokens(
    masks: Array,
    limit: Array,
    capacity: int,
    ties: tuple[Array, Array] | None = None,
    *,
    interpret: bool = False,
) -> tuple[Array, Array]:
    """[T, words] int32, [T] int32 -> [T, capacity] int32 tokens, ascending, then -1; [T] int32, how many were marked.

    Args:
        masks: as `scan_masks` gives them; only words with tokens before `limit` are read.
        ties: other masks that hold these, and [T] int32, how many of the first tokens that they alone have are taken.

    A row that marks more than `capacity` is counted; its list is of no use.
    """
    T, n_words = masks.shape
    row = lambda width: pl.BlockSpec((None, width), lambda t: (t, 0))  # noqa: E731
    one = pl.BlockSpec((1,), lambda t: (t,))
    at_least, room = (None, None) if ties is None else ties
    is_tied: list[Ref] = [None, None] if ties is None else [row(n_words), one]
    return pl.pallas_call(
        functools.partial(list_tokens_body, tile=min(_TILE, pl.next_power_of_2(n_words))),
        grid=(T,),
        in_specs=[Inputs(row(n_words), one, *is_tied)],
        out_specs=[row(capacity), one],
        out_shape=[jax.ShapeDtypeStruct((T, capacity), jnp.int32), jax.ShapeDtypeStruct((T,), jnp.int32)],
        compiler_params=plt.CompilerParams(num_warps=_NUM_WARPS, num_stages=1),
        name="hisa_list_tokens",
        interpret=interpret,
    )(Inputs(masks, limit, at_least, room))
