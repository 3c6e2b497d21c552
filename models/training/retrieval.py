"""Whether a model answers: every byte of an answer must be the likeliest one, the bytes before it given.

That is what greedy decoding from the question would find, for the cost of one pass over the sample.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from models.training.forward import Attend, forward
from models.training.samples import Sample
from models.training.weights import Stacked


def answers(stacked: Stacked, samples: Sequence[Sample], attend: Attend, batch: int = 1) -> list[list[bool]]:
    """Which questions of each sample are answered right.

    Args:
        stacked: the model.
        samples: of one length.
        attend: how it attends.
        batch: samples a pass.

    Returns: for each sample, a bool a question in their order.
    """
    right = []
    for first in range(0, len(samples), batch):
        part = samples[first : first + batch]
        tokens = np.stack([sample.tokens for sample in part])
        is_right = np.asarray(_is_right(stacked, jnp.asarray(tokens), attend))
        for row, sample in zip(is_right, part, strict=True):
            right.append([bool(row[q.answer - 1 : q.stop - 1].all()) for q in sample.questions])
    return right


@functools.partial(jax.jit, static_argnames="attend")
def _is_right(stacked: Stacked, tokens: Array, attend: Attend) -> Array:
    """[B, T] uint8 -> [B, T - 1] bool: whether the likeliest next byte is the next one."""
    tokens = tokens.astype(jnp.int32)
    logits, _ = forward(stacked, tokens[:, :-1], attend)
    return jnp.argmax(logits, axis=-1) == tokens[:, 1:]
