"""How far a training forward pass would have chosen otherwise than the rollout, and what the replay leaves of that."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from hisa_jax.models.replay.forward import TrainingOutput
from hisa_jax.models.replay.record import Rollout, places

Shares = tuple[float | None, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReplayReport:
    """What `replay_report` returns. Shares are of recorded queries, None where there is none.

    Attributes:
        selections: of each layer that selects, the share of queries whose own selection is exactly the rollout's.
        choices: the same among queries that see more tokens than they select: others have no choice.
        experts: of each layer that has experts, the share of tokens whose router chooses exactly the rollout's.
        logprob_change: the largest difference of a log-probability from the rollout's, of tokens that it made.
        n_queries, n_made: how many queries and tokens that is.
    """

    selections: Shares
    choices: Shares
    experts: Shares
    logprob_change: float | None
    n_queries: int
    n_made: int

    @property
    def selection_share(self) -> float | None:
        """Of all layers and queries together."""
        return _mean(self.selections)

    @property
    def choice_share(self) -> float | None:
        """Of all layers and queries that have a choice; each layer counts the same."""
        return _mean(self.choices)

    @property
    def expert_share(self) -> float | None:
        """Of all layers and tokens together."""
        return _mean(self.experts)


def replay_report(rollout: Rollout, output: TrainingOutput) -> ReplayReport:
    """Compares a training forward pass with the rollout that it replayed.

    Args:
        rollout: what was replayed.
        output: of `training_forward(..., selections=rollout, compare=True)`.

    Returns: `ReplayReport`.
    Raises: ValueError: an output of other shapes, or without what `compare` and targets give.
    Example:
        >>> out = models.training_forward(model, rollout.tokens, selections=rollout, compare=True)  # doctest: +SKIP
        >>> models.replay_report(rollout, out).selection_share  # doctest: +SKIP
    """
    call = "replay_report"
    rollout, output = jax.tree.map(np.asarray, (rollout, output))
    if output.same_selections is None or output.logprobs is None:
        raise ValueError(f"{call}: output has no same_selections, wanted one of training_forward(..., compare=True)")
    shape = rollout.tokens.shape
    if output.logprobs.shape != shape or len(output.same_selections) != len(rollout.indices):
        raise ValueError(
            f"{call}: output is of {len(output.same_selections)} layers and tokens {list(output.logprobs.shape)}, "
            f"wanted {len(rollout.indices)} and {list(shape)}, those of rollout"
        )
    positions, _ = places(rollout.cu_seqlens, shape[1], np)
    is_query = (positions >= 0) & (positions >= rollout.start)
    selections, choices = [], []
    for same, indices in zip(output.same_selections, rollout.indices, strict=True):
        n_selected = np.pad((indices >= 0).sum(-1), ((0, 0), (rollout.skipped, 0)))
        selections.append(_share(same, is_query))
        choices.append(_share(same, is_query & (positions >= n_selected)))
    of_experts = () if output.same_experts is None else output.same_experts
    changes = np.abs(output.logprobs - rollout.logprobs)[rollout.is_made]
    return ReplayReport(
        selections=tuple(selections), choices=tuple(choices),
        experts=tuple(_share(same, positions >= 0) for same in of_experts),
        logprob_change=float(changes.max()) if changes.size else None, n_queries=int(is_query.sum()),
        n_made=changes.size,
    )  # fmt: skip


def _share(same: Any, where: np.ndarray) -> float | None:
    return float(same[where].mean()) if where.any() else None


def _mean(shares: Sequence[float | None]) -> float | None:
    known = [share for share in shares if share is not None]
    return sum(known) / len(known) if known else None
