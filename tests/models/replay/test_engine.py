"""An engine's rollouts are those of each request alone, with shared prefixes, proposals and undone steps.

In the gate on a model of one layer: two compiled programs and those of `generate`.
"""

import contextlib
import functools
from unittest import mock

import numpy as np
import pytest

from bench.serve.engine_faults import failing
from hisa_jax import models
from hisa_jax.models.scheduler import Scheduler
from tests.models import serving

from . import rollouts


def served(engine, prompts):
    """(rollouts in the order of the prompts, how many requests shared a prefix, the numbers of proposals kept)."""
    ids, found, n_forks, kept = [engine.submit(prompt, serving.N_NEW, ()) for prompt in prompts], {}, 0, set()
    while not engine.is_idle:
        report = engine.step()
        assert report.rollouts.keys() == report.finished.keys()
        found |= report.rollouts
        n_forks += len(report.forks)
        kept |= {n for step in report.steps if step.phase == "decode" for n in step.n_kept}
    return [found[id] for id in ids], n_forks, kept


def test_rollouts_are_those_of_each_request_alone():
    """With shared prefixes, since each prompt comes twice, and with proposals of which every fourth is wrong."""
    alone = rollouts.rollout(("sparse",))
    whole = [[*row[: n - 1], int(to[n - 2])] for row, to, n in _rows(alone)]

    def draft(tokens, n):
        right = next(row for row in whole if tokens == row[: len(tokens)])
        drafted = [token if at % 4 else (token + 1) % serving.VOCABULARY for at, token in enumerate(right)]
        return drafted[len(tokens) : len(tokens) + n]

    engine = serving.engine(serving.model(kinds=("sparse",)), draft=draft, return_selections=True)
    found, n_forks, kept = served(engine, rollouts.PROMPTS * 2)
    assert n_forks >= 3 and kept == {1, 2, 3}
    for three in (found[:3], found[3:]):
        rollouts.assert_same(models.pack_rollouts(three), alone)


def _rows(rollout):
    for tokens, targets, (_, n) in zip(rollout.tokens, rollout.targets, rollout.cu_seqlens, strict=True):
        yield tokens.tolist(), targets.tolist(), n + 1


@pytest.mark.exhaustive
def test_selections_may_begin_at_a_position():
    """That is in the middle of chunks, and of what is shared."""
    alone = rollouts.rollout(selections_from=13)
    for draft in (None, models.engine.lookup):
        engine = serving.engine(draft=draft, return_selections=True, selections_from=13)
        found, n_forks, _ = served(engine, rollouts.PROMPTS * 2)
        assert n_forks and {r.start for r in found} == {13} and found[0].skipped == 13
        for three in (found[:3], found[3:]):
            rollouts.assert_same(models.pack_rollouts(three), alone)


@pytest.mark.exhaustive
@pytest.mark.parametrize("method", [serving.HISA, serving.by_phase], ids=["hisa", "by_phase"])
def test_rollouts_are_the_same_after_steps_that_were_undone_and_pages_that_were_lost(method):
    """A fault in about every second step: before a program runs; after, when the pages are lost; and between."""
    prompts = serving.requests(24, seed=1)
    wanted = models.generate(
        serving.model(method), prompts, serving.N_NEW, chunk=serving.CHUNK, stop_ids=(), return_selections=True
    ).rollout
    places = [functools.partial(failing, name, is_late=late) for name in ("read", "verify") for late in (False, True)]
    for owner, name in ((Scheduler, "truncate"), (Scheduler, "finish"), (models.engine.Recorder, "write")):
        places.append(lambda error, owner=owner, name=name: mock.patch.object(owner, name, side_effect=error))
    engine, rng = serving.engine(serving.model(method), return_selections=True), np.random.default_rng(0)
    ids, found, n_failed, n_forks = [engine.submit(prompt, serving.N_NEW, ()) for prompt in prompts], {}, 0, 0
    while not engine.is_idle:
        place = places[rng.integers(len(places))]
        try:
            with place(RuntimeError("lost")) if rng.random() < 0.5 else contextlib.nullcontext():
                report = engine.step()
                found |= report.rollouts
                n_forks += len(report.forks)
        except RuntimeError:
            n_failed += 1
    assert n_failed > 20 and n_forks > 5
    rollouts.assert_same(models.pack_rollouts([found[id] for id in ids]), wanted)


@pytest.mark.exhaustive
def test_what_cancelled_and_forgotten_requests_selected_is_kept_no_longer_than_their_pages():
    engine = serving.engine(return_selections=True)
    ids = [engine.submit(prompt, serving.N_NEW, ()) for prompt in rollouts.PROMPTS]
    for _ in range(4):
        engine.step()
    engine.cancel(ids[0])
    while not engine.is_idle:
        engine.step()
    assert engine._recorder.ids == engine.pool.lengths.keys()
    engine.release()
    engine.step()
    assert not engine._recorder.ids
