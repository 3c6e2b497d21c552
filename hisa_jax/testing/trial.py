"""A function under test, asked and held against the reference; calls cut into smaller ones."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from hisa_jax.methods import Method, Scan
from hisa_jax.testing import oracle
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
    part = cut(explicit(case), t=at)
    if later == 0:
        return dataclasses.replace(part, query_positions=None)
    if "lengths" in form.takes:
        return dataclasses.replace(part, query_positions=None, lengths=(case.bounds - later).astype(np.int32))
    S = case.k.shape[1] - later
    if S < 1 or not form.takes_size("S", S):
        return None
    return dataclasses.replace(part, query_positions=None, k=case.k[:, :S])


def explicit(case: Case) -> Case:
    return dataclasses.replace(case, query_positions=case.positions.astype(np.int32))
