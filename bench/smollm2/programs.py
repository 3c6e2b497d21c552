"""Programs compiled ahead, several at a time, beside whatever else runs."""

from collections.abc import Hashable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax


class Programs:
    """Compiled programs, each made once for arguments of some shapes."""

    def __init__(self) -> None:
        # On a CPU a second compiler takes the place of what it compiles for.
        self.pool = ThreadPoolExecutor(8 if jax.default_backend() == "gpu" else 1)
        self.made: dict[Hashable, Future[Any]] = {}

    def start(self, name: Hashable, program: Any, *args: Any) -> Future[Any]:
        """A jitted function, being compiled for arguments of these shapes."""
        leaves, structure = jax.tree.flatten(args)
        key = (name, structure, tuple((leaf.shape, leaf.dtype) for leaf in leaves))
        if key not in self.made:
            like = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves]
            self.made[key] = self.pool.submit(program.lower(*jax.tree.unflatten(structure, like)).compile)
        return self.made[key]
