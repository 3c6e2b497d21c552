"""Needle tasks: values stated somewhere in a long text, and a question for one at its end.

Needles and questions are lines as `models.training.lines` has them, on which the shipped model was trained, or
sentences for other models. Nothing is downloaded: the text is the caller's, or Python's standard library.
"""

import dataclasses
import functools
import re
import sysconfig
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hisa_jax.models.config import read_config
from hisa_jax.models.tokens import Tokenizer, load_tokenizer
from hisa_jax.models.training.lines import draw_keys, draw_values

LENGTHS = (4096,)
QUESTIONS = 20
STYLES = ("lines", "sentences")
_CHARACTERS = 2**24  # of the text; no more of it is read
_ANSWER = 64  # tokens that are left for the answer
_SEVERAL = 4  # values of a key, questions of a text
_MOST_KEYS = 64


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of task.

    Attributes:
        n_keys: keys of a text, from its length in tokens.
        n_values: values of each.
        n_questions: of a text, each about a key of its own; each is a question of the task.
    """

    n_keys: Callable[[int], int] = lambda length: 1
    n_values: int = 1
    n_questions: int = 1


KINDS = {
    "single": Kind(),
    "multikey": Kind(n_keys=lambda length: max(2, min(_MOST_KEYS, length // 256))),
    "multivalue": Kind(n_values=_SEVERAL),
    "multiquery": Kind(n_keys=lambda length: _SEVERAL, n_questions=_SEVERAL),
}


def questions(
    kind: str,
    *,
    checkpoint: str,
    lengths: Sequence[int] = LENGTHS,
    n: int = QUESTIONS,
    text: str | None = None,
    style: str = "lines",
    seed: int = 0,
) -> list[dict[str, Any]]:
    """The questions of a task.

    Args:
        kind: "single": one key, one value. "multikey": up to 64 keys alike, one is asked for. "multivalue": a key of
            four values, all are asked for. "multiquery": four keys in a text, each asked for in a question of its own.
        checkpoint: folder of the model whose tokens are counted.
        lengths: of prompt and answer together, in tokens.
        n: questions of each length; the depths of their needles are spread evenly.
        text: a file, or a folder with files, in UTF-8, that needles are hidden in. Default: the standard library's
            sources.
        style: "lines" or "sentences".
        seed: of keys, values and places.

    Returns: `input`, `outputs`, `max_length`, `depth`, `text` (its number: questions of one share it), a dict each.
    Raises: ValueError: an unknown kind or style, a length without room for the needles, a text that is too short.
        FileNotFoundError: no such text.
    """
    if kind not in KINDS:
        raise ValueError(f"needles: kind is {kind!r}, wanted one of {', '.join(KINDS)}")
    if style not in STYLES:
        raise ValueError(f"needles: style is {style!r}, wanted one of {', '.join(STYLES)}")
    if n < 1 or not lengths or min(lengths) < 1:
        raise ValueError(f"needles: n={n}, lengths={list(lengths)}, wanted at least 1")
    tokenizer = load_tokenizer(checkpoint, read_config(checkpoint).vocab_size)
    hay = _Hay(tokenizer, _read_text(text))
    found = []
    for length in lengths:
        of_length, n_texts = [], -(-n // KINDS[kind].n_questions)
        for i in range(n_texts):
            rng = np.random.default_rng([seed, length, i, list(KINDS).index(kind)])
            of_length += _of_text(KINDS[kind], hay, length, (i + 0.5) / n_texts, style, rng, i)
        found += of_length[:n]
    return found


def found_in(answer: str, wanted: Sequence[str]) -> float:
    """The share of the wanted values that an answer names."""
    named = set(re.findall(r"\w+", answer))
    return sum(value in named for value in wanted) / len(wanted)


class _Hay:
    """A text as tokens, of which prompts take parts."""

    def __init__(self, tokenizer: Tokenizer, text: str):
        self.tokenizer, self._tokens = tokenizer, tokenizer.encode(text)

    def lines(self, n: int, rng: np.random.Generator) -> list[str]:
        """About n tokens from somewhere, as lines."""
        if len(self._tokens) < n:
            raise ValueError(f"needles: the text has {len(self._tokens):,} tokens, wanted {n:,}: give more text")
        first = int(rng.integers(len(self._tokens) - n + 1))
        return self.tokenizer.decode(self._tokens[first : first + n]).splitlines()

    def count(self, text: str) -> int:
        return len(self.tokenizer.encode(text))


def _of_text(
    kind: Kind, hay: _Hay, length: int, depth: float, style: str, rng: np.random.Generator, number: int
) -> list[dict[str, Any]]:
    """The questions about one text; the first key's first needle is at `depth`."""
    n_keys = max(kind.n_keys(length), kind.n_questions)
    keys = draw_keys(rng, n_keys)
    values = np.reshape(draw_values(rng, n_keys * kind.n_values), (n_keys, kind.n_values)).tolist()
    needles = [_needle(style, key, value, kind.n_values > 1) for key, of_key in zip(keys, values, strict=True)
               for value in of_key]  # fmt: skip
    asked = [_question(style, key, kind.n_values > 1) for key in keys[: kind.n_questions]]
    used = sum(map(hay.count, needles)) + max(map(hay.count, asked)) + _ANSWER
    if used >= length:
        raise ValueError(f"needles: length={length} leaves no text beside {used} tokens of needles, question, answer")
    lines = hay.lines(length - used, rng)
    places = [depth, *rng.random(len(needles) - 1)]
    # A key's values are asked for in the order in which they stand in the text.
    if kind.n_values > 1:
        places = sorted(places)
    ends = np.cumsum([len(line) + 1 for line in lines])
    at = np.searchsorted(ends, np.array(places) * ends[-1])
    for place, needle in sorted(zip(at.tolist(), range(len(needles)), strict=True), reverse=True):
        lines.insert(place, needles[needle])
    body = "\n".join(lines)
    return [
        {"input": f"{body}\n{question}", "outputs": of_key, "max_length": length, "depth": depth, "text": number}
        for question, of_key in zip(asked, values, strict=False)
    ]


def _needle(style: str, key: str, value: str, has_several: bool) -> str:
    if style == "lines":
        return f"<<{'add' if has_several else 'key'} {key} = {value}>>"
    return f"{'A' if has_several else 'The'} number of {key} is {value}."


def _question(style: str, key: str, has_several: bool) -> str:
    if style == "lines":
        return f"<<{'all' if has_several else 'ask'} {key} ="
    if has_several:
        return f"Question: what are all {_SEVERAL} numbers of {key} in the text?\nAnswer: the numbers of {key} are"
    return f"Question: what is the number of {key} in the text?\nAnswer: the number of {key} is"


@functools.lru_cache(maxsize=1)
def _read_text(text: str | None) -> str:
    root = Path(sysconfig.get_paths()["stdlib"] if text is None else text)
    if not root.exists():
        raise FileNotFoundError(f"needles: text is {text}, wanted a file or a folder")
    files = [root] if root.is_file() else sorted(root.glob("*.py") if text is None else root.rglob("*"))
    parts, size = [], 0
    for file in files:
        if file.is_file() and size < _CHARACTERS:
            try:
                parts.append(file.read_text(encoding="utf-8")[: _CHARACTERS - size])
            except UnicodeDecodeError:
                if root.is_file():
                    raise ValueError(f"needles: {text}: wanted a text in UTF-8") from None
                continue  # a folder may hold other files
            size += len(parts[-1])
    return "\n".join(parts)
