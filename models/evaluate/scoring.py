"""How likely a model finds continuations of contexts: contexts in chunks through the paged cache, static shapes.

A context is read once for all its continuations, which then go on from its cache: a cache is a value.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from hisa_jax.models import checks
from hisa_jax.models.cache import Cache
from hisa_jax.models.modeling import Model
from hisa_jax.models.plan import Phase
from hisa_jax.models.structure import Structure, structures_of, weights_of

_LOGIT_BYTES = 2**28  # of logits at a time
_LEAST_WIDTH = 16  # columns of a pass: fewer are filled up, so that few programs are compiled

Progress = Callable[[str, int, int], None]


class Scored(NamedTuple):
    """The log probability of a continuation, and whether each of its tokens is the likeliest in its place."""

    logprob: float
    is_likeliest: bool


class _Group(NamedTuple):
    """A context, and its continuations with their numbers in the call."""

    context: tuple[int, ...]
    continuations: list[tuple[int, list[int]]]


def score(
    model: Model,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    rows: int = 4,
    chunk: int = 512,
    phase: Phase = "decode",
    progress: Progress | None = None,
) -> list[Scored]:
    """Scores continuations of contexts.

    Args:
        model: whose plan selects in the phases "prefill", "last_prefill" (a context's last chunk) and `phase`.
        pairs: token ids of a context and of its continuation, one or more each.
        rows: contexts that are read at a time.
        chunk: tokens of a context a forward pass.
        phase: by whose methods continuations are read: "decode" is how they would be made.
        progress: is told what is done, how many tokens of it, and of how many.

    Returns: one `Scored` a pair.
    Raises: ValueError: an empty context or continuation, tokens outside of the vocabulary, more of them than the model
        has positions, sizes below 1. FloatingPointError: a log probability that is NaN; it names the pair.
    """
    call, room = "score", model.config.max_position_embeddings
    rows, chunk = checks.whole(call, "rows", rows), checks.whole(call, "chunk", chunk)
    groups: dict[tuple[int, ...], _Group] = {}
    for i, (context, continuation) in enumerate(pairs):
        before, after = (
            checks.prompt(call, f"pairs[{i}][{part}]", tokens, model.config.vocab_size)
            for part, tokens in enumerate((context, continuation))
        )
        if len(before) + len(after) > room + 1:  # the last token is scored and not read
            raise ValueError(f"{call}: pairs[{i}] has {len(before) + len(after)} tokens, wanted at most {room + 1}")
        groups.setdefault(tuple(before), _Group(tuple(before), [])).continuations.append((i, after))
    ordered = sorted(groups.values(), key=lambda group: -len(group.context))
    total, done = sum(map(_size, ordered)), 0
    found: dict[int, Scored] = {}
    reader = _Reader(model, rows, chunk, phase)
    for first in range(0, len(ordered), rows):
        batch = ordered[first : first + rows]
        if progress is not None:
            progress("scoring, tokens", done, total)
        found |= reader.read(batch)
        done += sum(map(_size, batch))
    if progress is not None:
        progress("scoring, tokens", total, total)
    if failed := [i for i, scored in found.items() if np.isnan(scored.logprob)]:
        raise FloatingPointError(f"{call}: logits are not finite (NaN or infinity): pairs[{min(failed)}]")
    return [found[i] for i in range(len(pairs))]


def _size(group: _Group) -> int:
    """Its tokens."""
    return len(group.context) + sum(len(continuation) for _, continuation in group.continuations)


class _Reader:
    """A model and the sizes of its passes."""

    def __init__(self, model: Model, rows: int, chunk: int, phase: Phase):
        self._model, self._rows, self._chunk = model, rows, chunk
        self._structures, self._weights, self._phase = structures_of(model), weights_of(model), phase
        fits = _LOGIT_BYTES // (4 * rows * model.config.vocab_size)
        self._most_scored = max(_LEAST_WIDTH, min(chunk, 1 << max(fits, 1).bit_length() - 1))

    def read(self, groups: Sequence[_Group]) -> dict[int, Scored]:
        """Scores by the number of the pair."""
        longest = max(len(c) for group in groups for _, c in group.continuations)
        logits, cache = self._contexts([group.context for group in groups], longest)
        found: dict[int, Scored] = {}
        for j in range(max(len(group.continuations) for group in groups)):
            turn = [group.continuations[j : j + 1] for group in groups]
            continuations = [[*pair[0][1]] if pair else [] for pair in turn]
            for pair, scored in zip(turn, self._continuations(logits, cache, continuations), strict=False):
                if pair:
                    found[pair[0][0]] = scored
        return found

    def _contexts(self, contexts: Sequence[Sequence[int]], more: int) -> tuple[Array, Cache]:
        """Logits [rows, V] after each context, and a cache with room for `more` tokens."""
        width = _width(max(map(len, contexts)), self._chunk)
        ids, mask = np.zeros((self._rows, width), np.int32), np.zeros((self._rows, width), bool)
        for row, context in enumerate(contexts):  # they end in the same column, so that all have logits there
            ids[row, width - len(context) :], mask[row, width - len(context) :] = context, True
        capacity = min(width + _width(more, self._most_scored), self._model.config.max_position_embeddings)
        cache = self._model.empty_cache(self._rows, capacity)
        step = min(self._chunk, width)
        for first in range(0, width, step):
            structure = self._structures["last_prefill" if first + step >= width else "prefill"]
            at = slice(first, first + step)
            logits, cache = _read(self._weights, cache, ids[:, at], mask[:, at], structure=structure)
        return logits, cache

    def _continuations(self, logits: Array, cache: Cache, continuations: Sequence[Sequence[int]]) -> list[Scored]:
        """One a row, none where it is empty, in its place one that means nothing."""
        tokens = np.full((self._rows, max(map(len, continuations))), -1, np.int32)
        for row, continuation in enumerate(continuations):
            tokens[row, : len(continuation)] = continuation
        # The first token is scored by what came before, each other one by the pass that reads the one before it.
        total, is_likeliest = map(np.asarray, _score(logits[:, None], tokens[:, :1]))
        total, is_likeliest = total.astype(np.float64), is_likeliest.copy()
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        width = min(_width(inputs.shape[1], self._most_scored), self._most_scored)
        for first in range(0, inputs.shape[1], width):
            fill = ((0, 0), (0, max(0, first + width - inputs.shape[1])))
            ids, wanted = (np.pad(x[:, first : first + width], fill, constant_values=-1) for x in (inputs, targets))
            more, are_likeliest, cache = _read_and_score(
                self._weights, cache, np.maximum(ids, 0), wanted, structure=self._structures[self._phase]
            )
            total += np.asarray(more, np.float64)
            is_likeliest &= np.asarray(are_likeliest)
        return [Scored(float(x), bool(y)) for x, y in zip(total, is_likeliest, strict=True)]


def _width(n: int, most: int) -> int:
    """Columns for n tokens: a power of two up to `most`, then multiples of it."""
    if n >= most:
        return -(-n // most) * most
    return min(most, max(_LEAST_WIDTH, 1 << (n - 1).bit_length() if n > 1 else 1))


@functools.partial(jax.jit, static_argnames="structure", donate_argnames="cache")
def _read(weights: list[Array], cache: Cache, ids: Array, mask: Array, *, structure: Structure) -> tuple[Array, Cache]:
    """Logits [rows, V] of the last column, the cache with these tokens."""
    out = structure.merge(weights).run(ids, cache=cache, mask=mask, last_only=True)
    return out.logits[:, 0], out.cache


@functools.partial(jax.jit, static_argnames="structure")  # the cache of the context is read again
def _read_and_score(
    weights: list[Array], cache: Cache, ids: Array, targets: Array, *, structure: Structure
) -> tuple[Array, Array, Cache]:
    """[rows, T] tokens and those that come after each, -1 for none: as `_score`, and the cache with these tokens."""
    out = structure.merge(weights).run(ids, cache=cache, mask=targets >= 0)
    return *_score(out.logits, targets), out.cache


@jax.jit
def _score(logits: Array, targets: Array) -> tuple[Array, Array]:
    """[rows, T, V], [rows, T] -> summed log probabilities [rows], whether all are the likeliest [rows]."""
    is_real, at = targets >= 0, jnp.maximum(targets, 0)[..., None]
    logprobs = jnp.take_along_axis(jax.nn.log_softmax(logits, axis=-1), at, axis=-1)[..., 0]
    is_likeliest = jnp.argmax(logits, axis=-1) == targets
    return jnp.sum(jnp.where(is_real, logprobs, 0), axis=1), jnp.all(is_likeliest | ~is_real, axis=1)
