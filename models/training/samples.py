"""Lines put into a text: the sample that this makes, and where its questions stand."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from hisa_jax.models.training.lines import Line

_LINE_END = ord("\n")
_SNAP = 200  # bytes a line moves at most to stand between two lines of the text


@dataclasses.dataclass(frozen=True)
class Question:
    """Where in a sample a question stands.

    Attributes:
        kind: its task.
        start, answer, stop: where its line starts, where its answer starts, and one past its answer.
        needs: start and stop of each statement that holds the answer.
        hops: how many of them have to be followed, one after the other.
    """

    kind: str
    start: int
    answer: int
    stop: int
    needs: tuple[tuple[int, int], ...]
    hops: int = 1

    @property
    def distance(self) -> int:
        """Bytes from the first statement it needs to its answer."""
        return self.answer - min(start for start, _ in self.needs)


@dataclasses.dataclass(frozen=True, eq=False)
class Sample:
    """A text with its questions.

    Attributes:
        tokens: uint8 [length].
        is_answer: bool [length], the bytes of answers: each is to be predicted from those before it.
        is_key: bool [length], the statements that some question needs: what an indexer has to find.
        questions: in their order.
    """

    tokens: np.ndarray
    is_answer: np.ndarray
    is_key: np.ndarray
    questions: tuple[Question, ...]


def place(task: str, filler: np.ndarray, placed: Sequence[tuple[float, Line]]) -> Sample:
    """Puts lines between those of a text.

    Args:
        task: for the error.
        filler: uint8 [length]; its end gives way to the lines, so that the sample is as long.
        placed: lines and where they stand, 0 the start and 1 the end; those at the same place keep their order.

    Raises: ValueError: more lines than the length holds.
    """
    placed = sorted(placed, key=lambda pair: pair[0])
    rest = filler.size - sum(len(line.text) for _, line in placed)
    if rest < 0:
        raise ValueError(
            f"{task}: its {len(placed)} lines take {filler.size - rest} bytes, wanted at most {filler.size}, "
            "the length of filler"
        )
    offsets = _between_lines(filler[:rest], np.array([int(position * rest) for position, _ in placed]))
    text, pieces, starts, before, size = filler.tobytes(), [], {}, 0, 0
    for offset, (_, line) in zip(offsets.tolist(), placed, strict=True):
        starts[line] = offset + size
        pieces += [text[before:offset], line.text]
        before, size = offset, size + len(line.text)
    tokens = np.frombuffer(b"".join([*pieces, text[before:rest]]), np.uint8)
    is_answer, is_key = np.zeros(tokens.size, bool), np.zeros(tokens.size, bool)
    questions = []
    for _, line in placed:
        if line.kind:
            start = starts[line]
            needs = tuple((starts[needed], starts[needed] + len(needed.text)) for needed in line.needs)
            asked = Question(line.kind, start, start + line.answer_at, start + len(line.text) - 1, needs, line.hops)
            is_answer[asked.answer : asked.stop] = True
            for first, stop in needs:
                is_key[first:stop] = True
            questions.append(asked)
    return Sample(tokens, is_answer, is_key, tuple(questions))


def _between_lines(text: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Offsets moved up to the next start of a line if one is near; their order stays."""
    starts = np.flatnonzero(text == _LINE_END) + 1
    if not starts.size:
        return offsets
    following = starts[np.minimum(np.searchsorted(starts, offsets), starts.size - 1)]
    gaps = following - offsets
    return np.where((gaps >= 0) & (gaps <= _SNAP), following, offsets)
