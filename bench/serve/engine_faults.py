"""Faults of steps, drafts, requests and the model's numbers, put into a running engine.

Whatever happens, every other request must get the tokens that it gets without the fault, and every page must come back.
"""

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Container, Iterator, Sequence
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from bench.serve.faults import Result
from hisa_jax import models
from hisa_jax.models import passes
from hisa_jax.models.engine import Engine, Report

Prompts = Sequence[list[int]]
_OUT_OF_MEMORY = RuntimeError("RESOURCE_EXHAUSTED: Out of memory")
_NO_PROMPTS: tuple[Any, ...] = (
    [-1, 5], [1.5, 2.0], [float("nan")], [True], [[1]], [2**40], "text", None, [], np.zeros((2, 2), int), np.ones(2),
)  # fmt: skip


@contextlib.contextmanager
def failing(name: str, error: BaseException, *, is_late: bool = False, nth: int = 1) -> Iterator[None]:
    """A program of `models.passes` raises at its nth call.

    Args:
        name: "read", "verify", "keep" or "copy".
        error: what is raised.
        is_late: after the program has run, so that the pages which it was given are lost; else before.
        nth: from 1.
    """
    # Patched in the module, where the engine looks it up at each call.
    real, calls = getattr(passes, name), itertools.count(1)

    def program(*arguments: Any, **options: Any) -> Any:
        if next(calls) != nth:
            return real(*arguments, **options)
        if is_late:
            real(*arguments, **options)
        raise error

    with mock.patch.object(passes, name, program):
        yield


def with_poison(model: models.Model, token: int) -> models.Model:
    """The same model, but that one token's embedding is NaN."""
    graph, state = nnx.split(model)
    poisoned = nnx.merge(graph, jax.tree.map(lambda x: x, state))
    poisoned.embed[...] = poisoned.embed[...].at[token].set(jnp.nan)
    return poisoned


@dataclasses.dataclass(kw_only=True)
class Run:
    """Requests on an engine, and what came of them.

    Attributes:
        engine: that they are on.
        tokens, failed: new tokens by request; reasons of those that failed.
        errors: what `step` raised.
        reports: of the steps that were done.
    """

    engine: Engine
    tokens: dict[int, list[int]] = dataclasses.field(default_factory=dict)
    failed: dict[int, str] = dataclasses.field(default_factory=dict)
    errors: list[BaseException] = dataclasses.field(default_factory=list)
    reports: list[Report] = dataclasses.field(default_factory=list)

    def step(self) -> None:
        try:
            report = self.engine.step()
        except (Exception, KeyboardInterrupt) as error:
            self.errors.append(error)
        else:
            self.tokens |= report.finished
            self.failed |= report.failed
            self.reports.append(report)
        self.engine.pool.check()

    def finish(self) -> "Run":
        """To the end, all pages given back."""
        for _ in range(10_000):
            if self.engine.is_idle:
                self.engine.release()
                return self
            self.step()
        raise RuntimeError("requests are unfinished after 10,000 steps")


@dataclasses.dataclass(frozen=True)
class Traffic:
    """What is served, with a fault and without.

    Attributes:
        make: an engine, given a draft or a model of the same sizes.
        prompts: of which some begin alike; they are admitted as pages become free.
        n_new: tokens of each.
        right: its tokens without a fault.
    """

    make: Callable[..., Engine]
    prompts: Prompts
    n_new: int
    right: dict[int, list[int]]

    def start(self, engine: Engine) -> Run:
        for prompt in self.prompts:
            engine.submit(prompt, self.n_new, ())
        return Run(engine=engine)

    def result(self, fault: str, outcome: str, error: str, run: Run, but: Container[int] = ()) -> Result:
        """Right if every prompt, but some, has its tokens, no page is held, and there is something to read."""
        wanted = {id: tokens for id, tokens in self.right.items() if id not in but}
        is_right = all(run.tokens.get(id) == tokens for id, tokens in wanted.items())
        is_right &= run.engine.pool.n_free == run.engine.pool.n_pages and bool(error)
        return Result(fault, outcome if is_right else "WRONG", error, is_right)


def inject(make: Callable[..., Engine], prompts: Prompts, n_new: int) -> Iterator[Result]:
    """Every fault in turn, each on a new engine.

    Args:
        make: see `Traffic`.
        prompts: of even tokens, so that an odd one can be made a bad one.
        n_new: new tokens of each.
    """
    traffic = Traffic(make, prompts, n_new, {})
    # Without a fault, on an engine of its own.
    traffic.right.update(traffic.start(make()).finish().tokens)
    yield from _in_steps(traffic)
    yield from _in_drafts(traffic)
    yield _refused(traffic)
    yield _cancelled(traffic)
    yield _changed_by_the_caller(traffic)
    yield _too_big_for_now(traffic)
    yield _not_finite(traffic)


def _in_steps(traffic: Traffic) -> Iterator[Result]:
    for where, name, nth in (("a prompt's chunk", "read", 3), ("a decode step", "verify", 3), ("a copy", "copy", 1)):
        for is_late in (False, True):
            with failing(name, _OUT_OF_MEMORY, is_late=is_late, nth=nth):
                run = traffic.start(traffic.make()).finish()
            fault = f"pages lost in {where}" if is_late else f"out of memory before {where}"
            outcome = "all read again, the same tokens" if is_late else "step undone and done again"
            yield traffic.result(fault, outcome, " ".join(map(str, run.errors)), run)
    run = traffic.start(traffic.make())
    with mock.patch.object(run.engine.scheduler, "extend", side_effect=KeyboardInterrupt):
        run.step()
    run.finish()
    yield traffic.result("an interrupt within a step", "step undone and done again", repr(run.errors[0]), run)


def _in_drafts(traffic: Traffic) -> Iterator[Result]:
    def raising(tokens: Sequence[int], n: int) -> list[int]:
        raise LookupError("nothing known")

    for fault, draft in (
        ("a draft that raises", raising),
        ("a draft of what is no token", lambda tokens, n: [tokens[-1], -1, 2**40, 0.5]),
        ("a draft that is no sequence", lambda tokens, n: 7),
    ):
        run = traffic.start(traffic.make(draft=draft)).finish()
        errors = [error for report in run.reports for error in report.draft_errors.values()]
        yield traffic.result(fault, "tokens as without it, reported", errors[0] if errors else "", run)


def _refused(traffic: Traffic) -> Result:
    run, errors = traffic.start(traffic.make()), []
    for prompt in _NO_PROMPTS:
        try:
            run.engine.submit(prompt, traffic.n_new)
        except ValueError as error:
            errors.append(str(error))
    fault = f"{len(_NO_PROMPTS)} prompts that are none, among good ones"
    shown = errors[0] if len(errors) == len(_NO_PROMPTS) else ""
    return traffic.result(fault, "refused by name", shown, run.finish())


def _cancelled(traffic: Traffic) -> Result:
    """One in each state: decoding, which others share a prefix of; being read; waiting."""
    run = traffic.start(traffic.make())
    scheduler = run.engine.scheduler
    while not any(len(request.tokens) > request.n_prompt + 1 for request in scheduler.running.values()):
        run.step()
    at = sorted(scheduler.running.values(), key=lambda request: len(request.tokens) - request.n_prompt)
    # The one that has made most tokens, the one that has made fewest, the last that waits.
    ids = at[-1].id, at[0].id, next(reversed(scheduler.waiting))
    answers = [run.engine.cancel(id) for id in (*ids, ids[0])]
    error = f"cancel: {answers}" if answers == [True, True, True, False] else ""
    return traffic.result(
        "three cancelled, one of them twice", "pages back, others as before", error, run.finish(), ids
    )


def _changed_by_the_caller(traffic: Traffic) -> Result:
    run, mine = Run(engine=traffic.make()), [np.array(prompt) for prompt in traffic.prompts]
    for prompt in mine:
        run.engine.submit(prompt, traffic.n_new, ())  # type: ignore[arg-type]
        prompt[:] = 0
    while not run.engine.is_idle:
        run.step()
        run.tokens = {id: list(tokens) for id, tokens in run.tokens.items()}
        report = run.reports[-1]
        for part in (*report.finished.values(), *vars(report).values()):
            part.clear()
    return traffic.result("prompts overwritten, reports cleared", "no effect", "both are copies", run.finish())


def _too_big_for_now(traffic: Traffic) -> Result:
    """One that needs more pages than there are beside those of two that run, while a finished one's are kept."""
    run = Run(engine=traffic.make())
    engine, scheduler = run.engine, run.engine.scheduler
    engine.submit(traffic.prompts[0], traffic.n_new, ())
    while not engine.is_idle:
        run.step()
    ids = {0: 0} | {engine.submit(prompt, traffic.n_new, ()): id for id, prompt in enumerate(traffic.prompts[1:3], 1)}
    run.step()
    # Room for all tokens that there may be: more pages than two running requests leave.
    big = engine.submit([1] * (engine.scheduler.max_length - 1), 1, ())
    ids[small := engine.submit(traffic.prompts[3], traffic.n_new, ())] = 3
    run.step()
    is_passed = big in scheduler.waiting and small in scheduler.running and 0 in scheduler.donors
    ids |= {engine.submit(prompt, traffic.n_new, ()): id for id, prompt in enumerate(traffic.prompts[4:], 4)}
    run.finish()
    is_passed &= len(run.tokens.pop(big)) == 1
    run.tokens = {ids[id]: tokens for id, tokens in run.tokens.items()}
    outcome, error = (
        "small ones pass it, kept prefixes stay, its turn comes",
        f"waited for {engine.scheduler.max_length} tokens",
    )
    return traffic.result("a prompt that waits for pages", outcome, error if is_passed else "", run)


def _not_finite(traffic: Traffic) -> Result:
    made = {token for tokens in traffic.right.values() for token in tokens}
    engine = traffic.make()
    # Prompts are of even tokens, so an odd one that nothing makes is read by bad requests alone.
    poison = next(token for token in range(1, engine.model.config.vocab_size, 2) if token not in made)
    run = Run(engine=traffic.make(model=with_poison(engine.model, poison)))
    good, bad = {}, set()
    for id, prompt in enumerate(traffic.prompts):
        bad.add(run.engine.submit([*prompt, poison], traffic.n_new, ()))
        good[run.engine.submit(prompt, traffic.n_new, ())] = id
    run.finish()
    run.tokens = {good[id]: tokens for id, tokens in run.tokens.items() if id in good}
    error = next(iter(run.failed.values())) if run.failed.keys() == bad else ""
    return traffic.result("NaN in every other request's logits", "those failed, others as before", error, run)
