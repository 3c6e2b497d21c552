"""Rollouts of unlike lengths, in rows of one."""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from hisa_jax.models import checks
from hisa_jax.models.replay.record import Rollout
from hisa_jax.models.replay.recorder import empty_rollout


class _Piece(NamedTuple):
    """One sequence of a record: columns `first` to `stop` of a row."""

    of: Rollout
    row: int
    first: int
    stop: int


def pack_rollouts(
    rollouts: Sequence[Rollout], *, length: int | None = None, rows: int | None = None, sequences: int | None = None
) -> Rollout:
    """Puts the sequences of several records into one, for a training step.

    Args:
        rollouts: of the same model, on the host.
        length: columns of a row; each holds sequences one after the other, as many as fit in the order they come.
            None: one sequence a row, and as many columns as the longest has.
        rows: of the result, the last ones empty if there are more than needed. None: as many as needed.
        sequences: R, the most that a row may hold. None: as many as come together. With all three given, shapes are the
            same whatever the rollouts, so that a training step compiles once.

    Returns: `Rollout`, whose `sequence` counts the sequences in the order given.
    Raises: ValueError: no rollout, or those of unlike models or `start`; a sequence longer than `length`; more rows
        than `rows`; a size below 1.
    Example:
        >>> batch = models.pack_rollouts([rollout, rollout], length=2 * rollout.tokens.shape[1])  # doctest: +SKIP
    """
    call = "pack_rollouts"
    if not isinstance(rollouts, Sequence) or not rollouts or not all(isinstance(x, Rollout) for x in rollouts):
        raise ValueError(f"{call}: rollouts is {checks.shown(rollouts)}, wanted a sequence of at least one Rollout")
    for name, size in (("length", length), ("rows", rows), ("sequences", sequences)):
        if size is not None:
            checks.whole(call, name, size)
    first = rollouts[0]
    for i, other in enumerate(rollouts):
        if _kind(other) != _kind(first):
            raise ValueError(
                f"{call}: rollouts[{i}] has (topk, start, widths of experts) {_kind(other)}, wanted {_kind(first)}, "
                "those of rollouts[0]"
            )
    pieces = [piece for rollout in rollouts for piece in _pieces(rollout)]
    if not pieces:
        raise ValueError(f"{call}: rollouts hold no sequence")
    longest = max(piece.stop - piece.first for piece in pieces)
    if length is not None and longest > length:
        raise ValueError(
            f"{call}: length={length}, wanted at least {longest}, the longest sequence without its last token"
        )
    placed = _first_fit(pieces, length or longest, 1 if length is None else sequences)
    in_rows, T = np.bincount([b for b, _ in placed]), length or longest
    if rows is not None and rows < len(in_rows):
        raise ValueError(f"{call}: rows={rows}, wanted at least {len(in_rows)} of length={T}")
    B, R = rows or len(in_rows), sequences or int(in_rows.max())
    skipped = min(first.start, T) if R == 1 else 0
    n_experts = first.experts[0].shape[-1] if first.experts else 0
    packed = empty_rollout(
        B, T, R, skipped, tuple(min(k, T) for k in first.topk), len(first.experts), n_experts, first.topk, first.start
    )
    n_in_row = [0] * B
    for number, (piece, (b, t)) in enumerate(zip(pieces, placed, strict=True)):
        _copy(packed, piece, b, t)
        packed.sequence[b, t : t + piece.stop - piece.first] = number
        n_in_row[b] += 1
        packed.cu_seqlens[b, n_in_row[b] :] = t + piece.stop - piece.first
    return packed


def _kind(rollout: Rollout) -> tuple:
    return rollout.topk, rollout.start, tuple(x.shape[-1] for x in rollout.experts)


def _pieces(rollout: Rollout) -> list[_Piece]:
    offsets = np.asarray(rollout.cu_seqlens)
    pairs = [(b, *pair) for b, row in enumerate(offsets.tolist()) for pair in itertools.pairwise(row)]
    return [_Piece(rollout, b, first, stop) for b, first, stop in pairs if stop > first]


def _first_fit(pieces: list[_Piece], length: int, most: int | None) -> list[tuple[int, int]]:
    """Row and column of each: the first row that has room."""
    placed: list[tuple[int, int]] = []
    used: list[tuple[int, int]] = []  # of each row: columns, sequences
    for piece in pieces:
        n = piece.stop - piece.first
        b = next((b for b, (end, count) in enumerate(used) if end + n <= length and count != most), len(used))
        end, count = used[b] if b < len(used) else (0, 0)
        used[b : b + 1] = [(end + n, count + 1)]
        placed.append((b, end))
    return placed


def _copy(packed: Rollout, piece: _Piece, b: int, t: int) -> None:
    of, (_, row, first, stop) = piece.of, piece
    n = stop - first
    for name in ("tokens", "targets", "logprobs", "is_made"):
        getattr(packed, name)[b, t : t + n] = np.asarray(getattr(of, name))[row, first:stop]
    for to, x in zip(packed.experts, of.experts, strict=True):
        to[b, t : t + n] = np.asarray(x)[row, first:stop]
    # Columns that either leaves out belong to queries before `start`.
    left_out = max(of.skipped - first, packed.skipped - t, 0)
    for to, x in zip(packed.indices, of.indices, strict=True):
        rows = np.asarray(x)[row, first + left_out - of.skipped : max(stop - of.skipped, 0), : to.shape[-1]]
        to[b, t + left_out - packed.skipped :][: len(rows), : rows.shape[-1]] = rows
