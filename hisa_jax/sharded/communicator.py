"""What devices tell each other while they scan keys that are split over them: `kernels_pallas/communicator.py`."""

import dataclasses
from collections.abc import Callable

from jax import Array, lax

from hisa_jax.sharded.exchange import Rows
from hisa_jax.sharded.stripes import Stripes


@dataclasses.dataclass(frozen=True)
class Communicator:
    """`kernels_pallas.communicator.Communicator`; inside `jax.shard_map`.

    Attributes:
        axis: the mesh axis; `tokens`: which of each sequence are this device's.
        most_to_all: as that of `select_kernels.Local`.
    """

    axis: str
    tokens: Stripes
    most_to_all: int

    @property
    def n(self) -> int:
        return self.tokens.n_devices

    def owns(self, positions: Array) -> Array:
        return self.tokens.owns(positions)

    def own(self, positions: Array) -> Array:
        return self.tokens.own(positions)

    def total(self, x: Array) -> Array:
        return lax.psum(x, self.axis)

    def map_rows(self, rows: Array, fill: int) -> Callable[[Callable[[Array, Array], Array], Array], Array]:
        shared = Rows.of(rows.shape[0], self.axis, self.n, rows.nbytes, self.most_to_all)
        of_all = shared.gather(rows, fill)
        return lambda f, column: shared.spread(f(of_all, shared.share(column)))
