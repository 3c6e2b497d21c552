"""The demo's trained model: questions about lines hidden in real text, answered with each method's selections."""

import dataclasses
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from rich.panel import Panel
from rich.text import Text

from bench.demo.life import Show
from bench.demo.report import NAMES
from bench.quality.answers import bits_of
from bench.quality.model import BYTES, load, logits_of
from bench.quality.variants import Variant, main_variants
from hisa_jax.models.config import read_config
from hisa_jax.models.training import tasks
from hisa_jax.models.training.recipe import HISA
from hisa_jax.models.training.retrieval import answer, wanted
from hisa_jax.models.training.samples import Question, Sample
from hisa_jax.models.training.text import held_out_text
from hisa_jax.models.training.weights import Stacked

LEAST_CONTEXT, CONTEXT = 1024, 3072
_BYTES_A_KEY = 128  # of context; half of it is lines then, the rest text
_QUESTIONS = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reading:
    """What the model made of the text with one method.

    Attributes:
        bits: bits a byte of the text, what answers questions left out.
        answers: what it said to each question.
        seconds: that all layers took; compiling, which the first one waits for, left out.
    """

    bits: float
    answers: list[str]
    seconds: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """The text, its hidden lines, and what the model made of them by method, as far as it has read."""

    sample: Sample
    n_keys: int
    readings: dict[str, Reading]

    def right_answers(self) -> list[str]:
        return [_text(wanted(self.sample, question)) for question in self.sample.questions]

    def row(self, name: str) -> dict[str, Any]:
        """Of one method, for JSON."""
        right, reading = self.right_answers(), self.readings[name]
        return {
            "row": "model", "method": name, "context": self.sample.tokens.size, "keys": self.n_keys,
            "questions": len(right), "right": sum(map(str.__eq__, reading.answers, right)),
            "bits_per_byte": reading.bits, "seconds": reading.seconds,
        }  # fmt: skip

    def rows(self) -> list[dict[str, Any]]:
        """A method each."""
        return [self.row(name) for name in self.readings]


def hide(content: bytes | None, context: int, seed: int) -> Result:
    """Hides lines in a text, with questions about some of them at its end; nothing is read yet.

    Args:
        content: the text, of at least `LEAST_CONTEXT` bytes. Default: files that the model was not trained on.
        context: bytes to read, fewer if the text is shorter.
        seed: of the lines.
    """
    content = held_out_text(context) if content is None else content
    filler = np.frombuffer(content, np.uint8)[:context]
    n_keys = filler.size // _BYTES_A_KEY
    n_questions = min(_QUESTIONS, n_keys)
    sample = tasks.multikey(np.random.default_rng(seed), filler, n_keys=n_keys, n_questions=n_questions)
    return Result(sample=sample, n_keys=n_keys, readings={})


def read(result: Result, show: Show) -> Iterator[dict[str, Any]]:
    """Reads the text by each method in turn and adds its reading; gives its row. `show` is told what is done of 1."""
    show("loading the trained model", 0)
    stacked = load(BYTES)
    variants = main_variants(stacked.config.index_topk, HISA.block_size, HISA.block_topk)
    for i, (name, variant) in enumerate(zip(NAMES, variants, strict=True)):
        show(f"the trained model reads by {variant.name}; it compiles first", i / len(variants))
        result.readings[name] = _read(stacked, result.sample, variant)
        yield result.row(name)


def _read(stacked: Stacked, sample: Sample, variant: Variant) -> Reading:
    ends: list[float] = []

    def after_layer(x: Array) -> None:
        jax.block_until_ready(x)
        ends.append(time.perf_counter())

    logits = logits_of(stacked, sample.tokens[None], variant, after_layer)
    likeliest = np.asarray(jnp.argmax(logits[0], axis=-1))
    bits = np.asarray(bits_of(logits, jnp.asarray(sample.tokens[None])))[0]
    # All layers run one program: the first waits for its compilation, the others tell how long it takes.
    return Reading(
        bits=float(bits[~sample.is_answer[1:]].mean()),
        answers=[_text(answer(likeliest, question)) for question in sample.questions],
        seconds=(ends[-1] - ends[0]) * len(ends) / (len(ends) - 1),
    )


def headline(result: Result) -> str:
    """What is read, and what the columns of its rows mean."""
    first, questions = result.sample.questions[0], len(result.sample.questions)
    line = _text(result.sample.tokens[slice(*first.needs[0])]).strip()
    return (
        f"1. What a selection is worth. A small trained model reads {result.sample.tokens.size:,} bytes. "
        f"{result.n_keys} lines such as {line} are hidden in them, and it is asked for {questions}. Only the method "
        f"that chooses {read_config(BYTES).index_topk} earlier bytes for each one to attend to changes.\n"
        "answered: questions whose every digit is right. bits/byte: to code the text, fewer are better. seconds: to "
        "read it all, compiling left out; so short a text shows no speed, part 2 does."
    )


HEADER = f"{'method':<14}{'answered':>10}{'bits/byte':>11}{'seconds':>9}"


def line(row: dict[str, Any]) -> str:
    """A row under `HEADER`."""
    answered = f"{row['right']} of {row['questions']}"
    return f"{NAMES[row['method']]:<14}{answered:>10}{row['bits_per_byte']:>11.3f}{row['seconds']:>9.1f}"


def found(result: Result) -> Panel:
    """Of the questions that the scan answers, one that HISA does not, if there is one; the one farthest away."""
    right, questions = result.right_answers(), result.sample.questions
    scan, hisa = (result.readings[name].answers for name in ("scan", "hisa"))
    at = max(range(len(right)), key=lambda i: (scan[i] == right[i], hisa[i] != right[i], questions[i].distance))
    question: Question = questions[at]
    tokens, (start, stop) = result.sample.tokens, question.needs[0]
    before, line = _text(tokens[max(start - 60, 0) : start]).lstrip("\n"), _text(tokens[start:stop]).strip()
    asked = _text(tokens[question.start : question.answer]).strip()
    # Signs as well as a colour, which is lost in a file.
    shown = Text.assemble(
        (f"at {start:,}\n", "dim"), before, (f">>{line}<<", "bold green"),
        (f"\n\nasked at {question.start:,}\n", "dim"), asked,
    )  # fmt: skip
    for name, reading in result.readings.items():
        is_right = reading.answers[at] == right[at]
        shown.append(f"\n  {NAMES[name]}: {reading.answers[at].removesuffix('>>')}{'' if is_right else '  (wrong)'}")
    title = f"A line found {question.distance:,} bytes back"
    return Panel(shown, title=title, title_align="left")


def _text(content: bytes | np.ndarray) -> str:
    return bytes(content).decode(errors="replace")
