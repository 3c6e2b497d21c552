"""What an engine says of its steps: records, for callers and for what checks them."""

import dataclasses
from typing import NamedTuple

from jax import Array

import hisa_jax as hj
from hisa_jax.models.plan import Phase
from hisa_jax.models.replay.record import Rollout
from hisa_jax.models.sampling import Logprobs


class Traced(NamedTuple):
    """What one layer selected in a step, and from what.

    Attributes:
        layer: its number.
        selection: of [B, T]; the new tokens of a row are its last columns.
        q, k, w: index queries [B, T, H, D], index keys [B, T, D] and head weights [B, T, H] of the new tokens.
    """

    layer: int
    selection: hj.Selection
    q: Array
    k: Array | hj.QuantizedKeys
    w: Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """One forward pass.

    Attributes:
        phase: "decode", or that of the chunks.
        requests: those that took part.
        rows: of each in the arrays of `layers`.
        starts, n_new: tokens of each before, and how many went in.
        n_kept: how many of those stayed; the others were rejected proposals.
        layers: of those that select, if the engine traces.
    """

    phase: Phase
    requests: list[int]
    rows: list[int]
    starts: list[int]
    n_new: list[int]
    n_kept: list[int]
    layers: tuple[Traced, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """What `Engine.step` did. The caller may change it without effect on the engine.

    Attributes:
        forks: (new request, its donor, tokens shared) of those admitted that share a prefix.
        steps: forward passes, none to two.
        finished: new tokens by request.
        logprobs: of the new tokens of those finished that asked for them.
        failed: requests that ended without, and why.
        draft_errors: requests whose draft raised or proposed something that is not a token, and what that was. They go
            on without proposals.
        rollouts: of those that finished, if the engine returns selections.
    """

    forks: list[tuple[int, int, int]] = dataclasses.field(default_factory=list)
    steps: list[Step] = dataclasses.field(default_factory=list)
    finished: dict[int, list[int]] = dataclasses.field(default_factory=dict)
    logprobs: dict[int, list[Logprobs]] = dataclasses.field(default_factory=dict)
    failed: dict[int, str] = dataclasses.field(default_factory=dict)
    draft_errors: dict[int, str] = dataclasses.field(default_factory=dict)
    rollouts: dict[int, Rollout] = dataclasses.field(default_factory=dict)
