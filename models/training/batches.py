"""Batches to train on and samples to measure with: a function of seed and step, so a run resumes anywhere."""

import collections
import concurrent.futures
import dataclasses
from collections.abc import Callable, Iterator

import numpy as np

from hisa_jax.models.training.mix import SHORTEST, dense_mix
from hisa_jax.models.training.samples import Sample
from hisa_jax.models.training.tasks import KINDS
from hisa_jax.models.training.text import Corpus


@dataclasses.dataclass(frozen=True, eq=False)
class Batch:
    """Sequences of `length` inputs and, one byte on, as many targets.

    Attributes:
        tokens: uint8 [batch, length + 1].
        is_answer: bool [batch, length + 1], the bytes of answers to the long-range questions.
    """

    tokens: np.ndarray
    is_answer: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Batches:
    """Windows of the text to train on, a share of them with long-range questions in it.

    Attributes:
        length: inputs of a sequence, in bytes.
        batch: sequences.
        synthetic_share: of the sequences, in [0, 1], have questions.
        seed: the same gives the same batches.
    """

    corpus: Corpus
    _: dataclasses.KW_ONLY
    length: int
    batch: int
    synthetic_share: float
    seed: int

    def __post_init__(self):
        if not 1 <= self.length < self.corpus.train.size:
            raise ValueError(
                f"Batches(length={self.length}): wanted 1 to {self.corpus.train.size - 1}, the text less 1"
            )
        if self.batch < 1:
            raise ValueError(f"Batches(batch={self.batch}): wanted at least 1")
        if not 0 <= self.synthetic_share <= 1:
            raise ValueError(f"Batches(synthetic_share={self.synthetic_share}): wanted 0 to 1")
        if self.synthetic_share and self.length + 1 < SHORTEST:
            raise ValueError(
                f"Batches(length={self.length}): wanted at least {SHORTEST - 1} for sequences with questions"
            )

    def __call__(self, step: int) -> Batch:
        """The batch of a step, whatever was asked for before."""
        rng = np.random.default_rng([self.seed, step])
        tokens = np.empty((self.batch, self.length + 1), np.uint8)
        is_answer = np.zeros(tokens.shape, bool)
        # As near to the share as whole sequences come, exact on average.
        n_synthetic = int(self.batch * self.synthetic_share + rng.random())
        for row in range(self.batch):
            tokens[row] = window(rng, self.corpus.train, self.length + 1)
            if row < n_synthetic:
                sample = dense_mix(rng, tokens[row])
                tokens[row], is_answer[row] = sample.tokens, sample.is_answer
        return Batch(tokens, is_answer)


def prefetched(batches: Callable[[int], Batch], first_step: int, n_steps: int, workers: int = 4) -> Iterator[Batch]:
    """The batches of `n_steps` steps in order, made ahead of time.

    Args:
        batches: makes the batch of a step.
        workers: threads, each with up to two batches in hand.
    """
    if workers < 1:
        raise ValueError(f"prefetched: workers is {workers}, wanted at least 1")
    pool = concurrent.futures.ThreadPoolExecutor(workers)
    pending: collections.deque[concurrent.futures.Future[Batch]] = collections.deque()
    try:
        for step in range(first_step, first_step + n_steps):
            pending.append(pool.submit(batches, step))
            if len(pending) > 2 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:  # a caller that stops early does not wait for batches that it will not read
        pool.shutdown(wait=False, cancel_futures=True)


def held_out_samples(
    corpus: Corpus, kind: str, context: int, n: int, seed: int, **parameters: float | None
) -> list[Sample]:
    """Samples of a long-range task in text that the model has not read.

    Args:
        kind: one of `tasks.KINDS`.
        context: bytes of a sample.
        n: samples.
        seed: the same gives the same samples, whatever `n` is.
        parameters: of the task, such as `depth`.

    Raises: ValueError: an unknown kind, a context longer than the text held out, parameters that do not fit.
    """
    if kind not in KINDS:
        raise ValueError(f"held_out_samples: kind is {kind!r}, wanted one of {', '.join(KINDS)}")
    if not 1 <= context <= corpus.held_out.size:
        raise ValueError(
            f"held_out_samples: context is {context}, wanted 1 to {corpus.held_out.size}, the text held out"
        )
    rngs = (np.random.default_rng([seed, at]) for at in range(n))
    return [KINDS[kind](rng, window(rng, corpus.held_out, context), **parameters) for rng in rngs]


def held_out_windows(corpus: Corpus, length: int, n: int) -> np.ndarray:
    """Windows of the text held out, uint8 [n, length], evenly over it."""
    if not 1 <= length <= corpus.held_out.size:
        raise ValueError(f"held_out_windows: length is {length}, wanted 1 to {corpus.held_out.size}, the text held out")
    starts = np.linspace(0, corpus.held_out.size - length, n).astype(int)
    return np.stack([corpus.held_out[start : start + length] for start in starts])


def window(rng: np.random.Generator, text: np.ndarray, length: int) -> np.ndarray:
    """uint8 [length] at a random place."""
    start = int(rng.integers(text.size - length + 1))
    return text[start : start + length]
