"""Log probabilities of continuations are those of one direct pass, whatever the chunks, batches and methods."""

import jax
import numpy as np
import pytest

import hisa_jax as hj
from hisa_jax.models import generate
from hisa_jax.models.evaluate.scoring import score

from . import golden

CONTEXT = [5, 17, 30, 41, 52, 63, 74, 85, 96, 7, 18, 29, 40, 3, 9, 27, 81, 44, 13, 39]
PAIRS = [
    (CONTEXT, [11]),
    (CONTEXT, [12, 13, 14]),
    (CONTEXT[:3], [44, 45, 46, 47, 48, 49, 50]),
    (CONTEXT, list(range(20, 40))),  # more than a pass scores
    (CONTEXT[:1], [30]),
]


@pytest.fixture(scope="module")
def model():
    return golden.some_layers("glm5", (2,))


def direct(model, pairs):
    """By one pass over the whole sequences."""
    texts = [[*context, *continuation] for context, continuation in pairs]
    width = max(map(len, texts))
    ids = np.array([text + [0] * (width - len(text)) for text in texts], np.int32)
    mask = np.arange(width) < np.array([[len(text)] for text in texts])
    logits = np.asarray(jax.jit(lambda ids, mask: model.run(ids, mask=mask).logits)(ids, mask))
    logprobs = np.asarray(jax.nn.log_softmax(logits, axis=-1), np.float64)
    found = []
    for row, (text, (context, _)) in enumerate(zip(texts, pairs, strict=True)):
        at = np.arange(len(context) - 1, len(text) - 1)
        wanted = np.array(text)[at + 1]
        found.append((logprobs[row, at, wanted].sum(), bool(np.all(logits[row, at].argmax(-1) == wanted))))
    return found


def test_scores_are_those_of_a_direct_pass(model):
    for scored, (logprob, is_likeliest) in zip(score(model, PAIRS, rows=3, chunk=8), direct(model, PAIRS), strict=True):
        np.testing.assert_allclose(scored.logprob, logprob, rtol=1e-5, atol=1e-4)
        assert scored.is_likeliest == is_likeliest


@pytest.mark.exhaustive
@pytest.mark.parametrize(("rows", "chunk"), [(1, 64), (2, 5), (4, 16)])
def test_batches_and_chunks_do_not_change_scores(model, rows, chunk):
    """40 seconds in all: each compiles its own programs."""
    wanted = score(model, PAIRS, rows=3, chunk=8)
    np.testing.assert_allclose(score(model, PAIRS, rows=rows, chunk=chunk), wanted, rtol=1e-5, atol=1e-4)


@pytest.mark.exhaustive
def test_the_likeliest_continuation_is_what_generate_makes(model):
    """By a method that leaves tokens out, each phase by its own; 20 seconds."""
    method = hj.Hisa(topk=4, block_size=2, block_topk=3)
    other = model.with_method(lambda layer, phase: hj.Dsa(topk=4) if phase == "decode" else method)
    made = generate(other, [CONTEXT], 4, chunk=8).tokens[0]
    right, wrong = score(other, [(CONTEXT, made), (CONTEXT, [*made[:3], (made[3] + 1) % 50])], rows=1, chunk=8)
    assert right.is_likeliest and not wrong.is_likeliest


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([([], [1])], r"pairs\[0\]\[0\] is empty"),
        ([([1], [2]), ([1], [])], r"pairs\[1\]\[1\] is empty"),
        ([([1], [-1])], "wanted an int from 0"),
        ([([1] * 5000, [2])], r"pairs\[0\] has 5001 tokens, wanted at most"),
    ],
)
def test_what_cannot_be_scored_is_refused(model, pairs, message):
    with pytest.raises(ValueError, match=message):
        score(model, pairs)
    with pytest.raises(ValueError, match="rows=0"):
        score(model, PAIRS, rows=0)
