"""Keeps, on the host, what the tokens of each request selected and which experts they took, pass by pass.

What a pass writes at a position replaces everything from there on. So a step that is undone and done again, tokens that
are read anew, and proposals that were rejected leave no trace. Requests that share a prefix share its pieces.
"""

import dataclasses
from collections.abc import Container, Hashable, Sequence
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from hisa_jax.models import checks
from hisa_jax.models.modeling import Model, Output
from hisa_jax.models.plan import Phase
from hisa_jax.models.replay.checking import expert_layers, selecting_layers
from hisa_jax.models.replay.record import Rollout


class Rows(NamedTuple):
    """What a pass chose.

    Attributes:
        indices: [B, T, K] int32 of each layer that selects.
        experts: [B, T, X] int32 of each layer that has experts.
    """

    indices: tuple[Any, ...]
    experts: tuple[Any, ...]


def rows_of(out: Output) -> Rows:
    """Of a pass that was traced (`Model.run(trace=True)`)."""
    capacity = out.cache.capacity  # no query sees more, and what is selected comes first
    return Rows(
        tuple(layer.selection.indices[..., :capacity] for layer in out.layers if layer.index_inputs is not None),
        tuple(layer.experts for layer in out.layers if layer.experts is not None),
    )


def logprob_of(logits: Array, tokens: Array) -> Array:
    """[..., V] float32, [...] int32 -> [...] float32, the log-softmax at the token; 0 where there is none (-1)."""
    of_token = jnp.take_along_axis(logits, jnp.maximum(tokens, 0)[..., None], axis=-1)[..., 0]
    return jnp.where(tokens < 0, 0, of_token - jax.nn.logsumexp(logits, axis=-1))


Steps = tuple[Array, Rows]
"""Of tokens that were made one by one: log-probabilities [B, steps], and what the first steps - 1 of them chose."""


def empty_steps(model: Model, B: int, steps: int, capacity: int) -> Steps:
    """Room for `steps` tokens a row in a cache of `capacity`."""
    config = model.config
    rows = lambda width: jnp.full((B, steps - 1, width), -1, jnp.int32)  # noqa: E731
    indices = tuple(rows(min(model.plan(i, "decode").topk, capacity)) for i in selecting_layers(config))
    experts = tuple(rows(config.num_experts_per_tok) for _ in expert_layers(config))
    return jnp.zeros((B, steps), jnp.float32), Rows(indices, experts)


def put_step(steps: Steps, i: Array, logprobs: Array, rows: Rows | None) -> Steps:
    """Token `i` of each row [B], and what the one before it chose [B, 1, ...]; None before the first."""
    chosen = steps[1]
    if rows is not None:
        put = lambda to, x: lax.dynamic_update_slice_in_dim(to, x, i - 1, axis=1)  # noqa: E731
        chosen = jax.tree.map(put, chosen, rows)
    return steps[0].at[:, i].set(logprobs), chosen


class _Track:
    """Arrays of rows, one a position, in pieces: the position at which each begins, ascending, and its rows."""

    def __init__(self, pieces: Sequence[tuple[int, tuple[np.ndarray, ...]]] = ()):
        self.pieces = list(pieces)

    def write(self, start: int, arrays: tuple[np.ndarray, ...]) -> None:
        """Rows from position `start` on, in place of all that were there."""
        if not arrays:  # a model without experts
            return
        while self.pieces and self.pieces[-1][0] >= start:
            self.pieces.pop()
        if self.pieces:
            at, last = self.pieces[-1]
            if at + len(last[0]) > start:
                self.pieces[-1] = at, tuple(x[: start - at] for x in last)
        self.pieces.append((start, arrays))

    def up_to(self, stop: int) -> "_Track":
        return _Track([(at, tuple(x[: stop - at] for x in xs)) for at, xs in self.pieces if at < stop])

    def fill(self, outs: Sequence[Any], first: int) -> None:
        """Puts the rows of positions from `first` on to the beginning of [n, K] arrays, which end where they end."""
        for at, arrays in self.pieces:
            for out, x in zip(outs, arrays, strict=True):
                skipped, to = max(first - at, 0), max(at - first, 0)
                rows = x[skipped:][: max(len(out) - to, 0)]
                out[to : to + len(rows), : rows.shape[1]] = rows[:, : out.shape[1]]


@dataclasses.dataclass(frozen=True)
class _Kept:
    """Of one request; `logprobs` of the tokens that it made."""

    indices: _Track = dataclasses.field(default_factory=_Track)
    experts: _Track = dataclasses.field(default_factory=_Track)
    logprobs: list[float] = dataclasses.field(default_factory=list)


class Recorder:
    """What requests chose so far, by number.

    Args:
        model: whose plan says how many tokens each layer selects.
        start: queries at positions before it are left out.
    """

    def __init__(self, model: Model, start: int):
        phases: tuple[Phase, ...] = get_args(Phase)
        self._config, self._start = model.config, start
        layers = selecting_layers(model.config)
        self._topk = tuple(max(model.plan(i, phase).topk for phase in phases) for i in layers)
        self._kept: dict[int, _Kept] = {}

    @property
    def ids(self) -> set[int]:
        """Requests that are known."""
        return set(self._kept)

    def fork(self, id: int, donor: int, n_tokens: int) -> None:
        """A request begins with the first tokens of another one, and with what these selected."""
        of, kept = self._kept[donor], self._kept.get(id, _Kept())
        self._kept[id] = _Kept(of.indices.up_to(n_tokens), of.experts.up_to(n_tokens), kept.logprobs)

    def write(self, id: int, start: int, rows: Rows, row: int, columns: slice) -> None:
        """What some columns of a row of a pass chose, of which the first is at position `start`."""
        kept = self._kept.setdefault(id, _Kept())
        stop = start + columns.stop - columns.start
        late = slice(columns.start + max(self._start - start, 0), columns.stop)
        # Copies: the arrays of the whole pass are not kept. Columns after `stop` are all -1.
        indices = tuple(np.array(x[row, late, :stop]) for x in rows.indices)
        kept.indices.write(max(start, self._start), indices)
        kept.experts.write(start, tuple(np.array(x[row, columns]) for x in rows.experts))

    def write_chunk(self, mask: np.ndarray, columns: slice, rows: Rows) -> None:
        """What a chunk of a left-padded batch chose, whose rows are the requests.

        Args:
            mask: [B, W] bool, False in padding.
            columns: of the chunk, among W.
            rows: of the chunk, [B, T, ...].
        """
        before, T = mask[:, : columns.start].sum(1), rows.indices[0].shape[1]
        for row, n_new in enumerate(mask[:, columns].sum(1).tolist()):
            self.write(row, int(before[row]), rows, row, slice(T - n_new, T))

    def generated(self, prompts: Sequence[Sequence[int]], tokens: Sequence[Sequence[int]], steps: Steps) -> Rollout:
        """The record of a batch whose rows are the requests: what they made, and what that chose."""
        logprobs, rows = jax.device_get(steps)
        for row, (prompt, made) in enumerate(zip(prompts, tokens, strict=True)):
            self.write(row, len(prompt), rows, row, slice(0, len(made) - 1))
            self.made(row, 0, logprobs[row, : len(made)].tolist())
        pairs = zip(prompts, tokens, strict=True)
        return self.rollout([(row, [*prompt, *made], len(prompt)) for row, (prompt, made) in enumerate(pairs)])

    def made(self, id: int, n_before: int, logprobs: Sequence[float]) -> None:
        """Log-probabilities of tokens that a request made after `n_before` others."""
        kept = self._kept.setdefault(id, _Kept())
        kept.logprobs[n_before:] = logprobs

    def keep(self, ids: Container[Hashable]) -> None:
        """Forgets all other requests."""
        self._kept = {id: kept for id, kept in self._kept.items() if id in ids}

    def rollout(self, requests: Sequence[tuple[int, Sequence[int], int]]) -> Rollout:
        """The record of some requests, one a row.

        Args:
            requests: number, tokens, and how many of them are the prompt.
        """
        B, T, config = len(requests), max(len(tokens) for _, tokens, _ in requests) - 1, self._config
        skipped = min(self._start, T)
        rollout = empty_rollout(
            B, T, 1, skipped, tuple(min(k, T) for k in self._topk), len(expert_layers(config)),
            config.num_experts_per_tok, self._topk, self._start,
        )  # fmt: skip
        for row, (id, tokens, n_prompt) in enumerate(requests):
            n, kept = len(tokens) - 1, self._kept[id]
            rollout.tokens[row, :n], rollout.targets[row, :n] = tokens[:-1], tokens[1:]
            rollout.sequence[row, :n], rollout.cu_seqlens[row, 1:] = row, n
            rollout.is_made[row, n_prompt - 1 : n] = True
            rollout.logprobs[row, n_prompt - 1 : n] = kept.logprobs[: n - n_prompt + 1]
            kept.indices.fill([x[row, : max(n - skipped, 0)] for x in rollout.indices], skipped)
            kept.experts.fill([x[row, :n] for x in rollout.experts], 0)
        return rollout


def empty_rollout(
    B: int, T: int, R: int, skipped: int, widths: tuple[int, ...], n_expert_layers: int, n_experts: int,
    topk: tuple[int, ...], start: int,
) -> Rollout:  # fmt: skip
    """A record of padding alone, to be filled."""
    zeros = lambda dtype: np.zeros((B, T), dtype)  # noqa: E731
    return Rollout(
        tokens=zeros(np.int32), targets=zeros(np.int32), logprobs=zeros(np.float32), is_made=zeros(bool),
        sequence=np.full((B, T), -1, np.int32), cu_seqlens=np.zeros((B, R + 1), np.int32),
        indices=tuple(np.full((B, T - skipped, width), -1, np.int32) for width in widths),
        experts=tuple(np.full((B, T, n_experts), -1, np.int32) for _ in range(n_expert_layers)),
        topk=topk, start=start,
    )  # fmt: skip


def checked_start(call: str, start: int, return_selections: bool) -> int:
    """`selections_from` as an int. Raises ValueError: no int of at least 0, or one without `return_selections`."""
    start = checks.whole(call, "selections_from", start, 0)
    if start and not return_selections:
        raise ValueError(f"{call}: selections_from={start} without return_selections, wanted both or neither")
    return start
