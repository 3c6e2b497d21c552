"""Continuous batching: whatever happens around a request, its tokens are those that it gets alone."""

import numpy as np
import pytest

import hisa_jax as hj
import models
from models.engine import Engine, lookup

from . import golden

HISA = hj.Hisa(topk=8, block_size=4, block_topk=3)
PREFIX = [5, 17, 30, 41, 52, 63, 74, 85, 96, 7]
PROMPTS = [[*PREFIX, 18, 29, 40], [*PREFIX[:7], 90, 80], [70, 60, 50, 40, 30, 20, 10], [*PREFIX, 18, 29, 40, 3]]
N_NEW = 7


def model():
    return golden.model("glm5").with_method(HISA)


@pytest.fixture(scope="module")
def alone():
    """By `generate`, which has no engine and pages that nobody shares."""
    return models.generate(model(), PROMPTS, N_NEW, chunk=24).tokens


def run(engine, prompts=PROMPTS):
    """Two requests at once, the others as these get on; tokens of each, forks, and (proposed, kept) a step and row."""
    tokens, forks, verified, waiting = {}, [], [], list(prompts)
    while waiting or not engine.is_idle:
        for prompt in waiting[: 2 if engine.is_idle else 1]:
            engine.submit(prompt, N_NEW)
            waiting.remove(prompt)
        report = engine.step()
        engine.pool.check()
        tokens |= report.finished
        forks += report.forks
        verified += [
            (new - 1, kept - 1)
            for step in report.steps
            if step.phase == "decode"
            for new, kept in zip(step.n_new, step.n_kept, strict=True)
        ]
    engine.release()
    assert engine.pool.n_free == engine.pool.n_pages
    return [tokens[i] for i in range(len(prompts))], forks, verified


@pytest.mark.slow
def test_tokens_are_those_of_each_request_alone_with_shared_prefixes_few_pages_and_proposals_right_or_wrong(alone):
    """15 pages of 4 tokens hold two requests and little more: others wait, and finished ones are dropped for them."""
    answers = {tuple(prompt): [*prompt, *made] for prompt, made in zip(PROMPTS, alone, strict=True)}

    def draft(tokens, n):
        """What comes, but every third token wrong."""
        whole = next(whole for prompt, whole in answers.items() if tokens == whole[: len(tokens)])
        return [token if at % 3 else (token + 1) % 101 for at, token in enumerate(whole)][len(tokens) : len(tokens) + n]

    engine = Engine(model(), n_pages=15, rows=3, max_length=24, chunk=6, draft=draft, n_draft=3)
    tokens, forks, verified = run(engine)
    assert tokens == alone
    assert forks and all(shared >= 4 for _, _, shared in forks)
    assert {kept for _, kept in verified} >= {0, 1, 2} and any(kept < new for new, kept in verified)


def test_lookup_proposes_what_followed_last_time():
    assert lookup([1, 2, 3, 4, 1, 2, 9, 1, 2], 2) == [9, 1]
    assert lookup([1, 2, 3, 1, 2], 5) == [3, 1, 2]
    assert lookup([1, 2, 3], 2) == lookup([1], 2) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": 0}, "Engine: rows=0, wanted an int of at least 1"),
        ({"n_draft": 2}, "Engine: n_draft=2, wanted 0 without a draft"),
        ({"draft": lookup}, "Engine: n_draft=0, wanted 1 or more with a draft"),
        ({"max_length": 257}, "Engine: max_length=257, wanted at most 256, the model's positions"),
    ],
)
def test_bad_sizes_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        Engine(model(), **{"n_pages": 8} | changes)


def test_a_request_that_could_never_run_is_refused():
    engine = Engine(model(), n_pages=4, max_length=100)
    with pytest.raises(ValueError, match="submit: 13 tokens in 5 pages, wanted at most max_length=100 in 4"):
        engine.submit([1] * 12, 1)
    with pytest.raises(ValueError, match="submit: prompt is empty"):
        engine.submit(np.zeros(0, int), 1)
    with pytest.raises(ValueError, match=r"submit: prompt\[1\] is 101, wanted an int from 0 to 100"):
        engine.submit([3, 101], 1)
    assert engine.is_idle
