"""How a case breaks a promise: None, or the sentence that says so. `promises.py` names them."""

import dataclasses
from collections.abc import Callable

import numpy as np

from hisa_jax.methods import flat_of
from hisa_jax.testing import oracle
from hisa_jax.testing.draw import Draw, with_keys
from hisa_jax.testing.form import Answer, Case, chosen
from hisa_jax.testing.trial import Row, Trial, chunk, cut, explicit, listed


def by_row(of_row: Callable[[Trial, Case, Row], str | None]) -> Callable[[Trial, Case], str | None]:
    """Of a judgement on a row that of a case."""

    def broken(trial: Trial, case: Case) -> str | None:
        for row in trial.rows(case):
            if why := of_row(trial, case, row):
                return f"{row}: {why}"
        return None

    return broken


# Form.


def wrong_dtype(trial: Trial, case: Case) -> str | None:
    answer = trial.ask(case)
    for name, array in (("indices", answer.indices), ("count", answer.count)):
        if array is not None and array.dtype != np.int32:
            return f"{name} is {array.dtype}, wanted int32"
    return None


@by_row
def not_visible(trial: Trial, case: Case, row: Row) -> str | None:
    late = row.ids[(row.ids > row.position) & (row.ids < case.bounds[row.b])]
    return f"token {late[0]} was chosen, which comes after the query" if len(late) else None


@by_row
def outside(trial: Trial, case: Case, row: Row) -> str | None:
    outside = row.ids[(row.ids < 0) | (row.ids >= case.bounds[row.b])]
    return f"{outside[0]} was chosen, and the sequence has {case.bounds[row.b]} tokens" if len(outside) else None


@by_row
def twice(trial: Trial, case: Case, row: Row) -> str | None:
    ids, times = np.unique(row.ids, return_counts=True)
    return f"token {ids[times > 1][0]} was chosen {times.max()} times" if len(ids) < len(row.ids) else None


@by_row
def not_ascending(trial: Trial, case: Case, row: Row) -> str | None:
    falls = np.flatnonzero(np.diff(row.ids) < 0)
    return f"token {row.ids[falls[0] + 1]} stands after {row.ids[falls[0]]}" if len(falls) else None


@by_row
def hole(trial: Trial, case: Case, row: Row) -> str | None:
    filler = np.flatnonzero(row.raw == trial.form.padding)
    is_hole = len(filler) and filler[0] < len(row.ids)
    return f"{trial.form.padding} stands in slot {filler[0]}, before tokens: {listed(row.raw)}" if is_hole else None


def wrong_count(trial: Trial, case: Case) -> str | None:
    wanted = oracle.select(case.q, case.k, case.w, trial.method, **case.keywords).count
    for row in trial.rows(case):
        if len(row.ids) != wanted[row.b, row.t]:
            return f"{row}: {len(row.ids)} were chosen, wanted {wanted[row.b, row.t]}: {listed(row.raw)}"
        if row.count not in (None, len(row.ids)):
            return f"{row}: count is {row.count}, but {len(row.ids)} were chosen"
    return None


@by_row
def not_all(trial: Trial, case: Case, row: Row) -> str | None:
    if row.visible > trial.method.topk:
        return None
    missing = np.setdiff1d(np.arange(row.visible), row.ids)
    return f"token {missing[0]} was left out, and topk is {trial.method.topk}" if len(missing) else None


@by_row
def something(trial: Trial, case: Case, row: Row) -> str | None:
    if row.visible == 0 and (len(row.ids) or row.count):
        return f"it sees nothing and chose {listed(row.ids)}, count {row.count}"
    return None


# Choice.


def judged(trial: Trial, case: Case) -> str | None:
    return trial.judged(case)


def judged_exactly(trial: Trial, case: Case) -> str | None:
    return trial.judged(case, tolerance=0.0)


def judged_as_flat(trial: Trial, case: Case) -> str | None:
    return trial.judged(case, method=flat_of(trial.method))


# What decides nothing.


def future_decides(trial: Trial, case: Case) -> str | None:
    before = trial.ask(case)
    for value in Draw(trial.form, trial.method).extremes:
        k = case.k.copy()
        for b, position in enumerate(case.positions[:, 0]):
            k[b, position + 1 : case.bounds[b]] = value
        after = trial.ask(with_keys(case, k))
        for b in range(len(case.visible)):
            if (change := _change(trial, case, (b, 0), before, after)) is not None:
                where = f"query (b={b}, t=0) at position {case.positions[b, 0]}"
                return f"{where}: {change} where all tokens after it are {value}"
    return None


def missing_decide(trial: Trial, case: Case) -> str | None:
    before = trial.ask(case)
    for value in Draw(trial.form, trial.method).extremes:
        k = case.k.copy()
        for b, length in enumerate(case.bounds):
            k[b, length:] = value
        changed = with_keys(case, k)
        after = trial.ask(changed)
        for at in np.ndindex(case.visible.shape):
            if (change := _change(trial, case, at, before, after)) is not None:
                where = f"query (b={at[0]}, t={at[1]}), length {case.bounds[at[0]]}"
                return f"{where}: {change} where all keys from there on are {value}"
    return None


def _change(trial: Trial, case: Case, at: tuple[int, ...], before: Answer, after: Answer) -> str | None:
    """None, or how what a query chooses differs."""
    rows = (chosen(trial.form, answer.indices[at], int(case.visible[at])) for answer in (before, after))
    one, two = map(np.sort, rows)
    return None if np.array_equal(one, two) else f"{listed(one)} becomes {listed(two)}"


def buffer_decides(trial: Trial, case: Case) -> str | None:
    S = int(case.bounds.max())
    if not trial.form.takes_size("S", S) or np.any(case.bounds != S):
        return None
    short = dataclasses.replace(case, k=case.k[:, :S], lengths=None)
    why = trial.differ(short, trial.ask(short), case, trial.ask(case))
    return why and f"{why} where the keys stand in a buffer of {case.k.shape[1]}"


# What does not depend on the others.


def batch_decides(trial: Trial, case: Case) -> str | None:
    together = trial.ask(case)
    for name, at in [("in reversed order", slice(None, None, -1)), *((f"sequence {b} alone", slice(b, b + 1))
                     for b in range(len(case.q)) if trial.form.takes_size("B", 1))]:  # fmt: skip
        part = cut(case, b=at)
        wanted = together.at(b=at)
        if why := trial.differ(part, wanted, part, trial.ask(part)):
            return f"{why} {name}"
    return None


def chunks_decide(trial: Trial, case: Case) -> str | None:
    together, T = trial.ask(case), case.q.shape[1]
    for first in range(1, T):
        if not (trial.form.takes_size("T", first) and trial.form.takes_size("T", T - first)):
            continue
        for name, at in (("first", slice(first)), ("last", slice(first, T))):
            part = chunk(case, at, trial.form)
            if part is None:
                continue
            wanted = together.at(t=at)
            if why := trial.differ(cut(explicit(case), t=at), wanted, part, trial.ask(part)):
                return f"{why} where the {name} {at.stop - (at.start or 0)} queries of {T} are a call of their own"
    return None


def not_repeated(trial: Trial, case: Case) -> str | None:
    once, again = trial.ask(case), trial.ask(case)
    for b, t in np.argwhere((once.indices != again.indices).any(-1)):
        return f"query (b={b}, t={t}): {listed(once.indices[b, t])} becomes {listed(again.indices[b, t])}"
    if once.count is not None and again.count is not None and np.any(once.count != again.count):
        return "the same indices come with another count"
    return None
