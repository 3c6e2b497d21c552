"""The main job: index real text with the flat indexer, HISA, the scan and block-sparse selection, side by side.

First by the small trained model that comes with the project, for what selections are worth: it finds lines hidden in
the text, or not. Then at the shape of DeepSeek-V3.2's indexer and with the methods' published defaults, for speed:
queries and keys come from the text itself (`ngrams.py` says how), all methods run in turns, their exact top-k included.
Each row is printed as soon as it is known.
"""

import argparse
import functools
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

import hisa_jax as hj
from bench import UserError, options, shapes, text, timing
from bench.demo import model as demo_model
from bench.demo import report
from bench.demo.life import Show, signs_of_life
from bench.demo.result import Result
from bench.quality.ngrams import Ngrams, Task, task

MODEL = shapes.DSV32
METHODS = MODEL.methods()
DEFAULT_CONTEXTS = shapes.CONTEXTS[:5:2]
_N_CONTEXTS = 2  # of these, by default: the longest that the text has
_LEAST_S = 1.0  # seconds of timed calls at each context
_GROWTH = 2.0  # times as long as the last one a context takes, which has 4 times the tokens

select = jax.jit(hj.select, static_argnames=("method", "return_scores"))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    defaults = (
        f"default: the {_N_CONTEXTS} longest of {', '.join(map(shapes.label, DEFAULT_CONTEXTS))} that the text has"
    )
    parser.add_argument("--text", type=Path, metavar="FILE", help="any text file (default: Python's standard library)")
    parser.add_argument("--context", type=options.context, nargs="+", metavar="N", help=f"tokens ({defaults})")
    parser.add_argument(
        "--queries", type=options.whole(1, shapes.PREFILL.T), default=64, metavar="N",
        help="queries, in the last 4096 positions of each context (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--minutes", type=options.positive, default=3.0, metavar="N",
        help="leave out contexts that would end later, unless --context names them (default: %(default)g)",
    )  # fmt: skip
    parser.add_argument(
        "--repeats", type=options.whole(1, 1000), default=3, metavar="N", help="timed calls (default: %(default)s)"
    )
    parser.add_argument(
        "--seed", type=options.whole(0, 2**31 - 1), default=0, metavar="N", help="of the vectors (default: %(default)s)"
    )
    parser.add_argument(
        "--model-context", type=options.whole(demo_model.LEAST_CONTEXT, 16384), default=demo_model.CONTEXT, metavar="N",
        help="bytes that the trained model reads (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("demo_out"), metavar="DIR", help="default: %(default)s")


def run(args: argparse.Namespace) -> int:
    end = time.perf_counter() + 60 * args.minutes
    console = Console()

    def say(*parts: object) -> None:
        console.print(*parts, sep="\n", highlight=False, markup=False)

    tokens, contexts = _read(args.text, args.context)
    content = _bytes(args.text)
    _make_writable(args.out)
    with signs_of_life(console, 1 + len(contexts)) as show:
        model = demo_model.hide(content, args.model_context, args.seed)
        say(demo_model.headline(model), "", demo_model.HEADER)
        for row in demo_model.read(model, show):
            say(demo_model.line(row))
        say("", demo_model.found(model), "")
        say(report.headline(args.text, len(tokens), contexts, args.queries), "", report.HEADER)
        results = _measure_all(tokens, contexts, args, None if args.context else end, show, say)
    if len(results) < len(contexts):
        left_out = contexts[len(results) :]
        say(
            f"Left out, for want of time (--minutes {args.minutes:g}): {', '.join(map(shapes.label, left_out))}. "
            f"--context {' '.join(map(str, left_out))} takes as long as needed."
        )
    rows = [row for result in results for row in result.rows]
    say(
        "", *report.notes(results), *report.passages(tokens, results[-1]), "",
        report.summary(results[-1].rows, model.rows()), report.conclusion(results[-1].rows, model.rows()),
    )  # fmt: skip
    for path in report.write(args.out, args.text, args.seed, rows, model.rows()):
        console.print(f"Written: {path}", highlight=False, markup=False, soft_wrap=True)
    return 0


def _measure_all(
    tokens: list[str], contexts: list[int], args: argparse.Namespace, end: float | None, show: Show,
    say: Callable[..., None],
) -> list[Result]:  # fmt: skip
    """The contexts in turn, their rows said at once; those are left out, but never the first, that end after `end`."""
    ngrams, results, took = Ngrams(tokens, args.seed), list[Result](), 0.0
    for i, context in enumerate(contexts):
        start = time.perf_counter()
        if end is not None and i > 0 and start + _GROWTH * took > end:
            break

        def progress(what: str, part: float, i: int = i, context: int = context) -> None:
            show(f"{shapes.label(context)} tokens: {what}", 1 + i + part)

        results.append(measure(ngrams, context, args.queries, args.repeats, progress))
        took = time.perf_counter() - start
        say(*map(report.line, results[-1].rows))
    return results


def measure(ngrams: Ngrams, context: int, n_queries: int, repeats: int, progress: Show) -> Result:
    """Runs, checks and times all methods on the first `context` tokens; `progress` is told which part is done."""
    progress("queries and keys", 0)
    # In a short context, too, there has to be something that is not recent.
    recent = min(MODEL.topk, context // 4)
    questions = task(ngrams, context, n_queries, recent)
    q, k, w = map(jnp.asarray, ngrams.inputs(context, questions.positions))
    positions = jnp.asarray(questions.positions, jnp.int32)[None]
    calls = {
        name: functools.partial(select, q, k, w, method, query_positions=positions) for name, method in METHODS.items()
    }
    selections, first_ms = {}, {}
    # The first call compiles, which is shown apart from the speed.
    for i, (name, call) in enumerate(calls.items()):
        progress(f"compiling {report.NAMES[name]}", i / 8)
        selections[name], first_ms[name] = timing.once(call)
    progress("flat's scores, to compare with", 0.5)
    flat = calls["dsa"](return_scores=True)
    n_identical = {
        name: _check_identical(name, METHODS[name], selections[name], flat, questions.positions)
        for name in ("hisa", "scan")
    }
    # In turns, since other work on the machine comes and goes.
    timings = timing.interleaved(
        calls, repeats, least_s=_LEAST_S,
        after_round=lambda i: progress("timing, in turns", 0.6 + 0.4 * min((i + 1) / (repeats + 1), 1)),
    )  # fmt: skip
    rows = []
    for name, method in METHODS.items():
        implementation = next(way for way, why_not in hj.implementations(q, k, method).items() if why_not is None)
        rows.append({
            "row": "select", "method": name, "implementation": implementation, "shape": MODEL.name, "context": context,
            "dtype": k.dtype.name, "queries": len(questions.positions), "first_call_ms": first_ms[name],
            **_speed(timings[name], timings["dsa"], len(questions.positions)),
            **_quality(selections[name], flat, questions), "identical_queries": n_identical.get(name),
        })  # fmt: skip
    return Result(
        context=context,
        recent=recent,
        task=questions,
        rows=rows,
        n_identical=n_identical,
        flat=flat,
        scan=selections["scan"],
    )


def _speed(own: timing.Timing, flat: timing.Timing, n_queries: int) -> dict[str, float]:
    return {
        "ms_per_query": own.median_ms / n_queries,
        "spread_ms_per_query": own.spread_ms / n_queries,
        "time_to_flat": own.ratio_to(flat),
    }


def _quality(selection: hj.Selection, flat: hj.Selection, questions: Task) -> dict[str, float | None]:
    summary = hj.compare(selection, flat).summary()
    indices = np.asarray(selection.indices[0])
    kept = [np.isin(places, row).mean() for places, row in zip(questions.places, indices, strict=True) if len(places)]
    return {name: summary[name] for name in ("recall", "iou", "mass")} | {
        "queries_with_places": len(kept),
        "median_n": float(np.median([n for n in questions.orders if n])) if kept else None,
        "places_kept": float(np.mean(kept)) if kept else None,
    }


def _check_identical(name: str, method: Any, selection: hj.Selection, flat: hj.Selection, positions: np.ndarray) -> int:
    """How many queries see no more tokens than a method's candidates, where it must and does select what flat does."""
    rows = positions < method.block_topk * method.block_size
    if not np.array_equal(np.asarray(selection.indices[0])[rows], np.asarray(flat.indices[0])[rows]):
        raise RuntimeError(
            f"demo: {name} differs from the flat indexer where all tokens are its candidates, against the contract"
        )
    return int(rows.sum())


def _read(path: Path | None, contexts: list[int] | None) -> tuple[list[str], list[int]]:
    """The tokens that are needed and the contexts, ascending; by default the longest for which a text has enough."""
    wanted = sorted(set(contexts or DEFAULT_CONTEXTS))
    if path is None:
        tokens = text.standard_library_tokens(wanted[-1])
    else:
        tokens = text.file_tokens(path, at_least=wanted[-1] if contexts else wanted[0])
        wanted = [context for context in wanted if context <= len(tokens)]
    if not contexts:
        wanted = wanted[-_N_CONTEXTS:]
    return tokens[: wanted[-1]], wanted


def _bytes(path: Path | None) -> bytes | None:
    """The text for the trained model, None for the default."""
    if path is None:
        return None
    content = path.read_bytes()
    if len(content) < demo_model.LEAST_CONTEXT:
        raise UserError(f"--text {path}: {len(content):,} bytes, wanted {demo_model.LEAST_CONTEXT:,}: give more text")
    return content


def _make_writable(folder: Path) -> None:
    """Finds out before the work whether its result can be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(f"--out {folder}: cannot be written to: {error.strerror}") from error
