"""How devices share what each has found for all queries. All of it runs inside `jax.shard_map`.

Every device merges an equal share of the queries: each sends what it has found for the others' queries and gets what
they have found for its own, which is `devices` times less to send and to hold than all candidates everywhere. Where
that is little, `to_all` saves the second exchange: all merge everything.
"""

import jax.numpy as jnp
from jax import Array, lax


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
