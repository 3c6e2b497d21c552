"""The contract's promises (docs/contract.md), one by one: a sentence, the cases that could break it, the judgement."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from hisa_jax.methods import BlockSparse, Dsa, Hisa, Method, Scan
from hisa_jax.testing import oracle
from hisa_jax.testing.draw import Draw, with_keys
from hisa_jax.testing.form import Answer, Case, Form, ask, chosen
from hisa_jax.testing.oracle.compare import judge


@dataclasses.dataclass(frozen=True)
class Trial:
    """The function under test, and what it is held against."""

    function: Callable[..., Any]
    form: Form
    method: Method

    def ask(self, case: Case) -> Answer:
        """What the function gives for a case."""
        return ask(self.function, case, self.method)

    def rows(self, case: Case) -> Iterator["Row"]:
        """What it chose, query by query."""
        answer = self.ask(case)
        for b, t in np.ndindex(answer.indices.shape[:2]):
            visible = int(case.visible[b, t])
            raw = answer.indices[b, t]
            count = None if answer.count is None else int(answer.count[b, t])
            yield Row(b, t, int(case.positions[b, t]), visible, raw, chosen(self.form, raw, visible), count)

    def judged(self, case: Case, tolerance: float | None = None, method: Method | None = None) -> str | None:
        """Whether all of it is what the reference chooses; None, or the first sentence that says what is not."""
        return next(filter(None, self.judgements(case, self.ask(case), tolerance, method)), None)

    def judgements(
        self, case: Case, answer: Answer, tolerance: float | None = None, method: Method | None = None
    ) -> Iterator[str | None]:
        """The same of an answer that is there, query by query."""
        method = method or self.method
        reference = oracle.select(case.q, case.k, case.w, method, **case.keywords)
        indices, count = self._in_order(case, answer)
        tolerance = self.form.tolerance if tolerance is None else tolerance
        return judge(reference, tolerance, indices=indices, count=count, may_keep_more=isinstance(method, Scan))

    def _in_order(self, case: Case, answer: Answer) -> tuple[np.ndarray, np.ndarray]:
        """[B, T, topk] ascending and then -1, as the reference has them, and [B, T]."""
        indices = np.full(answer.indices.shape, -1, np.int32)
        count = np.zeros(indices.shape[:2], np.int32)
        for at in np.ndindex(count.shape):
            ids = np.sort(chosen(self.form, answer.indices[at], int(case.visible[at])))
            indices[at][: len(ids)], count[at] = ids, len(ids)
        return indices, count

    def differ(self, case: Case, answer: Answer, other: Case, given: Answer) -> str | None:
        """Whether two answers to the same queries name other tokens, beyond those whose scores nearly tie."""
        sets, others = self._in_order(case, answer)[0], self._in_order(other, given)[0]
        unequal = [at for at in np.ndindex(sets.shape[:2]) if not np.array_equal(sets[at], others[at])]
        if not unequal:
            return None
        whys = [np.array(list(self.judgements(*pair)), object).reshape(sets.shape[:2])
                for pair in ((case, answer), (other, given))]  # fmt: skip
        for at in unequal:
            if whys[0][at] or whys[1][at]:
                one, two = (listed(x[at][x[at] >= 0]) for x in (sets, others))
                return f"query (b={at[0]}, t={at[1]}) at position {case.positions[at]}: {one} becomes {two}"
        return None


@dataclasses.dataclass(frozen=True, eq=False)
class Row:
    """What one query chose: `raw` [topk] as it came, `ids` the tokens in it, `count` if there was one."""

    b: int
    t: int
    position: int
    visible: int
    raw: np.ndarray
    ids: np.ndarray
    count: int | None

    def __str__(self) -> str:
        return f"query (b={self.b}, t={self.t}) at position {self.position}, {self.visible} visible tokens"


def listed(ids: np.ndarray) -> str:
    """Some numbers of a list."""
    text = ", ".join(map(str, ids[:12]))
    return f"[{text}{f', ... {len(ids)} in all' if len(ids) > 12 else ''}]"


def _first(of_row: Callable[[Trial, Case, Row], str | None]) -> Callable[[Trial, Case], str | None]:
    """Of a judgement on a row that of a case."""

    def broken(trial: Trial, case: Case) -> str | None:
        for row in trial.rows(case):
            if why := of_row(trial, case, row):
                return f"{row}: {why}"
        return None

    return broken


# Form.


def _wrong_dtype(trial: Trial, case: Case) -> str | None:
    answer = trial.ask(case)
    for name, array in (("indices", answer.indices), ("count", answer.count)):
        if array is not None and array.dtype != np.int32:
            return f"{name} is {array.dtype}, wanted int32"
    return None


def _not_visible(trial: Trial, case: Case, row: Row) -> str | None:
    late = row.ids[(row.ids > row.position) & (row.ids < case.bounds[row.b])]
    return f"token {late[0]} was chosen, which comes after the query" if len(late) else None


def _outside(trial: Trial, case: Case, row: Row) -> str | None:
    outside = row.ids[(row.ids < 0) | (row.ids >= case.bounds[row.b])]
    return f"{outside[0]} was chosen, and the sequence has {case.bounds[row.b]} tokens" if len(outside) else None


def _twice(trial: Trial, case: Case, row: Row) -> str | None:
    ids, times = np.unique(row.ids, return_counts=True)
    return f"token {ids[times > 1][0]} was chosen {times.max()} times" if len(ids) < len(row.ids) else None


def _not_ascending(trial: Trial, case: Case, row: Row) -> str | None:
    falls = np.flatnonzero(np.diff(row.ids) < 0)
    return f"token {row.ids[falls[0] + 1]} stands after {row.ids[falls[0]]}" if len(falls) else None


def _hole(trial: Trial, case: Case, row: Row) -> str | None:
    filler = np.flatnonzero(row.raw == trial.form.padding)
    is_hole = len(filler) and filler[0] < len(row.ids)
    return f"{trial.form.padding} stands in slot {filler[0]}, before tokens: {listed(row.raw)}" if is_hole else None


def _wrong_count(trial: Trial, case: Case) -> str | None:
    wanted = oracle.select(case.q, case.k, case.w, trial.method, **case.keywords).count
    for row in trial.rows(case):
        if len(row.ids) != wanted[row.b, row.t]:
            return f"{row}: {len(row.ids)} were chosen, wanted {wanted[row.b, row.t]}: {listed(row.raw)}"
        if row.count not in (None, len(row.ids)):
            return f"{row}: count is {row.count}, but {len(row.ids)} were chosen"
    return None


def _not_all(trial: Trial, case: Case, row: Row) -> str | None:
    if row.visible > trial.method.topk:
        return None
    missing = np.setdiff1d(np.arange(row.visible), row.ids)
    return f"token {missing[0]} was left out, and topk is {trial.method.topk}" if len(missing) else None


def _something(trial: Trial, case: Case, row: Row) -> str | None:
    if row.visible == 0 and (len(row.ids) or row.count):
        return f"it sees nothing and chose {listed(row.ids)}, count {row.count}"
    return None


# Choice.


def _judged(trial: Trial, case: Case) -> str | None:
    return trial.judged(case)


def _judged_exactly(trial: Trial, case: Case) -> str | None:
    return trial.judged(case, tolerance=0.0)


def _judged_as_flat(trial: Trial, case: Case) -> str | None:
    return trial.judged(case, method=Dsa(topk=trial.method.topk))


# What decides nothing.


def _future_decides(trial: Trial, case: Case) -> str | None:
    before = trial.ask(case)
    for value in Draw(trial.form, trial.method).extremes:
        k = case.k.copy()
        for b, position in enumerate(case.positions[:, 0]):
            k[b, position + 1 : case.bounds[b]] = value
        after = trial.ask(with_keys(case, k))
        for b, visible in enumerate(case.visible[:, 0]):
            rows = (chosen(trial.form, answer.indices[b, 0], int(visible)) for answer in (before, after))
            one, two = map(np.sort, rows)
            if not np.array_equal(one, two):
                where = f"query (b={b}, t=0) at position {case.positions[b, 0]}"
                return f"{where}: {listed(one)} becomes {listed(two)} where all tokens after it are {value}"
    return None


def _missing_decide(trial: Trial, case: Case) -> str | None:
    before = trial.ask(case)
    for value in Draw(trial.form, trial.method).extremes:
        k = case.k.copy()
        for b, length in enumerate(case.bounds):
            k[b, length:] = value
        changed = with_keys(case, k)
        after = trial.ask(changed)
        for at in np.ndindex(case.visible.shape):
            rows = (chosen(trial.form, answer.indices[at], int(case.visible[at])) for answer in (before, after))
            one, two = map(np.sort, rows)
            if not np.array_equal(one, two):
                where = f"query (b={at[0]}, t={at[1]}), length {case.bounds[at[0]]}"
                return f"{where}: {listed(one)} becomes {listed(two)} where all keys from there on are {value}"
    return None


def _buffer_decides(trial: Trial, case: Case) -> str | None:
    S = int(case.bounds.max())
    if not trial.form.takes_size("S", S) or np.any(case.bounds != S):
        return None
    short = dataclasses.replace(case, k=case.k[:, :S], lengths=None)
    why = trial.differ(short, trial.ask(short), case, trial.ask(case))
    return why and f"{why} where the keys stand in a buffer of {case.k.shape[1]}"


# What does not depend on the others.


def _batch_decides(trial: Trial, case: Case) -> str | None:
    together = trial.ask(case)
    for name, at in [("in reversed order", slice(None, None, -1)), *((f"sequence {b} alone", slice(b, b + 1))
                     for b in range(len(case.q)) if trial.form.takes_size("B", 1))]:  # fmt: skip
        part = cut(case, b=at)
        wanted = together.at(b=at)
        if why := trial.differ(part, wanted, part, trial.ask(part)):
            return f"{why} {name}"
    return None


def _chunks_decide(trial: Trial, case: Case) -> str | None:
    together, T = trial.ask(case), case.q.shape[1]
    for first in range(1, T):
        if not (trial.form.takes_size("T", first) and trial.form.takes_size("T", T - first)):
            continue
        for name, at in (("first", slice(first)), ("last", slice(first, T))):
            part = chunk(case, at, trial.form)
            if part is None:
                continue
            wanted = together.at(t=at)
            if why := trial.differ(cut(_explicit(case), t=at), wanted, part, trial.ask(part)):
                return f"{why} where the {name} {at.stop - (at.start or 0)} queries of {T} are a call of their own"
    return None


def _not_repeated(trial: Trial, case: Case) -> str | None:
    once, again = trial.ask(case), trial.ask(case)
    for b, t in np.argwhere((once.indices != again.indices).any(-1)):
        return f"query (b={b}, t={t}): {listed(once.indices[b, t])} becomes {listed(again.indices[b, t])}"
    if once.count is not None and again.count is not None and np.any(once.count != again.count):
        return "the same indices come with another count"
    return None


def cut(case: Case, *, b: slice = slice(None), t: slice = slice(None)) -> Case:
    """Some sequences, or some queries where positions are given."""
    positions, lengths = case.query_positions, case.lengths
    return Case(
        q=case.q[b, t], k=case.k[b], w=case.w[b, t], query_positions=None if positions is None else positions[b, t],
        lengths=None if lengths is None else lengths[b],
    )  # fmt: skip


def chunk(case: Case, at: slice, form: Form) -> Case | None:
    """Some queries in a row as a call of their own, as a function of this form can be asked; None: it cannot.

    By their positions, else with the sequence ending at the last of them: by its length, or by fewer keys.
    """
    if case.query_positions is not None:
        return cut(case, t=at)
    later = case.q.shape[1] - at.stop
    part = cut(_explicit(case), t=at)
    if later == 0:
        return dataclasses.replace(part, query_positions=None)
    if "lengths" in form.takes:
        return dataclasses.replace(part, query_positions=None, lengths=(case.bounds - later).astype(np.int32))
    S = case.k.shape[1] - later
    if S < 1 or not form.takes_size("S", S):
        return None
    return dataclasses.replace(part, query_positions=None, k=case.k[:, :S])


def _explicit(case: Case) -> Case:
    return dataclasses.replace(case, query_positions=case.positions.astype(np.int32))


# The cases.


def _usual(draw: Draw) -> list[Case]:
    return draw.usual()


def _short(draw: Draw) -> list[Case]:
    topk = draw.method.topk
    return [case for S in (topk, topk // 2 + 1) for case in draw.usual(T=min(5, S), S=S)]


def _of_every_kind(draw: Draw) -> list[Case]:
    return [*draw.usual(), *draw.usual(B=1, T=1, H=1), *draw.usual(T=3, S=draw.wide + 13, H=8, D=64), *_long(draw)]


def _long(draw: Draw, **options: bool) -> list[Case]:
    """More tokens than small sorts and tiles take."""
    return [draw.case(B=1, T=2, S=draw.wide + 400, **options)]


def _negative(draw: Draw) -> list[Case]:
    return [dataclasses.replace(case, w=-np.abs(case.w)) for case in draw.usual()]


def _equal(draw: Draw) -> list[Case]:
    whole = [*draw.usual(whole=True), *_long(draw, whole=True)]
    return [*whole, *(with_keys(case, np.broadcast_to(case.k[:, :1], case.k.shape).copy()) for case in whole)]


def _nan(draw: Draw) -> list[Case]:
    cases = []
    for case in draw.usual():
        S, few = case.k.shape[1], case.k.copy()
        few[:, [S // 50, S // 4, S // 2, S - 1]] = np.nan
        most = case.k.copy()
        most[:, draw.method.topk // 2 + 1 :] = np.nan
        cases += [with_keys(case, few), with_keys(case, most)]
    return cases


def _infinite(draw: Draw) -> list[Case]:
    cases = []
    for value in (np.inf, -np.inf) if draw.form.dtype != "float8_e4m3fn" else ():
        for case in draw.usual():
            k = case.k.copy()
            k[:, :: max(1, k.shape[1] // 7), 0] = value
            cases.append(with_keys(case, k))
    return cases


def _with_lengths(draw: Draw) -> list[Case]:
    return [case for case in draw.usual() if case.lengths is not None]


def _in_a_buffer(draw: Draw) -> list[Case]:
    case = draw.case(S=2 * draw.wide)
    return [draw.lengths(case, draw.form.size("S", draw.wide))] if draw.takes("lengths") else []


def _padding(draw: Draw) -> list[Case]:
    case, cases = draw.case(), []
    if draw.takes("query_positions"):
        cases.append(draw.positions(case, -1, case.k.shape[1] - 1, -1, 3, 0))
    if draw.takes("lengths"):
        cases += [draw.lengths(case, case.k.shape[1], case.q.shape[1] - 2), draw.lengths(case, 0, 1)]
    return cases


def _impossible(draw: Draw) -> list[Case]:
    case, limits, cases = draw.case(), np.iinfo(np.int32), []
    S = case.k.shape[1]
    if draw.takes("query_positions"):
        cases.append(draw.positions(case, -7, limits.min, limits.max, S, S + 1))
    if draw.takes("lengths"):
        cases.append(draw.lengths(case, S + 5000, -3))
    return cases


def _batches(draw: Draw) -> list[Case]:
    cases = draw.usual(B=3)
    return cases if len(cases[0].q) > 1 else []


def _long_enough_to_cut(draw: Draw) -> list[Case]:
    def can_be_cut(case: Case) -> bool:
        T = case.q.shape[1]
        return any(draw.form.takes_size("T", n) and draw.form.takes_size("T", T - n) for n in range(1, T))

    return [case for case in draw.usual(B=1, T=6) if can_be_cut(case)]


def _losing_first_block(draw: Draw) -> list[Case]:
    cases = []
    for case in draw.usual():
        k = case.k.copy()
        first = k[:, : getattr(draw.method, "block_size", 1)]
        first[...] = (-4 * np.abs(first.astype(np.float32))).astype(k.dtype)
        cases.append(with_keys(case, k))
    return cases


def _all_fits(draw: Draw) -> list[Case]:
    method = draw.method
    assert not isinstance(method, Dsa)
    fits = method.block_topk * method.block_size
    return [case for case in draw.usual(S=fits) if case.k.shape[1] <= fits]


# Which are not asked of some forms and methods.


def _unless_masked(form: Form, method: Method) -> str | None:
    return "what a query does not see fills up its row" if form.padding == "masked" else None


def _if_ascending(form: Form, method: Method) -> str | None:
    return "its order is any" if form.order == "any" else None


def _if_it_has_lengths(form: Form, method: Method) -> str | None:
    return None if "lengths" in form.takes else "it takes no lengths"


def _if_it_can_be_padding(form: Form, method: Method) -> str | None:
    return None if form.takes else "it takes neither query_positions nor lengths"


def _if_there_is_infinity(form: Form, method: Method) -> str | None:
    return "float8_e4m3fn has no infinity" if form.dtype == "float8_e4m3fn" else None


def _if_it_has_blocks(form: Form, method: Method) -> str | None:
    return None if isinstance(method, Hisa | BlockSparse) else f"{type(method).__name__} has no blocks"


def _if_it_can_be_flat(form: Form, method: Method) -> str | None:
    can_be = isinstance(method, Scan) or (isinstance(method, Hisa) and method.block_ratio == 1)
    return None if can_be else "it is not made of this method"


class Promise(NamedTuple):
    """One promise.

    Attributes:
        sentence: what is promised.
        cases: inputs that could break it.
        broken: None, or how a case breaks it.
        why_not: None, or why it is not asked of functions of a form and method.
    """

    sentence: str
    cases: Callable[[Draw], Iterable[Case]]
    broken: Callable[[Trial, Case], str | None]
    why_not: Callable[[Form, Method], str | None] = lambda form, method: None


# Those that say why come before those that only notice: the first broken one is named.
PROMISES = {
    "int32": Promise("indices and counts are int32", _usual, _wrong_dtype),
    "causality": Promise("no token after the query is chosen", _usual, _first(_not_visible), _unless_masked),
    "bounds": Promise("nothing outside of the sequence is chosen", _usual, _first(_outside), _unless_masked),
    "no_duplicates": Promise("no token is chosen twice", _usual, _first(_twice)),
    "order": Promise("positions ascend", _usual, _first(_not_ascending), _if_ascending),
    "padding": Promise("what fills up a row comes after all tokens", _usual, _first(_hole), _unless_masked),
    "padding_queries": Promise(
        "a query of no token selects nothing", _padding, _first(_something), _if_it_can_be_padding
    ),
    "count": Promise("exactly min(topk, visible candidates) are chosen, and count says so", _usual, _wrong_count),
    "short_contexts": Promise("up to topk visible tokens, all are chosen", _short, _first(_not_all)),
    "repeat": Promise("the same call gives the same bits", _usual, _not_repeated),
    "future": Promise("no token after a query decides anything", _usual, _future_decides),
    "missing": Promise("no key beyond the length decides anything", _with_lengths, _missing_decide, _if_it_has_lengths),
    "capacity": Promise("a longer buffer of keys changes nothing", _in_a_buffer, _buffer_decides, _if_it_has_lengths),
    "batch": Promise("a sequence's selection does not depend on the batch", _batches, _batch_decides),
    "chunks": Promise("nor on how its queries were cut into calls", _long_enough_to_cut, _chunks_decide),
    "best": Promise("the tokens of the highest scores are chosen", _of_every_kind, _judged),
    "negative_weights": Promise("head weights may be negative", _negative, _judged),
    "ties": Promise("ties go to the lower position", _equal, _judged_exactly),
    "nan": Promise("a NaN score counts as -inf, and -inf is chosen when nothing better is left", _nan, _judged),
    "infinity": Promise("keys may hold infinity", _infinite, _judged, _if_there_is_infinity),
    "kept_blocks": Promise("the first and the last blocks are kept", _losing_first_block, _judged, _if_it_has_blocks),
    "flat_if_all_fits": Promise(
        "where all candidates fit, it is the flat indexer", _all_fits, _judged_as_flat, _if_it_can_be_flat
    ),
    "clipping": Promise(
        "impossible lengths and positions mean the nearest possible", _impossible, _judged, _if_it_can_be_padding
    ),
}
