"""Continuous batching: whatever happens around a request, its tokens are those that it gets alone."""

import dataclasses

import numpy as np
import pytest

from hisa_jax.models.engine import Engine, lookup
from tests.own_scores import FUNCTIONS

from . import serving


@pytest.fixture(scope="module")
def traffic():
    """(prompt, its tokens by `generate`), without an engine and without shared pages."""
    prompts = serving.requests(60, seed=1)
    return list(zip(prompts, serving.alone(tuple(map(tuple, prompts)), stop_ids=()), strict=True))


def submit(engine, traffic):
    return {engine.submit(prompt, serving.N_NEW, ()): tokens for prompt, tokens in traffic}


def test_tokens_are_those_of_each_request_alone_with_shared_prefixes_few_pages_and_proposals_right_or_wrong(traffic):
    """24 pages of 4 tokens hold two requests and little more: others wait, and finished ones are dropped for them."""
    answers = {tuple(prompt): [*prompt, *made] for prompt, made in traffic}

    def draft(tokens, n):
        """What comes, but every third token wrong."""
        whole = next(whole for whole in answers.values() if tokens == whole[: len(tokens)])
        wrong = [token if at % 3 else (token + 1) % serving.VOCABULARY for at, token in enumerate(whole)]
        return wrong[len(tokens) : len(tokens) + n]

    engine, tokens, forks, verified, rng = serving.engine(draft=draft), {}, [], [], np.random.default_rng(0)
    waiting, wanted = list(traffic), {}
    while waiting or not engine.is_idle:
        for one in waiting[: rng.integers(3)]:
            wanted |= submit(engine, [one])
            waiting.remove(one)
        report = engine.step()
        engine.pool.check()
        tokens |= report.finished
        forks += report.forks
        for step in report.steps:
            if step.phase == "decode":
                verified += [(new - 1, kept - 1) for new, kept in zip(step.n_new, step.n_kept, strict=True)]
    engine.release()
    assert tokens == wanted and engine.pool.n_free == engine.pool.n_pages
    assert len(forks) > 10 and all(shared >= 4 for _, _, shared in forks)
    assert {kept for _, kept in verified} == {0, 1, 2} and any(kept < new for new, kept in verified)


@pytest.mark.exhaustive
def test_tokens_by_a_scan_are_those_of_each_request_alone():
    """Its pages need not be made of units: prompts of 40 tokens fill no page of 64."""
    prompts = serving.requests(8, seed=4)
    alone = serving.alone(tuple(map(tuple, prompts)), serving.SCAN, ())
    engine = serving.engine(serving.model(serving.SCAN), n_pages=6)
    wanted = {engine.submit(prompt, serving.N_NEW, ()): tokens for prompt, tokens in zip(prompts, alone, strict=True)}
    assert serving.finish(engine) == (wanted, {}) and engine.pool.page_size == 64


@pytest.mark.exhaustive
def test_tokens_are_the_same_on_pages_of_another_size():
    """Of half a block; 48 of them hold what 24 of the others do."""
    prompts = serving.requests(8, seed=4)
    alone = serving.alone(tuple(map(tuple, prompts)), stop_ids=())
    engine = serving.engine(serving.model().with_page_size(2), n_pages=48)
    wanted = {engine.submit(prompt, serving.N_NEW, ()): tokens for prompt, tokens in zip(prompts, alone, strict=True)}
    assert serving.finish(engine) == (wanted, {}) and engine.pool.page_size == 2


@pytest.mark.exhaustive
def test_tokens_by_scores_of_ones_own_are_those_of_each_request_alone():
    """And not those by the indexer's."""
    method = dataclasses.replace(serving.HISA, **FUNCTIONS)
    prompts = serving.requests(8, seed=4)
    given = tuple(map(tuple, prompts))
    alone = serving.alone(given, method, ())
    engine = serving.engine(serving.model(method))
    wanted = {engine.submit(prompt, serving.N_NEW, ()): tokens for prompt, tokens in zip(prompts, alone, strict=True)}
    assert serving.finish(engine) == (wanted, {}) and alone != serving.alone(given, stop_ids=())


def test_cancelled_requests_give_pages_back_in_every_state_and_others_do_not_notice(traffic):
    """At random, so also while they wait, are read, decode, hold pages that others share, or are finished."""
    engine, rng, states = serving.engine(), np.random.default_rng(0), set()
    wanted, tokens, cancelled, pool = submit(engine, traffic), {}, set(), engine.pool
    while not engine.is_idle:
        running = list(engine.scheduler.running) or [0]
        for id in (int(rng.choice(running)), int(rng.integers(len(traffic))))[: rng.integers(0, 9) // 4]:
            request, was_waiting = engine.scheduler.running.get(id), id in engine.scheduler.waiting
            n_pages, n_own = (len(pool.pages(id)), pool.n_own(id)) if request else (0, 0)
            n_free = pool.n_free
            assert engine.cancel(id) == (was_waiting or request is not None)
            if request:
                is_read = len(request.tokens) > request.n_prompt
                states.add(("decoding" if is_read else "reading", n_own < n_pages))
            if request or was_waiting:
                cancelled.add(id)
                assert pool.n_free == n_free + n_own and id not in pool.lengths
        tokens |= engine.step().finished
        pool.check()
        assert not cancelled & engine.scheduler.donors.keys()
    assert tokens == {id: made for id, made in wanted.items() if id not in cancelled} and len(tokens) > 9
    assert states == {(state, is_shared) for state in ("decoding", "reading") for is_shared in (False, True)}
    engine.release()
    assert pool.n_free == pool.n_pages


def test_a_number_that_was_never_given_cannot_be_cancelled(traffic):
    engine = serving.engine()
    (id,) = submit(engine, traffic[:1])
    for wrong, message in ((1, "id=1, wanted one that submit gave: there were 1"), (-1, "id=-1"), ("0", "id='0'")):
        with pytest.raises(ValueError, match=f"cancel: {message}"):
            engine.cancel(wrong)
    assert engine.cancel(id) and not engine.cancel(id) and engine.is_idle and engine.step().finished == {}


def test_what_a_caller_hands_in_or_gets_may_be_changed_without_effect(traffic):
    engine, wanted, tokens, proposals = serving.engine(draft=lambda *_: proposals), {}, {}, []
    for i, (prompt, made) in enumerate(traffic[:6]):
        mine, stops = np.array(prompt, (np.int64, np.uint8)[i % 2]) if i % 3 else list(prompt), [made[-1]]
        wanted[engine.submit(mine, np.int32(serving.N_NEW), stops)] = made[: made.index(made[-1]) + 1]
        mine[:] = mine[:1] * 0
        stops[:] = range(60)
    while not engine.is_idle:
        proposals[:] = [1, 2, 3]
        report = engine.step()
        tokens |= {id: list(made) for id, made in report.finished.items()}
        for step in report.steps:
            for part in (step.requests, step.starts, step.n_new, step.n_kept):
                part.clear()
        for part in (*report.finished.values(), *vars(report).values()):
            part.clear()
    assert tokens == wanted


def test_a_request_stops_at_the_tokens_of_the_config_unless_told(traffic):
    prompt, made = traffic[0]
    at = next(i for i, token in enumerate(made) if token in serving.STOPS)
    engine = serving.engine(draft=lambda tokens, n: made[len(tokens) - len(prompt) :])  # right beyond the stop, too
    ids = [engine.submit(prompt, serving.N_NEW, *given) for given in ((), ((),), ({made[0]},))]
    tokens, _ = serving.finish(engine)
    assert [tokens[id] for id in ids] == [made[: at + 1], made, made[:1]] and at < serving.N_NEW - 1


def test_lookup_proposes_what_followed_last_time():
    assert lookup([1, 2, 3, 4, 1, 2, 9, 1, 2], 2) == [9, 1]
    assert lookup([1, 2, 3, 1, 2], 5) == [3, 1, 2]
    assert lookup([1, 2, 3], 2) == lookup([1], 2) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": 0}, "Engine: rows=0, wanted an int of at least 1"),
        ({"rows": True}, "Engine: rows=True, wanted an int of at least 1"),
        ({"chunk": 2.0}, r"Engine: chunk=2\.0, wanted an int of at least 1"),
        ({"n_pages": "8"}, "Engine: n_pages='8', wanted an int of at least 1"),
        ({"max_overtakes": -1}, "Engine: max_overtakes=-1, wanted an int of at least 0"),
        ({"n_draft": 2}, "Engine: n_draft=2, wanted 0 without a draft"),
        ({"draft": lookup}, "Engine: n_draft=0, wanted 1 or more with a draft"),
        ({"draft": "lookup", "n_draft": 2}, "Engine: draft='lookup', wanted what can be called"),
        ({"max_length": 10**5000}, "Engine: max_length=a int, wanted at most 96"),
        ({"max_length": 97}, "Engine: max_length=97, wanted at most 96, the model's positions"),
    ],
)
def test_bad_sizes_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        Engine(serving.model(), **{"n_pages": 8} | changes)


def test_requests_that_cannot_be_served_are_refused_by_name_and_the_good_ones_among_them_are_served(traffic):
    engine, wanted = serving.engine(), {}
    good = iter(traffic)
    for n, arguments in enumerate(serving.BAD_REQUESTS):
        with pytest.raises(ValueError, match=f"^submit: {arguments[-1]}"):
            engine.submit(*arguments[:-1])
        if n % 3 == 0:
            wanted |= submit(engine, [next(good)])
    for n_new, sizes in ((53, "65 tokens in 18 pages"), (10**5000, "a int tokens in a int pages")):
        made = f"submit: prompt and max_new_tokens make {sizes}, wanted at most max_length=64 in 24"
        with pytest.raises(ValueError, match=made):
            engine.submit([1] * 12, n_new)
    assert serving.finish(engine) == (wanted, {}) and list(wanted) == list(range(len(wanted)))


def test_one_that_needs_more_pages_than_there_are_is_refused():
    with pytest.raises(ValueError, match="make 13 tokens in 5 pages, wanted at most max_length=64 in 4"):
        serving.engine(n_pages=4).submit([1] * 12, 1)
