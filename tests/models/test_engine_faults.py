"""Whatever fails in a step, a draft or a request's numbers, every other request gets the tokens that it gets alone.

All on a tiny model and engines of one size: five compiled programs, some 15 s of CPU the first time.
"""

import contextlib
import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bench.serve.engine_faults import failing, with_poison
from hisa_jax import models
from hisa_jax.models import passes
from hisa_jax.models.drafts import lookup, propose
from hisa_jax.models.scheduler import Scheduler
from hisa_jax.page_pool import PagePool

from . import serving

ERROR = RuntimeError("RESOURCE_EXHAUSTED: Out of memory")
POISON = serving.VOCABULARY - 1


@pytest.fixture(scope="module")
def traffic():
    """Prompts and their tokens by `generate`; token `POISON` is neither read nor made."""
    prompts = [tuple(token % POISON for token in prompt) for prompt in serving.requests(60, seed=1)]
    pairs = zip(prompts, serving.alone(tuple(prompts), stop_ids=()), strict=True)
    chosen = [(list(prompt), tokens) for prompt, tokens in pairs if POISON not in tokens][:24]
    assert len(chosen) == 24 and len({tuple(tokens) for _, tokens in chosen}) > 18
    return chosen


def submit(engine, traffic):
    """All requests; the tokens that each must get."""
    return {engine.submit(prompt, serving.N_NEW, ()): tokens for prompt, tokens in traffic}


def places():
    """Where a step may fail: in every program, before it runs or after; on the host, before anything ran or between."""
    for name in ("read", "verify", "keep", "copy"):
        for is_late in (False, True):
            yield functools.partial(failing, name, is_late=is_late)
    for owner, name in ((Scheduler, "admit"), (PagePool, "extend"), (PagePool, "truncate"), (Scheduler, "finish")):
        yield lambda error, owner=owner, name=name: mock.patch.object(owner, name, side_effect=error)


def test_a_step_that_fails_anywhere_is_undone_and_done_again(traffic):
    """A fault in about every second step, until there were three in each place."""
    rng, e, inject = np.random.default_rng(0), serving.engine(), list(places())
    n, tokens, wanted = np.zeros(len(inject), int), {}, {}
    while n.min() < 3:
        if e.is_idle:
            assert tokens == wanted and len(wanted) < 1000
            wanted |= submit(e, traffic)
        place, error = rng.choice(np.flatnonzero(n < 3)), (ERROR, KeyboardInterrupt())[rng.integers(2)]
        before, donors = requests_of(e), dict(e.scheduler.donors)
        try:
            with inject[place](error) if rng.random() < 0.5 else contextlib.nullcontext():
                tokens |= e.step().finished
        except (RuntimeError, KeyboardInterrupt) as raised:
            assert raised is error
            n[place] += 1
            again = [id for id in before[1] if id in e.scheduler.waiting]
            assert list(e.scheduler.waiting) == again + before[0]
            if e.scheduler.donors == donors and not again:
                assert requests_of(e) == before
        e.pool.check()
    assert serving.finish(e, tokens) == (wanted, {})
    e.release()
    assert e.pool.n_free == e.pool.n_pages


def requests_of(engine):
    scheduler, pool = engine.scheduler, engine.pool
    n_tokens = [(id, len(r.tokens), r.must_copy, r.n_overtaken) for id, r in scheduler.running.items()]
    return list(scheduler.waiting), list(scheduler.running), n_tokens, dict(pool.lengths), pool.n_free


def test_a_donor_whose_pages_an_undone_step_has_written_to_serves_nobody(traffic):
    """A prompt is read into its pages, then decoding fails; the prompt is cancelled before the step is done again."""
    first, second = sorted(traffic, key=lambda one: -len(one[0]))[:2]

    def serve(engine):
        tokens = [*first[0], *first[1], 3]
        return engine.submit(tokens, 4, ()), serving.finish(engine)[0]

    e = serving.engine()
    donor = e.submit(*first[:1], serving.N_NEW, ())
    serving.finish(e)
    e.submit([*range(len(second[0]))], serving.N_NEW, ())
    while not any(len(request.tokens) > request.n_prompt for request in e.scheduler.running.values()):
        e.step()
    assert donor in e.scheduler.donors
    prompt = e.submit([7] * 36, 8, ())
    with failing("verify", ERROR), pytest.raises(RuntimeError, match="RESOURCE_EXHAUSTED"):
        e.step()
    assert donor not in e.scheduler.donors and e.scheduler.waiting.keys() == {prompt}
    e.pool.check()
    e.cancel(prompt)
    id, tokens = serve(e)
    alone, wanted = serve(serving.engine())
    assert tokens[id] == wanted[alone]


def test_one_who_shares_a_page_with_a_shorter_one_gets_its_tokens_after_a_step_was_undone(traffic):
    """In one batch the longer one copies the page, then the shorter one writes to it; then decoding fails."""
    decodes = min(traffic, key=lambda one: len(one[0]))[0]
    rng = np.random.default_rng(0)
    long, short = rng.integers(0, POISON, 19).tolist(), rng.integers(0, POISON, 6).tolist()
    tokens = []
    for fault in (contextlib.nullcontext(), failing("verify", ERROR)):
        e = serving.engine()
        e.submit(decodes, 16, ())
        while not any(len(request.tokens) > request.n_prompt for request in e.scheduler.running.values()):
            e.step()
        id = e.submit(long, serving.N_NEW, ())
        e.step()
        e.step()
        assert e.pool.lengths[id] == 7
        e.submit([*long[:5], *short], serving.N_NEW, ())
        with fault, contextlib.suppress(RuntimeError):
            e.step()
        tokens.append(serving.finish(e)[0])
    assert tokens[0] == tokens[1]


def test_an_error_of_the_device_that_shows_after_the_call_loses_pages_and_no_token(traffic, caplog):
    def refuse(_):
        raise ValueError("the device failed")

    def broken(weights, pages, *arrays, structure, trace, formats):
        def run(pages):
            logits = jax.ShapeDtypeStruct((2, 1, serving.VOCABULARY), jnp.float32)
            return jax.pure_callback(refuse, logits, pages[0].counts), pages, passes.Seen([], None)

        return jax.jit(run, donate_argnums=0)(pages)

    e = serving.engine()
    wanted = submit(e, traffic[:4])
    tokens = e.step().finished
    with (
        mock.patch("hisa_jax.models.passes.read", broken),
        pytest.raises(jax.errors.JaxRuntimeError, match="device failed"),
    ):
        for _ in range(100):
            tokens |= e.step().finished
    assert serving.finish(e, tokens) == (wanted, {})


def test_an_error_of_the_device_in_a_chunk_that_nobody_waits_for_loses_no_token(traffic):
    real, calls = passes.read, []

    def refuse(_):
        raise ValueError("the device failed")

    def broken(weights, pages, *arrays, **static):
        calls.append(len(calls))
        if len(calls) > 1:
            return real(weights, pages, *arrays, **static)

        def run(pages):
            logits = jax.ShapeDtypeStruct((2, 1, serving.VOCABULARY), jnp.float32)
            return jax.pure_callback(refuse, logits, pages[0].counts), pages, passes.Seen([], None)

        # A CPU runs a callback within the call if its arguments are there. So these come 0.1 s later.
        run = jax.jit(run, donate_argnums=0).lower(pages).compile()
        return run(jax.jit(late)(pages))

    def late(pages):
        x = jax.lax.fori_loop(0, 3000, lambda _, x: jnp.sin(x @ x), jnp.ones((128, 128)))
        return jax.tree.map(lambda leaf: leaf + (0 * x[0, 0]).astype(leaf.dtype), pages)

    e = serving.engine()
    longest = max(traffic, key=lambda one: len(one[0]))
    assert len(longest[0]) > 2 * serving.CHUNK
    wanted = submit(e, [longest])
    with mock.patch.object(passes, "read", broken):
        assert e.step().steps  # the pass that fails
        with pytest.raises(jax.errors.JaxRuntimeError, match="device failed"):
            e.step()
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        jax.effects_barrier()  # JAX would report it once more when the process ends
    assert serving.finish(e) == (wanted, {})


class Mute(Exception):
    """An error that cannot say what it is."""

    def __str__(self):
        raise ValueError


def raising(error):
    raise error


DRAFTS = {
    "raises what cannot be shown": lambda tokens, n: raising(Mute()),
    "raises": lambda tokens, n: 1 // 0,
    "None": lambda tokens, n: None,
    "a number": lambda tokens, n: 3,
    "text": lambda tokens, n: "ab",
    "NaN": lambda tokens, n: [float("nan")] * n,
    "a float": lambda tokens, n: [*lookup(tokens, 1), 1.0],
    "True": lambda tokens, n: [True] * n,
    "negative": lambda tokens, n: np.full(n, -1),
    "beyond the vocabulary": lambda tokens, n: [2**40] * n,
    "without end": lambda tokens, n: iter(lambda: tokens[-1], None),
    "overwrites its tokens": lambda tokens, n: tokens.clear() or [1] * n,
    "raises after some": lambda tokens, n: (1 // (1 - i) for i in range(n)),
}
WITHOUT_ERROR = ("None", "without end", "overwrites its tokens")


def test_a_draft_may_do_what_it_likes(traffic):
    for name, draft in DRAFTS.items():
        e, errors = serving.engine(draft=draft), {}
        wanted, tokens = submit(e, traffic[:3]), {}
        while not e.is_idle:
            report = e.step()
            tokens |= report.finished
            errors |= report.draft_errors
        assert tokens == wanted, name
        assert bool(errors) == (name not in WITHOUT_ERROR), name


def test_a_draft_that_calls_the_engine_is_refused(traffic):
    e = serving.engine(draft=lambda tokens, n: e.cancel(0))
    wanted = submit(e, traffic[:2])
    while not (errors := e.step().draft_errors):
        pass
    assert set(errors.values()) == {"RuntimeError: cancel: called within a step, wanted after it"}
    assert serving.finish(e) == (wanted, {})


def test_an_interrupt_in_a_draft_undoes_the_step(traffic):
    pressed = iter([KeyboardInterrupt])
    e = serving.engine(draft=mock.Mock(side_effect=lambda tokens, n: (_ for _ in ()).throw(next(pressed, ValueError))))
    wanted = submit(e, traffic[:2])
    with pytest.raises(KeyboardInterrupt):
        serving.finish(e)
    assert serving.finish(e) == (wanted, {})


def test_proposals_are_read_up_to_the_first_that_is_no_token():
    assert propose(lambda tokens, n: [1, np.int64(2), 9, 3], [0], 4, 9) == (
        [1, 2],
        "proposed 9, wanted an int from 0 to 8",
    )
    assert propose(lambda tokens, n: jnp.arange(5), [0], 3, 9) == ([0, 1, 2], None)
    assert propose(lambda tokens, n: [], [0], 3, 9) == ([], None)


def test_a_request_whose_logits_are_nan_fails_and_leaves_nothing_to_those_who_have_its_pages_next(traffic):
    """In every third place a prompt that ends in a token whose embedding is NaN; some begin as good ones do."""
    e = serving.engine(with_poison(serving.model(), POISON))
    wanted, bad = {}, set()
    for i, (prompt, tokens) in enumerate(traffic):
        if i % 3 == 1:
            bad |= {e.submit([*prompt, POISON], serving.N_NEW), e.submit([POISON, POISON], serving.N_NEW)}
        wanted[e.submit(prompt, serving.N_NEW, ())] = tokens
    tokens, failed = serving.finish(e)
    assert tokens == wanted and failed.keys() == bad
    assert set(failed.values()) == {"logits are not finite (NaN or infinity) after 0 new tokens"}
    assert not bad & e.scheduler.donors.keys()
    e.release()
    assert e.pool.n_free == e.pool.n_pages


def test_a_request_fails_where_its_logits_turn_nan_whether_drafted_or_not(traffic):
    """The poison is a token that the model makes itself: what came before stands in the reason, as by `generate`."""
    prompt, tokens = traffic[0]
    at = next(i for i, token in enumerate(tokens) if token not in prompt and token not in tokens[:i])
    model, reasons = with_poison(serving.model(), tokens[at]), set()
    for draft in (lookup, lambda _, n: tokens[at : at + n], lambda so_far, n: tokens[len(so_far) - len(prompt) :]):
        e = serving.engine(model, draft)
        id = e.submit(prompt, serving.N_NEW, ())
        assert serving.finish(e)[0] == {}
        e = serving.engine(model, draft)
        assert e.submit(prompt, serving.N_NEW, ()) == id
        reasons.add(serving.finish(e)[1][id])
        e.submit(prompt, serving.N_NEW, [tokens[at]])
        assert serving.finish(e) == ({id + 1: tokens[: at + 1]}, {})  # ends before the bad token is read
    assert reasons == {f"logits are not finite (NaN or infinity) after {at + 1} new tokens"}
    prompts = [[token % POISON for token in prompt] for prompt in serving.requests(60, seed=1)]
    failed = rf"generate: logits are not finite .*: .*prompts\[{prompts.index(prompt)}\] after {at + 1} new tokens"
    with pytest.raises(FloatingPointError, match=failed):
        models.generate(model, prompts, serving.N_NEW, chunk=serving.CHUNK, stop_ids=())
