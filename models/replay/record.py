"""The record of a rollout: what went in, what came out, what each query selected, which experts each token took."""

import dataclasses
from typing import Any

import jax
import numpy as np
from jax import Array

from hisa_jax.models.config import Config

Arrays = tuple[Array | np.ndarray, ...]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Rollout:
    """Sequences, and how the model that made them chose. A pytree: every array has the batch as its first axis.

    Columns are queries: a sequence of n tokens has n - 1, since its last token was never read. A row holds one sequence
    or several, one after the other, then padding. Of NumPy where `generate`, the engine and `pack_rollouts` make it.

    Attributes:
        tokens: [B, T] int32, what was read; 0 in padding.
        targets: [B, T] int32, the token after each.
        logprobs: [B, T] float32, of targets that the rollout made: the log-softmax of the model's logits, whatever the
            temperature. 0 elsewhere.
        is_made: [B, T] bool, whether the rollout made the target; False for those of a prompt and in padding.
        sequence: [B, T] int32, each token's sequence, numbered over the batch in the order they came; -1 in padding.
        cu_seqlens: [B, R + 1] int32, where the sequences of a row begin, and the end of the last; repeated if a row has
            fewer than R.
        indices: of each layer that selects [B, T - skipped, min(topk, T)] int32, for the columns after `skipped`: the
            selected positions, counted from the start of the sequence, ascending, then -1. Those of layers that share a
            selection are there once.
        experts: of each layer that has experts [B, T, experts a token] int32, -1 in padding. Empty: not recorded.
        topk: tokens that a query of each of these layers selects.
        start: queries at positions before it have no `indices`.
    """

    tokens: Array | np.ndarray
    targets: Array | np.ndarray
    logprobs: Array | np.ndarray
    is_made: Array | np.ndarray
    sequence: Array | np.ndarray
    cu_seqlens: Array | np.ndarray
    indices: Arrays
    experts: Arrays = ()
    topk: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    start: int = dataclasses.field(default=0, metadata={"static": True})

    @property
    def skipped(self) -> int:
        """First columns that `indices` leave out: min(start, T) where each row holds one sequence, else 0."""
        return self.tokens.shape[1] - self.indices[0].shape[1]

    @property
    def bytes_per_token(self) -> int:
        """What a token takes if its query is recorded: 4 for each index and expert, and 17 for the rest."""
        return 17 + 4 * sum(x.shape[-1] for x in (*self.indices, *self.experts))

    def check(self, config: Config) -> None:
        """Looks at every number, on the host; for records that others made or that were stored.

        Args:
            config: of the model that is to run it.

        Raises: TypeError, ValueError: dtypes and shapes that do not fit; offsets out of order; a selection of a token
            that its query does not see, of one twice, or of none; experts that there are not. Layer, row and column
            are named.
        """
        from hisa_jax.models.replay.checking import check_shapes, check_values

        check_shapes("Rollout.check", self, config)
        check_values("Rollout.check", jax.tree.map(np.asarray, self), config)


def places(cu_seqlens: Any, T: int, xp: Any) -> tuple[Any, Any]:
    """Where tokens of packed rows lie.

    Args:
        cu_seqlens: [B, R + 1] int32.
        T: columns.
        xp: numpy or jax.numpy.

    Returns: [B, T] int32 position of each token in its sequence, -1 in padding; [B, T] int32 column at which that
        sequence begins.
    """
    columns = xp.arange(T, dtype=np.int32)
    number = xp.sum(cu_seqlens[:, 1:, None] <= columns[None, None, :], axis=1, dtype=np.int32)
    first = xp.take_along_axis(cu_seqlens, number, axis=1)  # of padding: the end of the last
    return xp.where(columns[None, :] < cu_seqlens[:, -1:], columns[None, :] - first, -1), first
