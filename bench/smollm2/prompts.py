"""Questions about lines hidden in a long text: a code alone, one of many alike, several of one name, a passage.

The forms are those that the model itself, with dense attention, answers nearly always at 8K: a question repeats the
start of its line to the letter, names are long and distinct, answers are common words.
"""

import dataclasses
import random
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

_WORDS = """
    orchard window silver copper garden bridge castle forest harbor island jacket kitchen ladder mirror needle ocean
    pencil rabbit saddle temple tunnel valley violin wagon winter yellow anchor basket candle desert engine feather
    guitar hammer iron jungle kettle lemon magnet novel orange pepper quilt river shadow ticket uncle velvet whistle
    blanket cotton dragon eagle fabric giant honey insect jewel knife lantern marble napkin olive parrot rocket
    spider tiger umbrella village walnut zebra apple butter camel diamond elbow falcon grape hotel
"""
_NAMES = """
    Amber Basil Cedar Delta Ember Fable Gamma Harbor Indigo Jasper Kestrel Lotus Maple Nectar Onyx Pepper Quartz
    Raven Sage Tundra Umbra Velvet Willow Xenon Yarrow Zephyr Anchor Beacon Copper Dragon Eagle Falcon
"""
WORDS, NAMES = tuple(_WORDS.split()), tuple(_NAMES.split())
_EDGE = 64  # tokens at the start and before the questions without a line


class Line(NamedTuple):
    """A line of the text, the question that repeats its start, and what must follow."""

    statement: str
    question: str
    answer: str


class Question(NamedTuple):
    """Tokens first .. end - 1 of a prompt are the answer; `kind` is the number of its form."""

    kind: int
    first: int
    end: int


class Prompts(NamedTuple):
    """`tokens` uint16 [n, T]; `questions` int32 [n, m, 3], as `Question`."""

    tokens: np.ndarray
    questions: np.ndarray


@dataclasses.dataclass(frozen=True)
class Form:
    """A kind of question: `lines` draws the statements of a prompt, of which `asked` are asked for."""

    name: str
    asked: int
    lines: Callable[[random.Random], list[Line]]


def _line(start: str, answer: str) -> Line:
    return Line(f"\n{start} {answer}\n", f"\n{start}", f" {answer}")


def _draw(rng: random.Random, names: int, words: int) -> tuple[list[str], list[str]]:
    return rng.sample(NAMES, names), rng.sample(WORDS, words)


def _code(rng: random.Random) -> str:
    return "".join(rng.choice("0123456789") for _ in range(3))


def _single(rng: random.Random) -> list[Line]:
    (name,), words = _draw(rng, 1, 3)
    return [_line(f"The secret words of {name} are", ", ".join(words) + ".")]


def _list(n: int, of: int) -> Callable[[random.Random], list[Line]]:
    def lines(rng: random.Random) -> list[Line]:
        names, words = _draw(rng, 2 * n, n * of)
        return [
            _line(f"The words of {names[2 * i]} {names[2 * i + 1]} are", ", ".join(words[of * i : of * i + of]) + ".")
            for i in range(n)
        ]

    return lines


def _coded(n: int, of: int) -> Callable[[random.Random], list[Line]]:
    def lines(rng: random.Random) -> list[Line]:
        names, words = _draw(rng, n, n * of)
        return [_line(f"{name}-{_code(rng)}:", ", ".join(words[of * i : of * i + of])) for i, name in enumerate(names)]

    return lines


def _keyed(n: int, of: int) -> Callable[[random.Random], list[Line]]:
    def lines(rng: random.Random) -> list[Line]:
        words = rng.sample(WORDS, n * (of + 1))
        return [
            _line(" ".join(words[(of + 1) * i : (of + 1) * i + of]) + " =", words[(of + 1) * i + of]) for i in range(n)
        ]

    return lines


def _ordinal(n: int, of: int) -> Callable[[random.Random], list[Line]]:
    def lines(rng: random.Random) -> list[Line]:
        names, words = _draw(rng, 2 * n, 4 * n * of)
        return [
            _line(
                f"The {ordinal} list of {names[2 * i]} {names[2 * i + 1]} is",
                ", ".join(words[of * (4 * i + j) : of * (4 * i + j + 1)]) + ".",
            )
            for i in range(n)
            for j, ordinal in enumerate(("first", "second", "third", "fourth"))
        ]

    return lines


def _numbered(n: int, of: int) -> Callable[[random.Random], list[Line]]:
    def lines(rng: random.Random) -> list[Line]:
        names, words = _draw(rng, n, 4 * n * of)
        codes = [_code(rng) for _ in names]
        return [
            _line(f"{name}-{code}-{j + 1}:", ", ".join(words[of * (4 * i + j) : of * (4 * i + j + 1)]))
            for i, (name, code) in enumerate(zip(names, codes, strict=True))
            for j in range(4)
        ]

    return lines


FORMS = (
    Form("single", 1, _single),
    Form("multi-key", 4, _list(8, 4)),
    Form("multi-key, codes", 4, _coded(8, 3)),
    Form("multi-value", 4, _numbered(2, 3)),
)
COPY = "copy"
KINDS = (*(form.name for form in FORMS), COPY)


def make_prompts(
    tokenizer: Any, filler: np.ndarray, T: int, n: int, forms: Sequence[Form] = FORMS, copied: int = 64, hint: int = 16
) -> Prompts:
    """Prompts of T tokens: lines of all forms in a text of `filler`, and a passage; at the end their questions.

    Args:
        copied: tokens of the passage; 0: none.
        hint: how many of them stand again at the end, before the rest is asked for.
    """
    made = [_prompt(tokenizer, filler, T, random.Random(100 + i), forms, copied, hint) for i in range(n)]
    return Prompts(
        np.array([tokens for tokens, _ in made], np.uint16), np.array([questions for _, questions in made], np.int32)
    )


def _prompt(
    tokenizer: Any, filler: np.ndarray, T: int, rng: random.Random, forms: Sequence[Form], copied: int, hint: int
) -> tuple[list[int], list[Question]]:
    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False).ids

    pieces, asked = [], []
    for kind, form in enumerate(forms):
        lines = form.lines(rng)
        pieces += [encode(line.statement) for line in lines]
        asked += [(kind, encode(line.question), encode(line.answer)) for line in rng.sample(lines, form.asked)]
    if copied:
        start = rng.randrange(len(filler) - copied)
        passage = filler[start : start + copied].tolist()
        pieces.append([*encode("\n\n"), *passage, *encode("\n\n")])
        asked.append((len(forms), [*encode("\n\n"), *passage[:hint]], passage[hint:]))
    rng.shuffle(asked)
    end: list[int] = []
    spans = []
    for kind, question, answer in asked:
        first = len(end) + len(question)
        spans.append((kind, first, first + len(answer)))
        end += [*question, *answer, *encode("\n")]
    rng.shuffle(pieces)
    room = T - len(end) - sum(map(len, pieces))
    if room < 2 * _EDGE + len(pieces):
        raise ValueError(f"make_prompts: {T} tokens leave {room} for text, wanted at least {2 * _EDGE + len(pieces)}")
    start = rng.randrange(len(filler) - room)
    text = filler[start : start + room].tolist()
    tokens: list[int] = []
    last = 0
    for cut, piece in zip(sorted(rng.sample(range(_EDGE, room - _EDGE), len(pieces))), pieces, strict=True):
        tokens += [*text[last:cut], *piece]
        last = cut
    tokens += text[last:]
    questions = [Question(kind, len(tokens) + first, len(tokens) + last) for kind, first, last in spans]
    return [*tokens, *end], questions
