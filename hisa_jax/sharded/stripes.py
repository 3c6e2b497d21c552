"""Which device holds what of a sequence that is split over several: stripe i lies on device i % n_devices.

A stripe is a run of whole blocks. One arithmetic serves tokens, pages and blocks, whichever a stripe is counted in.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax


class Shard(NamedTuple):
    """How the sequences of a call are split over devices; static.

    Attributes:
        axis: the mesh axis that splits them.
        n_devices: its devices.
        stripe: tokens in a row that one device has: whole blocks, and pages where there are pages.
        max_keys: most tokens of a sequence, on all devices.
    """

    axis: str
    n_devices: int
    stripe: int
    max_keys: int

    def stripes(self) -> "Stripes":
        """This device's tokens; inside `jax.shard_map`."""
        return Stripes(self.stripe, self.n_devices, lax.axis_index(self.axis))


class Stripes(NamedTuple):
    """One device's part of a sequence, in units of tokens, pages or blocks.

    Attributes: `size`, units of a stripe; `n_devices`, that take turns; `device`, [] int32, which of them this is.
    """

    size: int
    n_devices: int
    device: Array

    def owns(self, places: Array) -> Array:
        """Which units of the sequence, from 0, are this device's."""
        return places // self.size % self.n_devices == self.device

    def own(self, places: Array) -> Array:
        """Places of the request that are this device's, counted among its own."""
        return places // (self.size * self.n_devices) * self.size + places % self.size

    def place(self, own: Array) -> Array:
        """Inverts `own`; keeps -1."""
        places = (own // self.size * self.n_devices + self.device) * self.size + own % self.size
        return jnp.where(own >= 0, places, -1)

    def before(self, end: Array) -> Array:
        """How many of the first `end` places are this device's."""
        rounds, rest = jnp.divmod(end, self.size * self.n_devices)
        return rounds * self.size + jnp.clip(rest - self.device * self.size, 0, self.size)

    def columns(self, table: Array) -> Array:
        """[R, P] -> [R, P / n_devices, rounded up to whole stripes]: the columns at this device's places, then -1."""
        table = jnp.pad(table, ((0, 0), (0, -table.shape[1] % (self.size * self.n_devices))), constant_values=-1)
        stripes = table.reshape(table.shape[0], -1, self.n_devices, self.size)
        return stripes[:, :, self.device].reshape(table.shape[0], -1)
