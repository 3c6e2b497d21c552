"""Log probabilities of continuations are those of one direct pass, whatever the chunks, batches and methods."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hisa_jax.models.evaluate.scoring import score

from . import golden

CONTEXT = [5, 17, 30, 41, 52, 63, 74, 85, 96, 7, 18, 29, 40, 3, 9, 27, 81, 44, 13, 39]
PAIRS = [
    (CONTEXT, [11]),
    (CONTEXT, [12, 13, 14]),
    (CONTEXT[:3], [44, 45, 46, 47, 48, 49, 50]),
    (CONTEXT, list(range(20, 40))),
    (CONTEXT[:1], [30]),
]


def direct(model, context, continuation):
    """By one pass over the whole sequence, without a cache of chunks."""
    tokens = [*context, *continuation]
    logits = model(jnp.asarray([tokens]))[0]
    logprobs = np.asarray(jax.nn.log_softmax(logits, axis=-1), np.float64)
    at = range(len(context) - 1, len(tokens) - 1)
    return sum(logprobs[i, tokens[i + 1]] for i in at), all(int(logits[i].argmax()) == tokens[i + 1] for i in at)


@pytest.mark.parametrize("name", ["glm5"])
def test_scores_are_those_of_a_direct_pass(name):
    model = golden.model(name)
    likely = [int(model(jnp.asarray([CONTEXT]))[0, -1].argmax())]
    pairs = [*PAIRS, (CONTEXT, likely)]
    got = score(model, pairs, rows=2, chunk=8)
    for (context, continuation), scored in zip(pairs, got, strict=True):
        logprob, is_likeliest = direct(model, context, continuation)
        np.testing.assert_allclose(scored.logprob, logprob, rtol=1e-5, atol=1e-4)
        assert scored.is_likeliest == is_likeliest
    assert got[-1].is_likeliest
