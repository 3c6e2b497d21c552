"""Sums of rows by pairs of neighbours, of pairs, and so on: the order of `hisa_jax.xla.means.tree_sum`."""

from collections.abc import Callable

import jax.numpy as jnp
from jax import Array, lax

_TILES = 8


def sum_rows(load: Callable[[Array], Array], n: int) -> Array:
    """Sum of n rows, a power of two: `load` gives rows [s] int32 as [s, D] float32 -> [D].

    Rows of a tile are `_TILES` apart, so the first levels add whole tiles in registers. The others add the two halves
    of a tile: its rows come with the bits of their numbers reversed, which makes neighbours of those.
    """
    n_tiles = min(n, _TILES)
    s = n // n_tiles
    rows = n_tiles * _bits_reversed(jnp.arange(s, dtype=jnp.int32), s)
    tiles = [load(rows + i) for i in range(n_tiles)]
    while len(tiles) > 1:
        tiles = [left + right for left, right in zip(tiles[0::2], tiles[1::2], strict=True)]
    total = tiles[0]
    while total.shape[0] > 1:
        half = total.shape[0] // 2
        # Additions, not reductions, of which XLA and Triton choose the order.
        left, right = lax.split(total, (half, half), axis=0)
        total = left + right
    return total.reshape(total.shape[1])


def _bits_reversed(x: Array, n: int) -> Array:
    """Of numbers below n, a power of two."""
    last = n.bit_length() - 2
    return sum((((x >> bit) & 1) << (last - bit) for bit in range(last + 1)), jnp.zeros_like(x))
