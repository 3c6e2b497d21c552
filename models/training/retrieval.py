"""Whether a model answers: every byte of an answer must be the likeliest one, the bytes before it given.

That is what greedy decoding from the question would find, for the cost of one pass over the sample.
"""

import numpy as np

from hisa_jax.models.training.samples import Question, Sample


def answer(likeliest: np.ndarray, question: Question) -> bytes:
    """What a model says to a question.

    Args:
        likeliest: [T], the likeliest byte after each one of the sample.
    """
    return likeliest[question.answer - 1 : question.stop - 1].astype(np.uint8).tobytes()


def wanted(sample: Sample, question: Question) -> bytes:
    """The answer that stands in the sample."""
    return sample.tokens[question.answer : question.stop].tobytes()


def answered(likeliest: np.ndarray, sample: Sample) -> list[bool]:
    """Which questions of a sample are answered right; `likeliest` as for `answer`."""
    return [answer(likeliest, question) == wanted(sample, question) for question in sample.questions]
