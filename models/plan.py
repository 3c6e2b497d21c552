"""Which method runs in which layer and phase: everything a user may pass as `method`, as one hashable value."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, get_args

import hisa_jax as hj
from hisa_jax.models.config import Config

Phase = Literal["prefill", "last_prefill", "decode"]
Rule = Callable[[int, Phase], hj.Method]
MethodLike = hj.Method | Sequence[hj.Method] | Mapping[int, hj.Method] | Rule | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """A method for every layer and phase; calling it looks one up.

    Attributes:
        layers: one method a layer. Those of layers that share a selection are not used.
        rule: decides instead of `layers` if there is one.
    """

    layers: tuple[hj.Method, ...]
    rule: Rule | None = None

    def __call__(self, layer: int, phase: Phase) -> hj.Method:
        if self.rule is None:
            return self.layers[layer]
        return _checked(self.rule(layer, phase), f"method({layer}, {phase!r})")


def make_plan(method: MethodLike, config: Config) -> Plan:
    """Makes a plan of what a user passes as `method`.

    Args:
        method: a method for all layers; a sequence of one a layer; a mapping from layers, where those it leaves out
            keep the checkpoint's own method; a rule (layer, phase) -> method, with the phases "prefill" (a chunk
            of a prompt or a whole sequence), "last_prefill" (a prompt's last chunk) and "decode"; None for the
            checkpoint's own.
        config: of the model.

    Returns: a `Plan`.
    Raises: TypeError: something else. ValueError: a sequence of another length, a layer that does not exist, a method
        of entries or of each head.
    """
    own, layers = config.method, config.num_hidden_layers
    if method is None:
        return Plan(layers=(own,) * layers)
    if isinstance(method, get_args(hj.Method)):
        return Plan(layers=(_checked(method, "method"),) * layers)
    if isinstance(method, Mapping):
        unknown = [layer for layer in method if layer not in range(layers)]
        if unknown:
            raise ValueError(f"method names layer {unknown[0]!r}, wanted an int from 0 to {layers - 1}")
        return Plan(layers=tuple(_checked(method.get(i, own), f"method[{i}]") for i in range(layers)))
    if isinstance(method, Sequence) and not isinstance(method, str):
        if len(method) != layers:
            raise ValueError(f"method is a sequence of {len(method)}, wanted one for each of {layers} layers")
        return Plan(layers=tuple(_checked(one, f"method[{i}]") for i, one in enumerate(method)))
    if callable(method):
        return Plan(layers=(own,) * layers, rule=method)
    raise TypeError(
        f"method is {type(method).__name__}, wanted hj.Hisa, hj.Dsa, hj.Scan, hj.BlockSparse, a sequence or mapping of "
        "them, a rule (layer, phase) -> method, or None"
    )


def _checked(method: object, name: str) -> hj.Method:
    """A method by which a layer of these models can select; raises where it is none."""
    if not isinstance(method, get_args(hj.Method)):
        raise TypeError(f"{name} is {type(method).__name__}, wanted hj.Hisa, hj.Dsa, hj.Scan or hj.BlockSparse")
    if method.entry_size > 1 or method.per_head:
        raise ValueError(f"{name} is {method}, wanted one whose keys are tokens, for all heads together")
    return method
