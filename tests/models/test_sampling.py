"""How tokens are taken: by what distribution, by which seed, and that nothing else has a say.

The programs of the engines are those of test_engine.py; some 7 s of CPU beside them.
"""

import collections
import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from hisa_jax import models
from hisa_jax.models import Sampling, draws

from . import golden, serving

VOCABULARY = 12
LOGITS = np.random.default_rng(0).normal(0, 2, VOCABULARY).astype(np.float32)


def kept(logits, sampling):
    """The tokens that may be drawn and their probabilities, in float64, token by token."""
    scaled = np.float64(logits) / sampling.temperature
    order = sorted(range(len(logits)), key=lambda token: (-scaled[token], token))
    if sampling.top_k:
        order = order[: sampling.top_k]
    p = np.exp(scaled[order] - scaled.max())
    before = np.concatenate([[0], np.cumsum(p)[:-1]]) / p.sum()
    order = [t for t, reached in zip(order, before, strict=True) if reached < sampling.top_p or sampling.top_p == 1]
    p = {token: np.exp(scaled[token] - scaled.max()) for token in order}
    p = {token: x for token, x in p.items() if x >= sampling.min_p}
    return {token: x / sum(p.values()) for token, x in p.items()}


def draw(sampling, n, logits=LOGITS, first=0):
    """[n] tokens of as many seeds."""
    rows = [dataclasses.replace(sampling, seed=first + seed) for seed in range(n)]
    arrays = draws.draws_of(rows, [3] * n, n)
    return np.asarray(draws.take(jnp.asarray(np.tile(logits, (n, 1, 1))), arrays, int(arrays.kind)))[:, 0]


CASES = [
    {"temperature": 1.0},
    {"temperature": 0.5, "top_k": 3},
    {"temperature": 2.0, "top_p": 0.7},
    {"temperature": 1.5, "min_p": 0.2},
    {"temperature": 1.7, "top_k": 6, "top_p": 0.9, "min_p": 0.05},
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_tokens_are_drawn_with_their_probabilities(case):
    """20,000 seeds: each token's count within 5 standard deviations of what it should be."""
    n, want = 20_000, kept(LOGITS, Sampling(**case))
    count = collections.Counter(draw(Sampling(**case), n).tolist())
    assert count.keys() == want.keys() and len(want) > 2
    for token, p in want.items():
        assert abs(count[token] - n * p) < 5 * (n * p * (1 - p)) ** 0.5 + 1, (token, count[token], n * p)


def test_a_proposal_is_kept_as_often_as_it_is_probable_and_else_the_rest_is_drawn_from():
    """Which is rejection sampling of a draft that proposes one token; the whole is the model's distribution."""
    n, sampling = 20_000, Sampling(temperature=1.0)
    p, tokens = kept(LOGITS, sampling), draw(sampling, n, first=10**6)
    for proposal in (int(np.argmax(LOGITS)), int(np.argsort(LOGITS)[-4])):
        is_kept = tokens == proposal
        assert abs(is_kept.mean() - p[proposal]) < 5 * (p[proposal] * (1 - p[proposal]) / n) ** 0.5
        rest = collections.Counter(tokens[~is_kept].tolist())
        for token in p.keys() - {proposal}:
            q, m = p[token] / (1 - p[proposal]), int((~is_kept).sum())
            assert abs(rest[token] - m * q) < 5 * (m * q * (1 - q)) ** 0.5 + 1


def test_what_may_be_drawn_is_exact_with_ties_and_without_a_sum_of_one():
    tied = np.array([1, 3, 3, 3, 0, 3], np.float32)
    assert set(draw(Sampling(temperature=1, top_k=2), 200, tied)) == {1, 2}
    assert set(draw(Sampling(temperature=1, top_p=0.5), 400, tied)) == {1, 2, 3}
    assert set(draw(Sampling(temperature=1, min_p=1.0), 200, tied)) == {1, 2, 3, 5}
    # The float32 sum of probabilities reaches 1 before the last token.
    flat = jnp.asarray([[[0.0, -30.0, -40.0]]])
    zeros = np.zeros(1, np.int32)
    is_kept = draws._is_kept(flat, zeros, np.ones(1, np.float32), np.zeros(1, np.float32))
    assert bool(is_kept.all())


def test_rows_do_not_depend_on_each_other_nor_on_what_they_need():
    """One that takes the likeliest token, one of all tokens, one of some: together and alone, bit for bit."""
    rows = [Sampling(), Sampling(temperature=0.9, seed=5), Sampling(temperature=0.9, top_p=0.8, seed=5)]
    logits = jnp.asarray(np.random.default_rng(1).normal(0, 2, (3, 4, VOCABULARY)), jnp.float32)
    together = draws.take(logits, draws.draws_of(rows, [0, 2, 7], 3), draws.SOME)
    for row, (sampling, number) in enumerate(zip(rows, (0, 2, 7), strict=True)):
        arrays = draws.draws_of([sampling], [number], 1)
        alone = draws.take(logits[row : row + 1], arrays, int(arrays.kind))
        assert alone[0].tolist() == together[row].tolist()
        later = draws.draws_of([sampling], [number + 1], 1)  # the same token by its number, whatever came with it
        assert draws.take(logits[row : row + 1, 1:], later, int(arrays.kind))[0].tolist() == together[row, 1:].tolist()
    assert draws.take(logits, draws.draws_of(rows, [0, 2, 7], 4)._replace(), draws.LIKELIEST).shape == (3, 4)


def test_seeds_of_64_bits_are_all_different():
    seeds = [0, 1, 2**32, 2**40 + 1, -1, 2**63 - 1, -(2**63)]
    logits = jnp.zeros((len(seeds), 1, 10_000))
    tokens = draws.take(logits, draws.draws_of([Sampling(temperature=1, seed=s) for s in seeds], [0] * 7, 7), draws.ALL)
    assert len(set(tokens[:, 0].tolist())) == 7


def test_logits_without_a_likeliest_token_give_none_however_they_are_drawn():
    bad = jnp.asarray([[[np.nan, 1, 0]], [[-np.inf] * 3], [[np.inf, 0, 0]], [[-np.inf, 0, 0]]], jnp.float32)
    for sampling in (Sampling(), Sampling(temperature=1), Sampling(temperature=1, top_p=0.5, min_p=0.1, top_k=2)):
        arrays = draws.draws_of([sampling] * 4, [0] * 4, 4)
        tokens = draws.take(bad, arrays, int(arrays.kind))[:, 0].tolist()
        assert tokens[:3] == [-1, -1, -1] and tokens[3] in (1, 2)


MIXED = [
    Sampling(max_tokens=8, ignore_eos=True),
    Sampling(max_tokens=8, temperature=1.0, seed=3, ignore_eos=True, logprobs=2),
    Sampling(max_tokens=5, temperature=0.8, top_p=0.9, seed=4, stop_ids=(7,)),
    Sampling(max_tokens=7, temperature=1.2, top_k=20, min_p=0.02, seed=2**40, logprobs=0),
]


@pytest.fixture(scope="module")
def traffic():
    """(prompt, sampling, what `generate` makes of it with three others)."""
    prompts = serving.requests(12, seed=1)
    samplings = [MIXED[i % 4] for i in range(12)]
    made = models.generate(serving.model(), prompts, sampling=samplings, chunk=serving.CHUNK)
    return list(zip(prompts, samplings, made.tokens, made.logprobs, strict=True))


def test_tokens_are_those_of_each_request_alone_with_proposals_right_and_wrong(traffic):
    answers = {tuple(prompt): [*prompt, *tokens] for prompt, _, tokens, _ in traffic}

    def draft(tokens, n):
        """What comes, but every third token wrong."""
        whole = next((w for w in answers.values() if tokens == w[: len(tokens)]), tokens)
        wrong = [token if at % 3 else (token + 1) % serving.VOCABULARY for at, token in enumerate(whole)]
        return wrong[len(tokens) : len(tokens) + n]

    engine = serving.engine(draft=draft)
    wanted, logprobs, found, kept = {}, {}, {}, collections.Counter()
    for prompt, sampling, tokens, values in traffic:
        id = engine.submit(prompt, sampling=sampling)
        wanted[id], logprobs[id] = tokens, (sampling.logprobs, values)
    done = {}
    while not engine.is_idle:
        report = engine.step()
        engine.pool.check()
        done |= report.finished
        found |= report.logprobs
        kept.update(n - 1 for step in report.steps if step.phase == "decode" for n in step.n_kept)
    assert done == wanted and set(kept) == {0, 1, 2}
    assert found.keys() == {id for id, (n, _) in logprobs.items() if n is not None}
    for id, ours in found.items():
        n, theirs = logprobs[id]
        assert [one.token for one in ours] == wanted[id] == [one.token for one in theirs]
        for one, other in zip(ours, theirs, strict=True):
            assert len(one.top) == n and [t for t, _ in one.top] == [t for t, _ in other.top]
            np.testing.assert_allclose(one.logprob, other.logprob, atol=1e-4)
            np.testing.assert_allclose([x for _, x in one.top], [x for _, x in other.top], atol=1e-4)


@pytest.mark.exhaustive
def test_a_requests_tokens_do_not_depend_on_the_other_prompts(traffic):
    for prompt, sampling, tokens, _ in traffic[:8]:
        assert models.generate(serving.model(), [prompt], sampling=sampling, chunk=serving.CHUNK).tokens == [tokens]


def test_log_probabilities_are_those_of_the_logits():
    logits = np.random.default_rng(0).normal(0, 3, (2, 3, 30)).astype(np.float32)
    tokens = np.array([[3, 1, 4], [1, 5, 9]], np.int32)
    found = draws.logprobs_of(jnp.asarray(logits), jnp.asarray(tokens))
    want = np.float64(logits) - np.log(np.sum(np.exp(np.float64(logits)), axis=-1, keepdims=True))
    for row, column in np.ndindex(2, 3):
        one = draws.read_logprobs(found, row, column, int(tokens[row, column]), 5)
        order = np.argsort(-want[row, column])[:5]
        assert [token for token, _ in one.top] == order.tolist()
        values = [one.logprob, *(x for _, x in one.top)]
        np.testing.assert_allclose(values, want[row, column][[one.token, *order]], atol=1e-5)


@pytest.mark.exhaustive
def test_log_probabilities_are_those_of_the_models_logits():
    model, prompt = golden.model("glm5"), golden.ids("glm5")[0, :9].tolist()
    sampling = Sampling(max_tokens=3, temperature=2.0, top_k=50, seed=1, logprobs=20, ignore_eos=True)
    made = models.generate(model, [prompt], sampling=sampling, chunk=16)
    (tokens,), (logprobs,) = made.tokens, made.logprobs
    logits = np.float64(model.run(jnp.asarray([[*prompt, *tokens[:-1]]])).logits[0, len(prompt) - 1 :])
    for one, token, row in zip(
        logprobs, tokens, logits - np.log(np.sum(np.exp(logits), axis=1, keepdims=True)), strict=True
    ):
        order = np.argsort(-row)[:20]
        assert one.token == token and [token for token, _ in one.top] == order.tolist()
        np.testing.assert_allclose([one.logprob, *(x for _, x in one.top)], [row[token], *row[order]], atol=1e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_tokens": 0}, "max_tokens=0, wanted an int of at least 1"),
        ({"temperature": -1}, "temperature=-1, wanted a number of at least 0"),
        ({"temperature": float("inf")}, "temperature=inf, wanted"),
        ({"top_p": 0}, "top_p=0, wanted a number above 0"),
        ({"top_p": 1.1}, r"top_p=1\.1, wanted a number of at least 0, at most 1"),
        ({"min_p": True}, "min_p=True, wanted"),
        ({"top_k": -1}, "top_k=-1, wanted an int of at least 0"),
        ({"seed": 2**63}, "seed=9223372036854775808, wanted an int"),
        ({"stop": ("a", "")}, r"stop=\('a', ''\), wanted texts that are not empty"),
        ({"stop": 3}, "stop=3, wanted texts"),
        ({"stop_ids": (-1,)}, r"stop_ids\[0\] is -1, wanted an int from 0"),
        ({"logprobs": 21}, "logprobs=21, wanted at most 20"),
        ({"ignore_eos": 1}, "ignore_eos=1, wanted True or False"),
    ],
)
def test_bad_values_are_refused_by_name(arguments, message):
    with pytest.raises(ValueError, match=f"^Sampling: {message}"):
        Sampling(**arguments)


def test_one_form_of_a_call_is_wanted_and_ids_of_the_model():
    for call in (
        lambda **given: models.generate(serving.model(), [[1]], **given),
        lambda **given: serving.engine().submit([1], **given),
    ):
        for given, message in (
            ({"sampling": Sampling(), "max_new_tokens": 3}, "beside sampling no max_new_tokens, stop_ids"),
            ({"sampling": "greedy"}, "sampling is 'greedy', wanted a Sampling or None"),
            ({"sampling": Sampling(stop_ids=(61,))}, r"stop_ids\[0\] is 61, wanted an int from 0 to 60"),
            ({"sampling": Sampling(stop="x")}, "stop texts need a tokenizer"),
            ({}, "max_new_tokens=None, wanted an int"),
        ):  # fmt: skip
            with pytest.raises(ValueError, match=message):
                call(**given)
    with pytest.raises(ValueError, match="generate: sampling is of 2, wanted one Sampling, or one for each of 1"):
        models.generate(serving.model(), [[1]], sampling=[Sampling(), Sampling()])
    with pytest.raises(
        ValueError, match=r"prompts is \[1, 2, 3\] and prompts\[0\] is 1, wanted .*: \[\[1, 2, 3\]\] is one"
    ):
        models.generate(serving.model(), [1, 2, 3], 1)
