"""The demo's trained model: questions about lines hidden in real text, answered with each method's selections."""

import dataclasses
import functools
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from rich import box
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

import hisa_jax as hj
import models
from bench.demo_report import NAMES
from models.training import forward, tasks
from models.training.recipe import HISA
from models.training.samples import Question, Sample
from models.training.text import held_out_text
from models.training.weights import Skeleton, Stacked, weights_of

FOLDER = Path(models.__file__).parent / "bytes"
LEAST_CONTEXT, CONTEXT = 1024, 4096
_BYTES_A_KEY = 128  # of context; half of it is lines then, the rest text
_QUESTIONS = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reading:
    """What the model made of the text with one method.

    Attributes:
        bits: bits a byte of the text, what answers questions left out.
        answers: what it said to each question.
        seconds: of the pass over all bytes, compiling not included.
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

    def wanted(self) -> list[str]:
        return [_text(self.sample.tokens[question.answer : question.stop]) for question in self.sample.questions]

    def rows(self) -> list[dict[str, Any]]:
        """A method each, for JSON."""
        wanted = self.wanted()
        return [
            {
                "row": "model", "method": name, "context": self.sample.tokens.size, "keys": self.n_keys,
                "questions": len(wanted), "right": sum(map(str.__eq__, reading.answers, wanted)),
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
    model = models.from_pretrained(FOLDER)
    # bfloat16 is what it was trained in, and slow on CPUs.
    dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    stacked = Skeleton(model.config, dtype).stacked(weights_of(model))
    topk = model.config.index_topk
    selectors: dict[str, hj.Method] = {
        "dsa": hj.Dsa(topk=topk),
        "hisa": HISA,
        "block-sparse": hj.BlockSparse(topk=topk, block_size=32),
    }
    return Result(
        sample=sample, n_keys=n_keys, readings={name: _read(stacked, sample, how) for name, how in selectors.items()}
    )


def _read(stacked: Stacked, sample: Sample, method: hj.Method) -> Reading:
    attend = functools.partial(forward.sparse, method=method)

    def read(stacked: Stacked, tokens: Array) -> tuple[Array, Array]:
        logits, _ = forward.forward(stacked, tokens[:, :-1], attend)
        losses = -jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 1:, None], axis=2)[..., 0]
        return jnp.argmax(logits, axis=-1), losses

    tokens = jnp.asarray(sample.tokens, jnp.int32)[None]
    compiled = jax.jit(read).lower(stacked, tokens).compile()
    started = time.perf_counter()
    likeliest, losses = (np.asarray(x[0]) for x in compiled(stacked, tokens))
    seconds = time.perf_counter() - started
    return Reading(
        bits=float(losses[~sample.is_answer[1:]].mean() / np.log(2)),
        answers=[_text(likeliest[q.answer - 1 : q.stop - 1].astype(np.uint8)) for q in sample.questions],
        seconds=seconds,
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
            f"{row['seconds']:.1f}", style="bold" if row["method"] == "hisa" else "",
        )  # fmt: skip
    return made


def found(result: Result) -> Panel:
    """The question whose line is farthest away among those that HISA answers, else the farthest of all."""
    wanted, hisa = result.wanted(), result.readings["hisa"].answers
    numbers = range(len(wanted))
    at = max(numbers, key=lambda i: (hisa[i] == wanted[i], result.sample.questions[i].distance))
    question: Question = result.sample.questions[at]
    tokens, (start, stop) = result.sample.tokens, question.needs[0]
    before, line = _text(tokens[max(start - 60, 0) : start]).lstrip("\n"), _text(tokens[start:stop]).strip()
    asked = _text(tokens[question.start : question.answer]).strip()
    # Signs as well as a colour, which is lost in a file.
    shown = Text.assemble(
        (f"at {start:,}\n", "dim"), before, (f">>{line}<<", "bold green"),
        (f"\n\nasked at {question.start:,}\n", "dim"), asked,
    )  # fmt: skip
    for name, reading in result.readings.items():
        is_right = reading.answers[at] == wanted[at]
        shown.append(f"\n  {NAMES[name]}: {reading.answers[at].removesuffix('>>')}{'' if is_right else '  (wrong)'}")
    title = f"A line found {question.distance:,} bytes back"
    return Panel(shown, title=title, title_align="left")


def _text(tokens: np.ndarray) -> str:
    return tokens.tobytes().decode(errors="replace")
