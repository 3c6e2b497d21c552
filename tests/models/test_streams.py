"""A request's pieces as they come, by steps of the caller's and by those of a thread; stop texts on the way.

The programs of the engines are those of test_engine.py; some 3 s of CPU beside them.
"""

import asyncio
import collections
import dataclasses
import importlib
import itertools
from unittest import mock

import pytest

from bench.serve.engine_faults import failing
from hisa_jax import models
from hisa_jax.models import Sampling, passes
from hisa_jax.models.async_engine import AsyncEngine, BusyError, ClosedError
from hisa_jax.models.scheduler import Scheduler
from hisa_jax.models.tokens import Bytes

from . import serving

TOKENIZER = Bytes(serving.VOCABULARY)
generate_module = importlib.import_module("hisa_jax.models.generate")  # whose name is the function's, too
ERROR = RuntimeError("RESOURCE_EXHAUSTED: Out of memory")


@pytest.fixture(scope="module")
def traffic():
    """(prompt, sampling, tokens, text) of each alone: it ends at its 5th token, at two texts, or at all 8."""
    prompts = serving.requests(12, seed=1)
    free = [Sampling(max_tokens=8, temperature=t, seed=i, ignore_eos=True) for i, t in enumerate([0, 1.0] * 6)]
    found = []
    for i, (prompt, one, tokens) in enumerate(zip(prompts, free, serving.one_by_one(prompts, free), strict=True)):
        text = TOKENIZER.decode(tokens)
        stop = ((), (text[3:5], "no such"), (text[4:7],))[i % 3]
        at = min((text.find(one) for one in stop if one in text), default=len(text))
        made = tokens[: at + len(stop[0]) if stop else 8]
        found.append((prompt, dataclasses.replace(one, stop=stop), made, text[:at]))
    return found


@pytest.mark.exhaustive
def test_generate_ends_at_stop_texts_as_an_engine_does_wherever_it_looks_for_them(traffic, monkeypatch):
    monkeypatch.setattr(generate_module, "_PIECE", 3)
    given = [TOKENIZER.decode(prompt) for prompt, *_ in traffic]  # prompts may be text
    samplings = [sampling for _, sampling, *_ in traffic]
    made = models.generate(serving.model(), given, sampling=samplings, chunk=serving.CHUNK, tokenizer=TOKENIZER)
    assert made.tokens == [tokens for _, _, tokens, _ in traffic]
    assert made.texts == [text for *_, text in traffic]


def engine(**options):
    return serving.engine(tokenizer=TOKENIZER, **options)


def joined(pieces):
    """Tokens, text and reason; only the last piece has one."""
    assert [piece.finish_reason is None for piece in pieces] == [True] * (len(pieces) - 1) + [False]
    assert all(piece.tokens or piece.finish_reason for piece in pieces)
    tokens = [token for piece in pieces for token in piece.tokens]
    return tokens, "".join(piece.text for piece in pieces), pieces[-1].finish_reason


def wanted(one):
    _, sampling, tokens, text = one
    return tokens, text, "stop" if sampling.stop else "length"


def test_streams_that_are_read_in_any_order_have_the_tokens_and_text_of_each_request_alone(traffic):
    """With proposals, so that a stop text is found within a step's tokens; the first has made some tokens before."""
    answers = {tuple(one[0]): [*one[0], *one[2]] for one in traffic}
    e = engine(draft=lambda tokens, n: next(w for w in answers.values() if tokens == w[: len(tokens)])[len(tokens) :])
    ids = [e.submit(one[0], sampling=one[1]) for one in traffic]
    streams, got = [e.stream(id) for id in ids[1:]], collections.defaultdict(list)
    while not e.scheduler.running or not e.scheduler.running[ids[0]].n_made:
        e.step()
    streams.insert(0, e.stream(ids[0]))
    for turn in range(200):
        for i, stream in enumerate(streams):
            if i % 3 == turn % 3 and (piece := next(stream, None)) is not None:
                got[i].append(piece)
    assert [joined(got[i]) for i in range(12)] == [wanted(one) for one in traffic]
    e.pool.check()
    with pytest.raises(ValueError, match="stream: id=0, wanted a request that has not ended"):
        e.stream(0)
    with pytest.raises(ValueError, match="stream: id=12, wanted one that submit gave"):
        e.stream(12)


def test_a_stream_whose_step_fails_may_be_begun_anew(traffic):
    e = engine()
    id = e.submit(traffic[1][0], sampling=traffic[1][1])
    with failing("verify", ERROR, is_late=True, nth=2), pytest.raises(RuntimeError, match="EXHAUSTED"):
        list(e.stream(id))
    assert joined(list(e.stream(id))) == wanted(traffic[1])


def test_what_an_undone_step_read_of_a_stop_text_is_read_again(traffic):
    """The step that finds it fails after that."""
    e = engine()
    id = e.submit(traffic[1][0], sampling=traffic[1][1])
    with mock.patch.object(Scheduler, "finish", side_effect=ERROR), pytest.raises(RuntimeError, match="EXHAUSTED"):
        list(e.stream(id))
    assert joined(list(e.stream(id))) == wanted(traffic[1])


def test_a_cancelled_request_ends_its_stream(traffic):
    e = engine()
    id = e.submit(traffic[0][0], sampling=traffic[0][1])
    stream = e.stream(id)
    first = next(stream)
    assert e.cancel(id) and [piece.finish_reason for piece in (first, *stream)] == [None, "cancelled"]


def test_text_is_a_prompt_where_there_is_a_tokenizer(traffic):
    e = engine()
    id = e.submit(TOKENIZER.decode(traffic[4][0]), sampling=traffic[4][1])
    assert joined(list(e.stream(id))) == wanted(traffic[4])
    with pytest.raises(ValueError, match="prompt is '12', wanted a sequence of ints: the model has no tokenizer"):
        serving.engine().submit("12", 4)


async def read(stream, n=None):
    """All pieces, or `n` of them, after which it is cancelled."""
    pieces = []
    async for piece in stream:
        pieces.append(piece)
        if len(pieces) == n:
            stream.cancel()
            break
    return pieces


def test_many_coroutines_get_what_each_gets_alone_while_others_go_away_and_steps_fail(traffic):
    async def run():
        e = engine()
        async with AsyncEngine(e) as serving_engine:
            with failing("verify", ERROR, is_late=True, nth=3):
                streams = [await serving_engine.submit(one[0], sampling=one[1]) for one in traffic * 2]
                return e, await asyncio.gather(
                    *(read(one, 1 + i % 2 if i % 5 == 4 else None) for i, one in enumerate(streams))
                )

    e, results = asyncio.run(run())
    for i, (pieces, one) in enumerate(zip(results, traffic * 2, strict=True)):
        if i % 5 == 4 and pieces[-1].finish_reason is None:
            tokens = [token for piece in pieces for token in piece.tokens]
            assert tokens == one[2][: len(tokens)]
        else:
            assert joined(pieces) == wanted(one)
    assert e.pool.n_free == e.pool.n_pages and e.is_idle


def test_an_engine_that_closes_finishes_or_cancels_and_takes_no_more(traffic):
    async def run(finish):
        serving_engine = AsyncEngine(engine())
        with pytest.raises(ValueError, match="submit: prompt is empty"):
            await serving_engine.submit([], 3)
        streams = [await serving_engine.submit(one[0], sampling=one[1]) for one in traffic[:6]]
        for requests, error in (([([1], Sampling())] * 30, BusyError), ([([1], Sampling()), ([], None)], ValueError)):
            with pytest.raises(error, match=r"(\d+ requests would wait, wanted at most 3|prompt is empty)"):
                await serving_engine.submit_all(requests, 3 if len(requests) > 2 else None)
        closing = asyncio.create_task(serving_engine.close(finish=finish))
        await asyncio.sleep(0.05)
        with pytest.raises(ClosedError):
            await serving_engine.submit([1], 3)
        results = await asyncio.gather(*map(read, streams))
        await closing
        assert not serving_engine._thread.is_alive()
        return serving_engine.engine, [joined(one)[2] for one in results]

    for finish in (True, False):
        e, reasons = asyncio.run(run(finish))
        assert e.pool.n_free == e.pool.n_pages
        assert reasons == [wanted(one)[2] for one in traffic[:6]] if finish else "cancelled" in reasons


def test_a_fault_that_stays_ends_its_requests_by_its_name_and_others_are_served_after_it(traffic):
    async def run():
        async with AsyncEngine(engine()) as serving_engine:

            def broken(*arguments, **options):
                raise ERROR

            real, passes.read = passes.read, broken
            try:
                failed = await read(await serving_engine.submit(traffic[0][0], 3))
            finally:
                passes.read = real
            return failed, await read(await serving_engine.submit(traffic[0][0], sampling=traffic[0][1]))

    (failed,), served = asyncio.run(run())
    assert (failed.finish_reason, failed.error) == ("failed", "RuntimeError: RESOURCE_EXHAUSTED: Out of memory")
    assert joined(served) == wanted(traffic[0])


def test_a_fault_that_stays_and_shows_a_step_late_ends_its_requests_too():
    """A chunk that nobody waits for goes well, the next one loses the pages: each time anew, 10 times at most."""
    real, calls = passes.read, itertools.count(1)

    def broken(*arguments, **options):
        result, n = real(*arguments, **options), next(calls)
        if n % 2 == 0 and n <= 20:
            raise ERROR
        return result

    async def run():
        async with AsyncEngine(engine()) as serving_engine:
            with mock.patch.object(passes, "read", broken):
                return await read(await serving_engine.submit([1] * (3 * serving.CHUNK), 3))

    (failed,) = asyncio.run(run())
    assert failed.finish_reason == "failed" and next(calls) == 7  # three times both


def test_after_a_warm_up_no_request_compiles_and_no_page_was_written(traffic):
    e, told = engine(), []
    e.warm_up(lambda *what: told.append(what))

    def programs():
        of_pages = [one.program(e._runner.formats) for one in (passes.read, passes.verify, passes.keep, passes.copy)]
        return [one._cache_size() for one in (*of_pages, passes.choose, passes.logprobs)]

    sizes = programs()
    assert not any(int(layer.counts.sum()) for layer in e.pages)
    ids = [e.submit(one[0], sampling=one[1]) for one in traffic]
    assert len({id: joined(list(e.stream(id))) for id in ids[:1]}) == 1
    serving.finish(e)
    assert sizes == programs()
    assert [done for _, done, _ in told] == [*range(len(told))] and told[-1][0] == "compiled"
