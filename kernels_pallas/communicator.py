"""What the stages of a scan ask of the devices over which the keys of each sequence are split.

`hisa_jax/sharded/communicator.py` answers it.
"""

from collections.abc import Callable
from typing import Protocol

from jax import Array


class Communicator(Protocol):
    """Those devices, and which tokens this one has. `total` and `map_rows` are collectives: all devices call them.

    Attributes: `n`, how many devices.
    """

    n: int

    def owns(self, positions: Array) -> Array:
        """Which tokens of a sequence are this device's."""
        ...

    def own(self, positions: Array) -> Array:
        """Places of tokens that are this device's, counted among its own."""
        ...

    def total(self, x: Array) -> Array:
        """The sum of what all devices have."""
        ...

    def map_rows(self, rows: Array, fill: int) -> Callable[[Callable[[Array, Array], Array], Array], Array]:
        """What maps f over rows of which each device has a part: (f, column [T]) -> [T] int32, the same on all devices.

        f gets some rows, [t, n * W], the parts of all devices side by side, and theirs of the column. Rows that are
        added, so that devices have equally many, hold `fill`.
        """
        ...
