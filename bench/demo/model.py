"""The demo's trained model: questions about lines hidden in real text, answered with each method's selections."""

import dataclasses
import time
from typing import Any

import jax.numpy as jnp
import numpy as np
from rich import box
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from bench.demo.report import NAMES
from bench.quality.answers import bits_of
from bench.quality.model import BYTES, load, logits_of
from bench.quality.variants import Variant, main_variants
from hisa_jax.models.training import tasks
from hisa_jax.models.training.recipe import HISA
from hisa_jax.models.training.retrieval import answer, wanted
from hisa_jax.models.training.samples import Question, Sample
from hisa_jax.models.training.text import held_out_text
from hisa_jax.models.training.weights import Stacked

LEAST_CONTEXT, CONTEXT = 1024, 4096
_BYTES_A_KEY = 128  # of context; half of it is lines then, the rest text
_QUESTIONS = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reading:
    """What the model made of the text with one method.

    Attributes:
        bits: bits a byte of the text, what answers questions left out.
        answers: what it said to each question.
        seconds: that it took, compiling included.
    """

    bits: float
    answers: list[str]
    seconds: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """The text, its hidden lines, and what the model made of them by method."""

    sample: Sample
    n_keys: int
    readings: dict[str, Reading]

    def right_answers(self) -> list[str]:
        return [_text(wanted(self.sample, question)) for question in self.sample.questions]

    def rows(self) -> list[dict[str, Any]]:
        """A method each, for JSON."""
        right = self.right_answers()
        return [
            {
                "row": "model", "method": name, "context": self.sample.tokens.size, "keys": self.n_keys,
                "questions": len(right), "right": sum(map(str.__eq__, reading.answers, right)),
                "bits_per_byte": reading.bits, "seconds": reading.seconds,
            }
            for name, reading in self.readings.items()
        ]  # fmt: skip


def run(content: bytes | None, context: int, seed: int) -> Result:
    """Hides lines in a text, reads it with each method, and answers questions about some of the lines.

    Args:
        content: the text, of at least `LEAST_CONTEXT` bytes. Default: files that the model was not trained on.
        context: bytes to read, fewer if the text is shorter.
        seed: of the lines.
    """
    content = held_out_text(context) if content is None else content
    filler = np.frombuffer(content, np.uint8)[:context]
    n_keys = filler.size // _BYTES_A_KEY
    sample = tasks.multikey(np.random.default_rng(seed), filler, n_keys=n_keys, n_questions=_QUESTIONS)
    stacked = load(BYTES)
    variants = main_variants(stacked.config.index_topk, HISA.block_size, HISA.block_topk)
    readings = [_read(stacked, sample, variant) for variant in variants]
    return Result(sample=sample, n_keys=n_keys, readings=dict(zip(NAMES, readings, strict=True)))


def _read(stacked: Stacked, sample: Sample, variant: Variant) -> Reading:
    started = time.perf_counter()
    logits = logits_of(stacked, sample.tokens[None], variant)
    likeliest = np.asarray(jnp.argmax(logits[0], axis=-1))
    bits = np.asarray(bits_of(logits, jnp.asarray(sample.tokens[None])))[0]
    return Reading(
        bits=float(bits[~sample.is_answer[1:]].mean()),
        answers=[_text(answer(likeliest, question)) for question in sample.questions],
        seconds=time.perf_counter() - started,
    )


def table(result: Result) -> Table:
    made = Table(
        title=f"A trained model on {result.sample.tokens.size:,} bytes of text, {result.n_keys} lines hidden in it",
        title_justify="left", box=box.SIMPLE, pad_edge=False, show_edge=False,
    )  # fmt: skip
    for column in ("method", "questions answered", "bits/byte", "seconds"):
        made.add_column(column, justify="left" if column == "method" else "right", no_wrap=True)
    for row in result.rows():
        made.add_row(
            NAMES[row["method"]], f"{row['right']} of {row['questions']}", f"{row['bits_per_byte']:.3f}",
            f"{row['seconds']:.1f}", style="bold" if row["method"] == "scan" else "",
        )  # fmt: skip
    return made


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
