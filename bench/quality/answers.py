"""Retrieval and bits a byte of a model with another selection: rows of the quality report."""

import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from bench.quality.model import logits_of
from bench.quality.size import TASKS
from bench.quality.variants import Variant
from hisa_jax.models.evaluate import statistics
from hisa_jax.models.training.batches import held_out_samples, held_out_windows
from hisa_jax.models.training.retrieval import answered
from hisa_jax.models.training.samples import Sample
from hisa_jax.models.training.text import Corpus
from hisa_jax.models.training.weights import Stacked

Row = dict[str, Any]
_QUESTIONS = 16  # of one sample, all about statements of their own
_COMPARED = 32  # keys where selections and ablations are compared, at most
_LINE = 40  # bytes of a statement or a question, at most
_PASS = 65536  # tokens at a time; a CPU gains nothing by more than one sequence


def right_answers(stacked: Stacked, samples: Sequence[Sample], variant: Variant) -> list[list[bool]]:
    """Which questions of each sample are answered right: every byte the likeliest one, those before it given."""
    right = []
    for tokens, first in _passes(np.stack([sample.tokens for sample in samples])):
        likeliest = np.asarray(jnp.argmax(logits_of(stacked, tokens, variant), axis=-1))
        # The last pass may be filled up with rows that belong to no sample.
        for row, sample in zip(likeliest, samples[first : first + len(tokens)], strict=False):
            right.append(answered(row, sample))
    return right


def bits(stacked: Stacked, windows: np.ndarray, variant: Variant) -> np.ndarray:
    """uint8 [n, T] -> float64 [n, T - 1]: bits to code each byte but the first."""
    return np.concatenate([
        np.asarray(bits_of(logits_of(stacked, tokens, variant), jnp.asarray(tokens)), np.float64)
        for tokens, _ in _passes(windows)
    ])[: len(windows)]  # fmt: skip


def needle_rows(
    stacked: Stacked, corpus: Corpus, variant: Variant, context: int, depths: Sequence[float], n: int
) -> list[Row]:
    """One needle a sample: exact answers at each depth."""
    samples = [
        sample for depth in depths for sample in held_out_samples(corpus, "needle", context, n, seed=1, depth=depth)
    ]
    answered = [right for (right,) in right_answers(stacked, samples, variant)]
    return [
        {"depth": depth, **statistics.share(sum(answered[at * n : (at + 1) * n]), n)} for at, depth in enumerate(depths)
    ]


def multikey_rows(
    stacked: Stacked, corpus: Corpus, variant: Variant, context: int, n: int, keys: Sequence[int]
) -> list[Row]:
    """Many statements with similar keys: exact answers for each number of keys that leaves half of the text."""
    rows = []
    for n_keys in keys:
        if _fits(n_keys, context):
            samples = multikey_samples(corpus, context, n, n_keys)
            rows.append({"task": "multikey", "n_keys": n_keys, "samples": n, **_share_of(stacked, variant, samples)})
    return rows


def multikey_samples(corpus: Corpus, context: int, n: int, n_keys: int) -> list[Sample]:
    return held_out_samples(corpus, "multikey", context, n, seed=2, n_keys=n_keys, n_questions=min(_QUESTIONS, n_keys))


def most_keys(context: int, keys: Sequence[int]) -> int:
    """The number of keys that comparisons use at a context: the most that fit, at most 32."""
    return max([n for n in keys if n <= _COMPARED and _fits(n, context)], default=2)


def _fits(n_keys: int, context: int) -> bool:
    return n_keys <= 2 or n_keys * _LINE <= context // 2


def task_rows(stacked: Stacked, corpus: Corpus, variant: Variant, context: int, n: int) -> list[Row]:
    """The other tasks, a share of questions each."""
    parameters: dict[str, dict[str, Any]] = {"copy": {"n_words": max(2, min(24, context // 128))}}
    rows = []
    for task in TASKS[1:]:
        samples = held_out_samples(corpus, task, context, n, seed=3, **parameters.get(task, {}))
        rows.append({"task": task, "samples": n, **_share_of(stacked, variant, samples)})
    return rows


def bits_rows(stacked: Stacked, corpus: Corpus, variant: Variant, context: int, n: int) -> list[Row]:
    """Bits a byte of held-out text by position, from 0 to `context`; also each window's, for paired differences."""
    found = bits(stacked, held_out_windows(corpus, context, n), variant)
    edges = [0, *(edge for edge in (256, 512, 1024, 2048, 4096, 8192) if edge < context), context]
    rows = []
    for first, end in [*itertools.pairwise(edges), (0, context)]:
        by_window = found[:, max(first - 1, 0) : end - 1].mean(axis=1)
        middle, low, high = statistics.mean(by_window)
        rows.append({
            "first": first, "end": end, "bits": middle, "low": low, "high": high, "n": n,
            "by_window": by_window.round(5).tolist(),
        })  # fmt: skip
    return rows


def _share_of(stacked: Stacked, variant: Variant, samples: Sequence[Sample]) -> Row:
    answered = [right for of_sample in right_answers(stacked, samples, variant) for right in of_sample]
    return statistics.share(sum(answered), len(answered))


def _passes(tokens: np.ndarray) -> list[tuple[np.ndarray, int]]:
    """Batches of sequences with the number of their first; the last is filled up, so that one shape is compiled."""
    most = 1 if jax.default_backend() == "cpu" else max(1, _PASS // tokens.shape[1])
    batch = min(most, len(tokens))
    return [
        (tokens[np.minimum(np.arange(first, first + batch), len(tokens) - 1)], first)
        for first in range(0, len(tokens), batch)
    ]


@jax.jit
def bits_of(logits: Array, tokens: Array) -> Array:
    """[B, T, V], [B, T] uint8 -> [B, T - 1]: bits to code each byte but the first."""
    logs = jax.nn.log_softmax(logits[:, :-1], axis=-1)
    of_next = jnp.take_along_axis(logs, tokens[:, 1:, None].astype(jnp.int32), axis=-1)[..., 0]
    return -of_next / jnp.log(2.0)
