"""How devices share what each has found for all queries. All of it runs inside `jax.shard_map`.

Every device merges an equal share of the queries: each sends what it has found for the others' queries and gets what
they have found for its own, which is `devices` times less to send and to hold than all candidates everywhere. Where
that is little, `to_all` saves the second exchange: all merge everything.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax


class Rows(NamedTuple):
    """Which device works on which of T rows: each on an equal share, or all on all.

    Attributes: `n`, how many devices `axis` has.
    """

    T: int
    axis: str
    n: int
    to_all: bool

    @classmethod
    def of(cls, T: int, axis: str, n: int, nbytes: int, most_to_all: int) -> "Rows":
        """Of rows of `nbytes` a device: all on all, if that is to send `most_to_all` bytes at most."""
        return cls(T, axis, n, n * nbytes <= most_to_all)

    def gather(self, rows: Array, fill: int) -> Array:
        """[T, j] on each device -> [t, n * j], of this device's rows, from all."""
        return to_all(rows, self.axis) if self.to_all else to_owner(rows, fill, self.axis, self.n)

    def share(self, x: Array) -> Array:
        """[T], the same on all devices -> [t], of this device's rows; those that are added have 0."""
        if self.to_all:
            return x
        return jnp.pad(x, (0, -self.T % self.n)).reshape(self.n, -1)[lax.axis_index(self.axis)]

    def spread(self, x: Array) -> Array:
        """[t, ...] of each device's rows -> [T, ...] of all, on all."""
        return x if self.to_all else from_owners(x, self.axis, self.T)


def to_owner(rows: Array, fill: int, axis: str, n_devices: int) -> Array:
    """[T, j] of all queries on each device -> [T / n, n * j] of this device's queries, from all; T is padded."""
    rows = jnp.pad(rows, ((0, -rows.shape[0] % n_devices), (0, 0)), constant_values=fill)
    shares = rows.reshape(n_devices, -1, rows.shape[1])
    return lax.all_to_all(shares, axis, split_axis=0, concat_axis=2, tiled=True)[0]


def from_owners(share: Array, axis: str, T: int) -> Array:
    """[T / n, k] of each device's queries -> [T, k] of all, on all."""
    return lax.all_gather(share, axis, axis=0, tiled=True)[:T]


def to_all(rows: Array, axis: str) -> Array:
    """[T, j] on each device -> [T, n * j] of all, on all."""
    return lax.all_gather(rows, axis, axis=1, tiled=True)
