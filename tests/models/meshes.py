"""Engines on meshes of 8 emulated devices against one device; run by test_engine_meshes.py in a process of its own.

The number of devices is fixed when JAX starts, so it cannot be set for one test among others.
"""

import sys
import time

import jax

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_disable_most_optimizations", True)

import numpy as np  # noqa: E402

from bench.serve import engine_faults  # noqa: E402
from bench.serve.check import is_tie  # noqa: E402
from hisa_jax import models  # noqa: E402
from hisa_jax.models.engine import Engine, lookup  # noqa: E402
from tests.models import serving  # noqa: E402


def engine(mesh, draft=lookup, kinds=("dense", "sparse"), **options):
    """Few pages for each group and device, so that requests wait for each other's and get them."""
    sizes = dict(n_pages=96, rows=8, prefill_rows=8, max_length=64, chunk=serving.CHUNK, n_draft=2 if draft else 0)
    return Engine(serving.model(kinds=kinds, mesh=mesh), **sizes | options, draft=draft)


def tokens_are_those_of_one_device(data, model, context, n=24, **options):
    """Requests that share prefixes come at any time, and some go before they have ended."""
    prompts, rng = [tuple(p) for p in serving.requests(n, seed=1)], np.random.default_rng(0)
    e, tokens, n_submitted, cancelled = engine(models.make_mesh(data, model, context), **options), {}, 0, []
    one = serving.model(kinds=options.get("kinds", ("dense", "sparse")))
    wanted = models.generate(one, prompts, serving.N_NEW, chunk=serving.CHUNK, stop_ids=()).tokens
    while n_submitted < n or not e.is_idle:
        for _ in range(min(rng.integers(4), n - n_submitted)):
            e.submit(prompts[n_submitted], serving.N_NEW, ())
            n_submitted += 1
        if e.scheduler.running and len(cancelled) < n // 6 and rng.random() < 0.3:
            cancelled.append(int(rng.choice(list(e.scheduler.running))))
            assert e.cancel(cancelled[-1])
        report = e.step()
        e.pool.check()
        tokens |= report.finished
        assert not report.failed
    assert tokens.keys() == {*range(n)} - {*cancelled} and len(cancelled) == n // 6
    parted = [id for id, got in tokens.items() if got != wanted[id]]
    assert all(is_tie(one, prompts[id], tokens[id], wanted[id]) for id in parted), parted
    groups = {e.pool.group(id) for id in e.scheduler.donors}
    assert len(groups) == data, groups
    assert e.pages[0].keys.sharding.spec == models.cache.pages_sharding(e.model.mesh, 8).spec
    e.release()
    assert e.pool.n_free == e.pool.n_pages
    print(f"mesh ({data}, {model}, {context}): {len(tokens)} requests, {len(parted)} part at ties", flush=True)


def one_on_eight_devices_for_the_pages():
    tokens_are_those_of_one_device(1, 1, 8)


def two_on_each_axis():
    tokens_are_those_of_one_device(2, 2, 2)


def eight_groups():
    tokens_are_those_of_one_device(8, 1, 1)


def four_ranks_of_two_devices():
    tokens_are_those_of_one_device(1, 4, 2)


def a_small_mesh():
    tokens_are_those_of_one_device(2, 1, 2, n=6, kinds=("sparse",), draft=None)


def a_request_that_is_cancelled_gives_back_pages_of_four_devices_and_the_others_go_on():
    prompts = [tuple(p) for p in serving.requests(24, seed=1)][:3]
    e, long = engine(models.make_mesh(1, 2, 4), n_pages=32), serving.requests(1, seed=3, longest=80)[0]
    wanted = dict(enumerate(serving.alone(tuple(prompts), stop_ids=())))
    for prompt in prompts:
        e.submit(prompt, serving.N_NEW, ())
    id = e.submit([*long, *range(40)][:48], serving.N_NEW, ())
    tokens = {}
    while e.pool.lengths.get(id, 0) < 4 * e.model.stripe:
        tokens |= e.step().finished
    pages = e.pool.pages(id)
    assert {page // 8 for page in pages} == {0, 1, 2, 3}
    before, own = e.pool.n_free, e.pool.n_own(id)
    assert e.cancel(id) and e.pool.n_free == before + own
    e.pool.check()
    assert serving.finish(e, tokens) == (wanted, {})
    e.release()
    assert e.pool.n_free_on(0) == [8] * 4


def requests_wait_for_pages_of_one_device_while_others_have_some():
    """All are short, so that their pages lie on the first of eight devices, which has four."""
    prompts = [tuple(p[:3]) for p in serving.requests(12, seed=2)]
    wanted = models.generate(serving.model(), prompts, 1, chunk=serving.CHUNK, stop_ids=()).tokens
    e, most = engine(models.make_mesh(1, 1, 8), n_pages=32), 0
    ids = {e.submit(p, 1, ()): t for p, t in zip(prompts, wanted, strict=True)}
    tokens = {}
    while not e.is_idle:
        tokens |= e.step().finished
        most = max(most, len(e.scheduler.waiting))
        assert e.pool.n_free_on(0)[1:] == [4] * 7
    assert tokens == ids and most > 4


def faults_of_every_kind_end_as_on_one_device():
    """Out of memory, lost pages, interrupts, bad drafts and prompts, cancelled requests, NaN."""
    mesh = models.make_mesh(1, 2, 2)

    def make(model=None, draft=lookup):
        model = serving.model(mesh=mesh) if model is None else model
        return Engine(model, n_pages=28, rows=4, max_length=64, chunk=serving.CHUNK, draft=draft, n_draft=2)

    # Some begin alike, up to a place within a page.
    prompts = [[token // 2 * 2 for token in (prompt[:19] + prompt[-3:])] for prompt in serving.requests(8, seed=1)]
    results = list(engine_faults.inject(make, prompts, serving.N_NEW))
    for result in results:
        print(result.fault, "->", result.outcome, flush=True)
    assert all(result.is_right for result in results) and len(results) == 15, len(results)


if __name__ == "__main__":
    for promise in sys.argv[1:]:
        start = time.perf_counter()
        globals()[promise]()
        print(f"kept: {promise} ({time.perf_counter() - start:.1f} s)", flush=True)
