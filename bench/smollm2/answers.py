"""Bits a token and answers of the model when a method selects in all of its layers."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from bench.smollm2 import sketches
from bench.smollm2.filters import Method, chosen
from bench.smollm2.indexers import Indexers, index_keys
from bench.smollm2.measure import sketch_names, view_of
from bench.smollm2.model import Config, Weights, chunked, dense, logits, masked, rope_table, run
from bench.smollm2.prompts import Prompts

_CHUNK = 1024  # queries: fewer leave a GPU waiting


class Read(NamedTuple):
    """What a model says of one sequence.

    `nats` [T / 4] of its last quarter; at R positions `likeliest` [R], `best` [R], the likeliest of some choices, and
    `nats_there` [R].
    """

    nats: Array
    likeliest: Array
    best: Array
    nats_there: Array


# (weights, indexers, directions, tokens [T], positions [R], choices [c])
Forward = Callable[[Weights, Indexers, Array, Array, Array, Array], Read]


@dataclasses.dataclass(frozen=True, eq=False)
class Answers:
    """What a model did: `nats` [windows, T / 4], and of each token of all answers, [prompts, R], and past the last:
    whether it is the likeliest (`right`), the likeliest of the choices (`best`), its `nats_there`."""

    nats: np.ndarray
    right: np.ndarray
    best: np.ndarray
    nats_there: np.ndarray


def make_forward(config: Config, method: Method | None) -> Any:
    """A jitted `Forward` of the model with a method; None: with dense attention."""

    def forward(
        weights: Weights, indexers: Indexers, directions: Array, tokens: Array, positions: Array, choices: Array
    ) -> Read:
        T = tokens.shape[0]

        def sparse(h: Array, q: Array, k: Array, v: Array, own: tuple[Indexers, Array]) -> tuple[Array, None]:
            one, basis = own
            ik = index_keys(one, h, rope_table(config, jnp.arange(T)))
            names = sketch_names([method] if method is not None else [])
            made = sketches.make(names, ik, basis)
            parts = []
            # Queries of the first half see no key of the second.
            for first, end in ((0, T // 2), (T // 2, T)):
                some = {name: sketch[:end] for name, sketch in made.items()}

                def attended(rows: Array, end: int = end, some: dict[str, Array] = some) -> Array:
                    assert method is not None
                    mask = chosen(method, view_of(one, h, rows, config, ik[:end], some, h.dtype))
                    return masked(q[rows], k[:end], v[:end], mask)

                parts.append(chunked(attended, end, first=first, chunk=_CHUNK))
            return jnp.concatenate(parts), None

        x, _ = run(weights, config, tokens, dense if method is None else sparse, own=(indexers, directions))
        last = T // 4
        logs = jax.nn.log_softmax(logits(weights, x[-last - 1 : -1]), axis=-1)
        nats = -jnp.take_along_axis(logs, tokens[-last:, None], axis=-1)[:, 0]
        there = jax.nn.log_softmax(logits(weights, x[positions - 1]), axis=-1)
        nats_there = -jnp.take_along_axis(there, tokens[positions, None], axis=-1)[:, 0]
        best = choices[jnp.argmax(there[:, choices], axis=-1)]
        return Read(nats, jnp.argmax(there, axis=-1), best, nats_there)

    return jax.jit(forward)


def answer_positions(prompts: Prompts) -> np.ndarray:
    """[n, R] int32: where the tokens of all answers of each prompt stand, then 1."""
    each = [np.concatenate([np.arange(first, end) for _, first, end in questions]) for questions in prompts.questions]
    positions = np.ones((len(each), max(map(len, each))), np.int32)
    for row, found in zip(positions, each, strict=True):
        row[: len(found)] = found
    return positions


def measure(
    forward: Forward, weights: Weights, indexers: Indexers, directions: Array, windows: np.ndarray, prompts: Prompts
) -> Answers:
    """Runs windows [n, T] for their text and prompts for their answers."""
    positions = answer_positions(prompts)
    n, arrays = len(windows), []
    for tokens, where, choices in (
        *((window, positions[0], prompts.choices[0]) for window in windows),
        *zip(prompts.tokens, positions, prompts.choices, strict=True),
    ):
        # Everything is sent before anything is waited for.
        args = jnp.asarray(tokens, jnp.int32), jnp.asarray(where), jnp.asarray(choices, jnp.int32)
        arrays.append(forward(weights, indexers, directions, *args))
    nats = np.stack([np.asarray(read.nats) for read in arrays[:n]])
    likeliest, best, nats_there = (np.stack([np.asarray(read[i]) for read in arrays[n:]]) for i in (1, 2, 3))
    wanted = np.take_along_axis(prompts.tokens, positions, axis=1)
    return Answers(nats, likeliest == wanted, best == wanted, nats_there)


def by_kind(prompts: Prompts, answers: Answers, kinds: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Of each kind: questions asked, `right` if all tokens are the likeliest, `best` if the first is the likeliest of
    the choices; the share of tokens that are the likeliest; bits a token."""
    counts = {kind: np.zeros(6) for kind in kinds}
    for row, questions in enumerate(prompts.questions):
        at = 0
        for kind, first, end in questions:
            some = slice(at, at := at + end - first)
            right, nats = answers.right[row, some], answers.nats_there[row, some]
            found = (1, right.all(), answers.best[row, some][0], right.sum(), nats.sum() / math.log(2), len(right))
            counts[kinds[kind]] += np.array(found, np.float64)
    return {
        kind: {
            "asked": int(asked), "right": int(right), "best": int(best), "tokens": float(tokens / of),
            "bits": float(bits / of),
        }
        for kind, (asked, right, best, tokens, bits, of) in counts.items()
        if asked
    }  # fmt: skip
