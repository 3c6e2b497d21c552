"""The form of the long-range tasks to train on: questions of all kinds, dozens in a sequence, at all distances."""

from collections.abc import Callable

import numpy as np

from hisa_jax.models.training.groups import (
    Names,
    chain_lines,
    key_lines,
    passage_lines,
    pick,
    spread,
    table_lines,
    value_lines,
)
from hisa_jax.models.training.lines import Line
from hisa_jax.models.training.samples import Sample, place

SHORTEST = 128  # bytes that hold a statement, its question and some text
_MOST_LINES = 0.6  # of the bytes; the rest is text
_NEAREST = 64  # bytes of the smallest distance drawn log-uniformly
_ASKED_AGAIN = 0.35  # of the questions
_TRIES = 8  # groups that do not fit before the sample is called full
_NEVER_ASKED = 0.25  # statements for each one asked

_Placed = list[tuple[float, Line]]


def dense_mix(rng: np.random.Generator, filler: np.ndarray, length: int | None = None) -> Sample:
    """Statements and questions of all kinds all through a text: 40 to 100 questions in 16,384 bytes, 8 to 20 in 2,048.

    Distances are drawn first, half of them uniformly up to the whole length and half log-uniformly, then where the
    pair stands: so a sequence supervises retrieval from everywhere. Some statements are asked about several times,
    some never; no question comes before what it needs, no name twice.

    Args:
        filler: uint8 [at least length], the text around; its end gives way to the lines.
        length: bytes of the sample, at least 128. Default: those of `filler`.

    Raises: ValueError: a length out of range.
    """
    length = filler.size if length is None else length
    if not SHORTEST <= length <= filler.size:
        raise ValueError(f"dense_mix: length is {length}, wanted {SHORTEST} to {filler.size}, the bytes of filler")
    # The exponent makes 5 times the questions of 8 times the length: short samples are denser.
    wanted = max(1, round(int(rng.integers(40, 101)) * (length / 16384) ** 0.774))
    # No group takes more than 8 of a name for a question; groups that do not fit lose theirs.
    n_names = 8 * (wanted + _TRIES)
    names = Names(rng, keys=n_names, values=n_names, variables=n_names)
    placed: _Placed = []
    room, questions, misses = _MOST_LINES * length, 0, 0
    while questions < wanted and misses < _TRIES:
        group = _GROUPS[int(np.searchsorted(_SHARES, rng.random()))](rng, names, length, wanted - questions)
        size = sum(len(line.text) for _, line in group)
        if size > room:
            misses += 1
            continue
        placed += group
        room -= size
        questions += sum(bool(line.kind) for _, line in group)
    return place("dense_mix", filler[:length], placed or _mixed_keys(rng, names, length, 1, never_asked=0.0))


def _distance(rng: np.random.Generator, length: int) -> float:
    """As a share of the length."""
    share = rng.random()
    return share if rng.random() < 0.5 else (_NEAREST / length) ** share


def _pair(rng: np.random.Generator, length: int) -> tuple[float, float]:
    """Where a statement and its question stand."""
    distance = _distance(rng, length)
    start = rng.random() * (1 - distance)
    return start, start + distance


def _times(rng: np.random.Generator, most: int) -> int:
    times = 1
    while times < most and rng.random() < _ASKED_AGAIN:
        times += 1
    return times


def _later(rng: np.random.Generator, start: float, n: int) -> list[float]:
    return (start + (1 - start) * rng.random(n)).tolist()


def _again(question: Line) -> Line:
    """The same question as another line."""
    return Line(question.text, question.kind, question.answer_at, question.needs, question.hops)


def _asked(rng: np.random.Generator, start: float, end: float, question: Line, most: int) -> _Placed:
    """A question at `end`, some more times anywhere after `start`."""
    more = _later(rng, start, _times(rng, most) - 1)
    return [(end, question), *((position, _again(question)) for position in more)]


def _mixed_keys(
    rng: np.random.Generator, names: Names, length: int, most: int, never_asked: float = _NEVER_ASKED
) -> _Placed:
    start, end = _pair(rng, length)
    n_keys = 2 if rng.random() < never_asked else 1
    stated, (question,) = key_lines(names, n_keys, [0], "multikey")
    others = [(rng.random(), line) for line in stated[1:]]
    return [(start, stated[0]), *others, *_asked(rng, start, end, question, most)]


def _mixed_table(rng: np.random.Generator, names: Names, length: int, most: int) -> _Placed:
    start, end = _pair(rng, length)
    n_questions = min(most, int(rng.integers(2, 9)))
    largest = max(5, length // 256)
    n_keys = min(8 * n_questions, int(4 * (largest / 4) ** rng.random()))
    rows, questions = table_lines(names, n_keys, pick(rng, n_keys, n_questions))
    ends = [end, *_later(rng, start, n_questions - 1)]
    return [*((start, row) for row in rows), *zip(ends, questions, strict=True)]


def _mixed_values(rng: np.random.Generator, names: Names, length: int, most: int) -> _Placed:
    start, end = _pair(rng, length)
    stated, question = value_lines(names, int(rng.integers(1, 9)))
    return [*_within(rng, start, end, stated), *_asked(rng, end, end, question, most)]


def _mixed_passage(rng: np.random.Generator, names: Names, length: int, most: int) -> _Placed:
    start, end = _pair(rng, length)
    longest = min(32, max(5, length // 128))
    stated, question = passage_lines(rng, names, int(rng.integers(4, longest + 1)))
    return [(start, stated), *_asked(rng, start, end, question, most)]


def _mixed_chain(rng: np.random.Generator, names: Names, length: int, most: int) -> _Placed:
    start, end = _pair(rng, length)
    hops = int(rng.integers(1, 5))
    stated, questions = chain_lines(names, hops)
    n_questions = min(most, int(rng.integers(1, hops + 1)))
    # The last link is asked for first, so that chains of all lengths are.
    ends = [end, *_later(rng, end, n_questions - 1)]
    return [*_within(rng, start, end, stated), *zip(ends, questions[::-1], strict=False)]


def _within(rng: np.random.Generator, start: float, end: float, stated: list[Line]) -> _Placed:
    """The first line at `start`, the others in order before `end`."""
    others = spread(rng, stated[1:])
    return [(start, stated[0]), *((start + (end - start) * position, line) for position, line in others)]


_GROUPS: tuple[Callable[[np.random.Generator, Names, int, int], _Placed], ...] = (
    _mixed_keys, _mixed_table, _mixed_values, _mixed_passage, _mixed_chain,
)  # fmt: skip
_SHARES = np.cumsum([0.42, 0.1, 0.13, 0.15])  # of the groups; chains are the rest
