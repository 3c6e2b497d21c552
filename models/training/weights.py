"""A model's weights by name, in float32 for the optimiser, those of all layers stacked.

Layers are alike, so that one is compiled and scanned, forward, backward and in the optimiser, whatever their number.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from hisa_jax.models.checkpoint import by_name, name_of
from hisa_jax.models.config import Config
from hisa_jax.models.modeling import Layer, Model

Weights = dict[str, Array]
"""Arrays by names such as "embed" and "layers.attention.q_a"; those of layers begin with an axis of layers."""

_LAYERS = "layers."


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Stacked:
    """A model as `forward` reads it.

    Attributes:
        config: of the model.
        graph: makes a `Layer` of the leaves of one.
        layers: those of all layers, each with an axis of layers first.
        embed, norm: [V, E] and [E].
        head: [E, V], None where it is the embedding.
    """

    config: Config = dataclasses.field(metadata={"static": True})
    graph: nnx.GraphDef[Layer] = dataclasses.field(metadata={"static": True})
    layers: nnx.State
    embed: Array
    norm: Array
    head: Array | None


@dataclasses.dataclass(frozen=True)
class Skeleton:
    """A model without its weights.

    Attributes:
        config: of the model, whose layers must be alike.
        dtype: that it computes in. Norms and head weights of the indexer stay float32.

    Raises: ValueError: layers of several kinds.
    """

    config: Config
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        if len(set(self.config.layer_kinds)) > 1 or set(self.config.indexer_kinds) != {"full"}:
            raise ValueError(
                f"training wants layers that are alike, each with an indexer; config has layer_kinds="
                f"{self.config.layer_kinds} and indexer_kinds={self.config.indexer_kinds}"
            )

    @functools.cached_property
    def _empty(self) -> Model:
        return nnx.eval_shape(lambda: Model(self.config, dtype=self.dtype, rngs=nnx.Rngs(0)))

    def initial(self, seed: int) -> Weights:
        """Random weights, float32."""

        @jax.jit
        def make() -> Weights:
            return weights_of(Model(self.config, dtype=jnp.float32, rngs=nnx.Rngs(seed)))

        return make()

    def stacked(self, weights: Weights) -> Stacked:
        """What `forward` reads, each weight brought to the dtype that the model has it in."""
        graph, layers = nnx.split(self._empty.layers[0])  # all layers are alike
        outer = {name: self._cast(name, x) for name, x in weights.items() if not name.startswith(_LAYERS)}
        return Stacked(
            config=self.config, graph=graph, layers=_filled(layers, lambda path: weights[_LAYERS + name_of(path)]),
            embed=outer["embed"], norm=outer["norm"], head=outer.get("head"),
        )  # fmt: skip

    def model(self, weights: Weights) -> Model:
        """The model with these weights."""
        graph, state = nnx.split(self._empty)
        return nnx.merge(graph, _filled(state, lambda path: _of_layer(weights, path)))

    def _cast(self, name: str, x: Array) -> Array:
        return x.astype(getattr(self._empty, name).get_value().dtype)


def _filled(state: nnx.State, value_of: Callable[[tuple[Any, ...]], Array]) -> nnx.State:
    """A state of shapes with values in their place, each in the dtype that the model has it in."""
    filled = [
        (path, parameter.replace(value_of(path).astype(parameter.get_value().dtype)))
        for path, parameter in nnx.to_flat_state(state)
    ]
    return nnx.from_flat_state(filled)


def weights_of(model: Model) -> Weights:
    """The weights of a model, float32."""
    # "layers.3.attention.q_a" is the fourth of "layers.attention.q_a".
    by_layer: dict[str, list[Array]] = {}
    for name, x in by_name(nnx.state(model)).items():
        is_layer = name.startswith(_LAYERS)
        by_layer.setdefault(_LAYERS + name.split(".", 2)[2] if is_layer else name, []).append(x.astype(jnp.float32))
    return {name: jnp.stack(xs) if name.startswith(_LAYERS) else xs[0] for name, xs in by_layer.items()}


def _of_layer(weights: Weights, path: tuple[object, ...]) -> Array:
    if path[0] != "layers":
        return weights[name_of(path)]
    layer = path[1]
    assert isinstance(layer, int)
    return weights[_LAYERS + name_of(path[2:])][layer]
