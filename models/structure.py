"""A model as jitted functions take it: its weights as a list, and all else as one static argument.

Flax's description of a model is hashed, and its state taken apart, at every call of a jitted function. For 61 layers
that is milliseconds of Python, which a decoding step waits for. Here both are done once.
"""

from collections.abc import Sequence
from typing import get_args

import jax
from flax import nnx
from jax import Array

from hisa_jax.models.modeling import Model
from hisa_jax.models.plan import Phase


class Structure:
    """A model without its weights; equal for models that run the same program."""

    def __init__(self, model: Model) -> None:
        graph, state = nnx.split(model)
        self._parts = graph, jax.tree.structure(state)
        self._hash = hash(self._parts)

    def merge(self, weights: Sequence[Array]) -> Model:
        """The model with these weights, in the order of `weights_of`."""
        graph, tree = self._parts
        return nnx.merge(graph, jax.tree.unflatten(tree, weights))

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Structure) and self._parts == other._parts)


def weights_of(model: Model) -> list[Array]:
    """All arrays of a model, as it has them now."""
    return jax.tree.leaves(nnx.state(model))


def structures_of(model: Model) -> dict[Phase, Structure]:
    """The model with the methods of each phase, a rule asked once: phases of the same methods run the same program."""
    layers = range(model.config.num_hidden_layers)
    phases: tuple[Phase, ...] = get_args(Phase)
    return {phase: Structure(model.with_method([model.plan(i, phase) for i in layers])) for phase in phases}
