"""Queries of a batch in tiles, one after the other: what a tile makes in between is all the memory there is."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

# What fits a CPU's caches. A GPU wants fewer and larger ones: each costs a dozen launches, forward and backward.
_TILE_BYTES = 32 << 20
_GPU_TILE_BYTES = 256 << 20


class QueryTiles(NamedTuple):
    """`n` tiles of `t` queries for each sequence, the last one padded."""

    n: int
    t: int

    @classmethod
    def of(cls, T: int, floats: int) -> "QueryTiles":
        """Tiles of T queries, of which each makes `floats` float32 numbers."""
        size = _GPU_TILE_BYTES if jax.default_backend() == "gpu" else _TILE_BYTES
        t = min(max(size // (4 * floats), 1), T)
        return cls(-(-T // t), t)

    def sequences(self, B: int) -> Array:
        """[B * n] int32: the sequence of each tile."""
        return jnp.repeat(jnp.arange(B, dtype=jnp.int32), self.n)

    def cut(self, x: Array, fill: int = 0) -> Array:
        """[B, T, ...] -> [B * n, t, ...]."""
        missing = [(0, 0)] * x.ndim
        missing[1] = (0, self.n * self.t - x.shape[1])
        return jnp.pad(x, missing, constant_values=fill).reshape(x.shape[0] * self.n, self.t, *x.shape[2:])

    def join(self, x: Array, B: int, T: int) -> Array:
        """[B * n, t, ...] -> [B, T, ...]."""
        return x.reshape(B, self.n * self.t, *x.shape[2:])[:, :T]
