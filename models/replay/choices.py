"""A record as a forward pass reads it: checked, and spread over all columns."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import Array

from hisa_jax.models.config import Config
from hisa_jax.models.replay.checking import check_shapes, check_tokens, check_traced, check_values, is_known
from hisa_jax.models.replay.record import Rollout, places
from hisa_jax.models.training.sparse import Layout


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choices:
    """What a forward pass is to run.

    Attributes:
        layout: where the sequences lie.
        recorded: of each layer that selects [B, T, K] int32, -1 where nothing is recorded; empty: nothing is.
        experts: of each layer that has experts [B, T, X] int32; empty: the router chooses.
        start: queries at positions before it have no record.
    """

    layout: Layout
    recorded: tuple[Array, ...]
    experts: tuple[Array, ...]
    start: int

    @classmethod
    def of(cls, call: str, config: Config, tokens: Array, selections: Rollout, cu_seqlens: Any = None) -> "Choices":
        """Of a record for these tokens. Raises TypeError or ValueError where it does not fit them or the model."""
        check_shapes(call, selections, config)
        check_tokens(call, tokens, selections)
        if cu_seqlens is not None:
            raise ValueError(f"{call}: cu_seqlens and selections, wanted one of them: a record has its own")
        layout = layout_of(selections.cu_seqlens, tokens.shape[1])
        if is_known(selections):
            check_values(call, selections, config)
        else:
            check_traced(call, selections, config, layout.positions)
        pad = ((0, 0), (selections.skipped, 0), (0, 0))
        recorded = tuple(jnp.pad(x, pad, constant_values=-1) for x in map(jnp.asarray, selections.indices))
        experts = tuple(map(jnp.asarray, selections.experts))
        return cls(layout=layout, recorded=recorded, experts=experts, start=selections.start)


def layout_of(cu_seqlens: Any, T: int) -> Layout:
    """[B, R + 1] int32 -> where the sequences of rows of T columns lie."""
    cu_seqlens = jnp.asarray(cu_seqlens)
    return Layout(*places(cu_seqlens, T, jnp), cu_seqlens)


def is_same_set(a: Array, b: Array) -> Array:
    """[..., K] int32 each -> [...] bool, whether they hold the same numbers, in whatever order."""
    a, b = (jnp.sort(x, axis=-1) for x in (a, b))
    return jnp.all(a == b, axis=-1)
