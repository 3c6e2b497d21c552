"""The best blocks by the best of their tokens, put together from a backend's stages.

units          the greatest score of each unit of a block's visible tokens, all tokens scored
best_columns   the best blocks, the always-kept ones among them
"""

import math
from typing import Protocol

import jax.numpy as jnp
from jax import Array

from hisa_jax.kernels_pallas.flat_call import FlatCall
from hisa_jax.kernels_pallas.lists import ListStages
from hisa_jax.kernels_pallas.sort_key import FORCED, INVISIBLE
from hisa_jax.kernels_pallas.types import Interpret
from hisa_jax.methods import BlockSparse

_MOST = 128  # tokens of a tile of keys
_BYTES = 2**29  # of sort keys that all queries at a time leave in memory


class UnitStages(ListStages, Protocol):
    """What a backend brings for blocks by their best token."""

    def units(self, call: FlatCall, method: BlockSparse, interpret: Interpret = False) -> Array:
        """[T, n] int32: the greatest sort key of the visible tokens of each unit, see `unit_of`.

        From the unit on that begins with an invisible token they may be anything.
        """
        ...

    def best_columns(self, x: Array, limit: Array, k: int, interpret: Interpret = False) -> tuple[Array, Array]:
        """The best of the first `limit` [T] columns of rows of sort keys, up to 32,768: [T, k] of them and columns."""
        ...


def unit_of(method: BlockSparse, H: int) -> int:
    """Tokens of a unit: of several heads each is one, of a head by itself up to 128, which divide a block."""
    return 1 if H > 1 else math.gcd(method.block_size, _MOST)


def queries_at_a_time(max_keys: int, unit: int) -> int:
    """A power of two, so that their sort keys stay within half a GiB."""
    return 1 << (max(_BYTES * unit // (4 * max_keys), 16).bit_length() - 1)


def best_blocks(
    stages: UnitStages, call: FlatCall, method: BlockSparse, interpret: Interpret, n_kept: Array | None = None
) -> Array:
    """[T, block_topk] int32 block ids, ascending, then -1.

    Args:
        n_kept: [T] int32, how many blocks each query keeps; None: `block_topk`.
    """
    size, m = method.block_size, method.block_topk
    eligible = -(-call.visible // size)
    first = jnp.arange(m, dtype=jnp.int32)
    every = jnp.where(first < eligible[:, None], first, -1)
    n = -(-call.sequences.max_keys // size)
    if n_kept is None and n <= m:
        return every
    most = m if n_kept is None else n_kept[:, None]
    sort_keys, unit = stages.units(call, method, interpret), unit_of(method, call.q.shape[1])
    seen = jnp.arange(sort_keys.shape[1], dtype=jnp.int32) * unit < call.visible[:, None]
    x = jnp.where(seen, sort_keys, INVISIBLE)[:, : n * (size // unit)]
    x = jnp.pad(x, ((0, 0), (0, n * (size // unit) - x.shape[1])), constant_values=INVISIBLE)
    x = jnp.max(x.reshape(x.shape[0], n, size // unit), axis=2)
    ids = jnp.arange(n, dtype=jnp.int32)
    forced = (ids < method.keep_first) | (ids >= (eligible - method.keep_last)[:, None])
    x = jnp.where(forced & (ids < eligible[:, None]), FORCED, x)
    found = stages.best_columns(x, eligible, min(m, n), interpret)
    best = found[1] if n_kept is None else stages.within(*found, n_kept, interpret)
    best = jnp.pad(best, ((0, 0), (0, m - best.shape[1])), constant_values=-1)
    return jnp.where(eligible[:, None] <= most, every, best)
