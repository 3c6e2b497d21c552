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
    Amber Basil Cedar Delta Ember Fable Gamma Harbor Indigo Jasper Kestrel Lotus Maple Nectar Onyx Pepper Quartz Raven
    Sage Tundra Umbra Velvet Willow Xenon Yarrow Zephyr Anchor Beacon Copper Dragon Eagle Falcon Garnet Hazel Iris
    Juniper Karma Laurel Meadow Nimbus Orchid Prairie Quill Ripple Saffron Thistle Ultra Violet Walnut Yonder Zenith
    Aspen Birch Comet Dune Echo Fern Glacier Heron Ivory
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
    """`tokens` uint16 [n, T]; `questions` int32 [n, m, 3], as `Question`; `choices` uint16 [n, c].

    The choices are the words that a prompt's lines end with, one token each.
    """

    tokens: np.ndarray
    questions: np.ndarray
    choices: np.ndarray


@dataclasses.dataclass(frozen=True)
class Form:
    """A kind of question.

    Attributes:
        asked: how many of its lines are asked for.
        names, words: how many of either its lines take.
        lines: from names and words that no other line has.
        times: how often each line is stated.
        reach: the lines stand in the last so many tokens of the text.
    """

    name: str
    asked: int
    names: int
    words: int
    lines: Callable[[random.Random, list[str], list[str]], list[Line]]
    times: int = 1
    reach: int = 8192


def _line(start: str, answer: str) -> Line:
    return Line(f"\n{start} {answer}\n", f"\n{start}", f" {answer}")


def _single(rng: random.Random, names: list[str], words: list[str]) -> list[Line]:
    """Four lines, each unlike all others."""
    starts = (
        f"The magic word that opens the cave of {names[0]} is", f"{names[1]} keeps the treasure under the",
        f"The secret password of agent {names[2]} is", f"Every morning {names[3]} sings about the",
    )  # fmt: skip
    return [_line(start, word) for start, word in zip(starts, words, strict=False)]


def _multi_key(rng: random.Random, names: list[str], words: list[str]) -> list[Line]:
    """Eight lines with a key of four names each."""
    return [_line(" ".join(names[4 * i : 4 * i + 4]) + ":", words[i]) for i in range(8)]


def _multi_value(rng: random.Random, names: list[str], words: list[str]) -> list[Line]:
    """Two pairs of names with four words each, told apart by a second pair."""
    pairs = [" ".join(names[2 * i : 2 * i + 2]) for i in range(10)]
    return [_line(f"{pairs[5 * i]} {pairs[5 * i + 1 + j]}:", words[4 * i + j]) for i in range(2) for j in range(4)]


FORMS = (
    Form("single", 4, 4, 4, _single, times=2, reach=1024),
    Form("multi-key", 4, 32, 8, _multi_key, times=4, reach=1024),
    Form("multi-value", 4, 20, 8, _multi_value, times=4, reach=1024),
)
COPY = "copy"
KINDS = (*(form.name for form in FORMS), COPY)


def make_prompts(
    tokenizer: Any,
    filler: np.ndarray,
    T: int,
    n: int,
    forms: Sequence[Form] = FORMS,
    copied: int = 64,
    hint: int = 16,
) -> Prompts:
    """Prompts of T tokens: lines of all forms in a text of `filler`, and a passage; at the end their questions.

    Args:
        copied: tokens of the passage; 0: none.
        hint: how many of them stand again at the end, before the rest is asked for.
    """
    made = [_prompt(tokenizer, filler, T, random.Random(100 + i), forms, copied, hint) for i in range(n)]
    tokens, questions, choices = zip(*made, strict=True)
    return Prompts(np.array(tokens, np.uint16), np.array(questions, np.int32), np.array(choices, np.uint16))


def _prompt(
    tokenizer: Any,
    filler: np.ndarray,
    T: int,
    rng: random.Random,
    forms: Sequence[Form],
    copied: int,
    hint: int,
) -> tuple[list[int], list[Question], list[int]]:
    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False).ids

    pieces, asked, choices = [], [], []  # of a piece: how far from the end it stands at most, and its tokens
    names, words = rng.sample(NAMES, len(NAMES)), rng.sample(WORDS, len(WORDS))
    for kind, form in enumerate(forms):
        lines = form.lines(rng, names, words)
        names, words = names[form.names :], words[form.words :]
        pieces += [(form.reach, encode(line.statement)) for line in lines for _ in range(form.times)]
        choices += [encode(line.answer)[0] for line in lines]
        asked += [(kind, encode(line.question), encode(line.answer)) for line in rng.sample(lines, form.asked)]
    if copied:
        start = rng.randrange(len(filler) - copied)
        passage = filler[start : start + copied].tolist()
        pieces.append((T, [*encode("\n\n"), *passage, *encode("\n\n")]))
        asked.append((len(forms), [*encode("\n\n"), *passage[:hint]], passage[hint:]))
    rng.shuffle(asked)
    end: list[int] = []
    spans = []
    for kind, question, answer in asked:
        first = len(end) + len(question)
        spans.append((kind, first, first + len(answer)))
        end += [*question, *answer, *encode("\n")]
    room = T - len(end) - sum(len(piece) for _, piece in pieces)
    if room < 2 * _EDGE + len(pieces):
        raise ValueError(f"make_prompts: {T} tokens leave {room} for text, wanted at least {2 * _EDGE + len(pieces)}")
    start = rng.randrange(len(filler) - room)
    text = filler[start : start + room].tolist()
    cuts = [(rng.randrange(max(_EDGE, room - reach), room - _EDGE), piece) for reach, piece in pieces]
    tokens: list[int] = []
    last = 0
    for cut, piece in sorted(cuts):
        tokens += [*text[last:cut], *piece]
        last = cut
    tokens += text[last:]
    questions = [Question(kind, len(tokens) + first, len(tokens) + last) for kind, first, last in spans]
    return [*tokens, *end], questions, choices
