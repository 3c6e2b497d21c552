"""Bits a token and answers of the model when a method selects in all of its layers."""

import dataclasses
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

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

# (weights, indexers, directions, tokens [T], positions [R]) -> nats of the last quarter, the likeliest tokens [R]
Forward = Callable[[Weights, Indexers, Array, Array, Array], tuple[Array, Array]]


@dataclasses.dataclass(frozen=True, eq=False)
class Answers:
    """What a model did: `nats` [windows, T / 4]; `right` [prompts, tokens of all answers] bool, True past the last."""

    nats: np.ndarray
    right: np.ndarray


class Programs:
    """Forwards of the model, compiled several at a time beside whatever else runs."""

    def __init__(self, config: Config):
        self.config = config
        # On a CPU a second compiler takes the place of what it compiles for.
        self.pool = ThreadPoolExecutor(8 if jax.default_backend() == "gpu" else 1)
        self.made: dict[Any, Future[Forward]] = {}

    def __call__(
        self, method: Method | None, weights: Weights, indexers: Indexers, T: int, n_positions: int
    ) -> Future[Forward]:
        """The program for a method, being compiled for such arguments; None: dense attention."""
        key = (method, indexers.H, T, n_positions)
        if key not in self.made:
            L, D = self.config.n_layers, indexers.k.shape[-1]
            shapes = ((L, D, D), jnp.float32), ((T,), jnp.int32), ((n_positions,), jnp.int32)
            rest = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in shapes]
            like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (weights, indexers))
            lowered = make_forward(self.config, method).lower(*like, *rest)
            self.made[key] = self.pool.submit(lowered.compile)
        return self.made[key]


def make_forward(config: Config, method: Method | None) -> Any:
    """A jitted `Forward` of the model with a method; None: with dense attention."""

    def forward(
        weights: Weights, indexers: Indexers, directions: Array, tokens: Array, positions: Array
    ) -> tuple[Array, Array]:
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
                    mask = chosen(method, view_of(one, h, rows, config, ik[:end], some))
                    return masked(q[rows], k[:end], v[:end], mask)

                parts.append(chunked(attended, end, first=first))
            return jnp.concatenate(parts), None

        x, _ = run(weights, config, tokens, dense if method is None else sparse, own=(indexers, directions))
        last = T // 4
        logs = jax.nn.log_softmax(logits(weights, x[-last - 1 : -1]), axis=-1)
        nats = -jnp.take_along_axis(logs, tokens[-last:, None], axis=-1)[:, 0]
        return nats, jnp.argmax(logits(weights, x[positions - 1]), axis=-1)

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
    # Everything is sent before anything is waited for.
    read = [
        forward(weights, indexers, directions, jnp.asarray(tokens, jnp.int32), jnp.asarray(where))
        for tokens, where in (
            *((window, np.ones_like(positions[0])) for window in windows),
            *zip(prompts.tokens, positions, strict=True),
        )
    ]
    n = len(windows)
    nats = np.stack([np.asarray(of_window) for of_window, _ in read[:n]])
    wanted = np.take_along_axis(prompts.tokens, positions, axis=1)
    found = np.stack([np.asarray(likeliest) for _, likeliest in read[n:]])
    return Answers(nats, (found == wanted) | (positions == 1))


def by_kind(prompts: Prompts, right: np.ndarray, kinds: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Questions right and asked, and the share of right tokens, of each kind."""
    counts = {kind: [0, 0, 0, 0] for kind in kinds}
    for questions, of_prompt in zip(prompts.questions, right, strict=True):
        at = 0
        for kind, first, end in questions:
            tokens = of_prompt[at : at + end - first]
            at += end - first
            count = counts[kinds[kind]]
            for i, more in enumerate((tokens.all(), 1, tokens.sum(), len(tokens))):
                count[i] += int(more)
    return {
        kind: {"right": right, "asked": asked, "tokens": tokens / of}
        for kind, (right, asked, tokens, of) in counts.items()
        if asked
    }
