"""What the demo shows and writes: the table, found passages, a figure, JSON."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich import box
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from bench import shapes
from bench.quality.ngrams import spread
from bench.records import device

if TYPE_CHECKING:
    from bench.demo.command import Result

NAMES = {"dsa": "flat", "hisa": "HISA", "scan": "scan", "block-sparse": "block-sparse"}
_COLORS = {"dsa": "#444444", "hisa": "#0b6fb8", "scan": "#2e8b57", "block-sparse": "#d9781c"}
_MEASURES = {"recall": "-", "places_kept": "--"}
_N_PASSAGES = 3
_AROUND = 12  # tokens shown on each side of a place


def headline(path: Path | None, n_tokens: int, contexts: list[int], n_queries: int) -> str:
    source = "the Python standard library's sources" if path is None else str(path)
    labels = ", ".join(map(shapes.label, contexts))
    return (
        f"Text: {source}, {n_tokens:,} tokens, in contexts of {labels}. Queries and keys: hashed n-grams of the text "
        f"itself, no trained model; up to {n_queries} queries in the last 4096 positions."
    )


def table(results: "list[Result]") -> Table:
    title = "Indexing, and its quality against the flat indexer"
    result = Table(title=title, title_justify="left", box=box.SIMPLE, pad_edge=False, show_edge=False)
    for column in ("context", "method", "ms/query", "speedup", "recall", "IoU", "mass", "kept"):
        result.add_column(column, justify="left" if column == "method" else "right", no_wrap=True)
    for at_context in results:
        for row in at_context.rows:
            result.add_row(*_cells(row), style="bold" if row["method"] == "scan" else "")
        result.add_section()
    return result


def _cells(row: dict[str, Any]) -> list[str]:
    kept = row["places_kept"]
    return [
        shapes.label(row["context"]), NAMES[row["method"]], f"{row['ms_per_query']:.2f}",
        f"{1 / row['time_to_flat']:.2f}x", f"{row['recall']:.3f}", f"{row['iou']:.3f}", f"{row['mass']:.3f}",
        "-" if kept is None else f"{kept:.0%}",
    ]  # fmt: skip


def summary(rows: list[dict[str, Any]], model_rows: list[dict[str, Any]]) -> Table:
    """Time and answers side by side: the longest context's rows, and the trained model's."""
    result = Table(title="Time and answers", title_justify="left", box=box.SIMPLE, pad_edge=False, show_edge=False)
    context, at = shapes.label(rows[0]["context"]), f"{model_rows[0]['context']:,} bytes"
    for column in ("method", f"speedup at {context}", f"kept at {context}", f"questions answered at {at}"):
        result.add_column(column, justify="left" if column == "method" else "right")
    for row, of_model in zip(rows, model_rows, strict=True):
        *_, kept = cells = _cells(row)
        result.add_row(
            NAMES[row["method"]], cells[3], kept, f"{of_model['right']} of {of_model['questions']}",
            style="bold" if row["method"] == "scan" else "",
        )  # fmt: skip
    return result


def notes(results: "list[Result]") -> Iterator[str]:
    here = device()
    ways = sorted({row["implementation"] for result in results for row in result.rows})
    yield (
        f"Ran: implementation {', '.join(ways)}, the first that can, on {here['device']} with {here['cpu_cores']} "
        f"CPU cores, jax {here['jax']}. Times: medians of calls in turns, exact top-k included, compiling not."
    )
    yield "Recall, IoU, mass: of the flat indexer's tokens, and of their score, what was selected, too."
    n_of = [f"{shapes.label(r.context)}: {r.rows[0]['median_n']:.0f}" for r in results if r.rows[0]["median_n"]]
    yield (
        "Kept: share of the right answers that were selected, the earlier places with the same last n tokens beyond "
        f"the recent ones. The longer n, the easier; its median is {', '.join(n_of) or 'unknown, as there were none'}."
    )
    identical = []
    for name in ("hisa", "scan"):
        where = [f"{shapes.label(r.context)} ({r.n_identical[name]})" for r in results if r.n_identical[name]]
        identical.append(f"{NAMES[name]} {', '.join(where) or 'there were none'}")
    yield (
        "Checked: HISA and the scan selected exactly what the flat indexer did for all queries that see at most as "
        f"many tokens as the method has candidates: {'; '.join(identical)}."
    )


def passages(tokens: list[str], result: "Result") -> Iterator[Panel]:
    """Some queries with the best place the scan found beyond the recent tokens, where that place is a right answer."""
    found = [(i, best) for i in range(len(result.task.positions)) if (best := _best_place(result, i)) is not None]
    for i, place in (found[j] for j in spread(list(range(len(found))), _N_PASSAGES)):
        t, n = int(result.task.positions[i]), result.task.orders[i]
        shown = Text.assemble(
            (f"query at {t:,}, after\n", "dim"), *_around(tokens, t, n), (f"\n\nfound at {place:,}\n", "dim"),
            *_around(tokens, place, n), _joined(tokens, place + 1, place + 1 + 2 * _AROUND),
        )  # fmt: skip
        shown.rstrip()
        title = f"The scan at {shapes.label(result.context)}: the same {n} tokens, {t - place:,} tokens before"
        yield Panel(shown, title=title, title_align="left")


def _around(tokens: list[str], position: int, n: int) -> Iterator[str | tuple[str, str]]:
    """The n tokens that end at a position, marked, and what stands before them."""
    first = position - n + 1
    yield _joined(tokens, first - _AROUND, first)
    # Signs as well as a colour, which is lost in a file.
    yield f">>{_joined(tokens, first, position + 1)}<<", "bold green"


def _joined(tokens: list[str], first: int, end: int) -> str:
    return "".join(tokens[max(first, 0) : end])


def _best_place(result: "Result", i: int) -> int | None:
    """Where query i's best found place beyond the recent tokens is, if it is a right answer."""
    indices, scores = np.asarray(result.scan.indices)[0, i], np.asarray(result.scan.scores)[0, i]
    far = (indices >= 0) & (indices <= result.task.positions[i] - result.recent)
    if not far.any():
        return None
    best = int(indices[np.argmax(np.where(far, scores, -np.inf))])
    return best if best in result.task.places[i] else None


def write(
    folder: Path, path: Path | None, seed: int, rows: list[dict[str, Any]], model_rows: list[dict[str, Any]]
) -> tuple[Path, Path]:
    """Writes demo.json, all rows, and demo.png, those of the indexers."""
    source = "standard library" if path is None else path.name
    data = {"text": source, "seed": seed, **device(), "rows": rows + model_rows}
    json_path, png_path = folder / "demo.json", folder / "demo.png"
    json_path.write_text(json.dumps(data, indent=1) + "\n")
    figure(rows).savefig(png_path, dpi=150)
    return json_path, png_path


def figure(rows: list[dict[str, Any]]) -> Figure:
    """Speed and quality against context. Not by pyplot: no state, no display."""
    result = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(result)
    speed, quality = result.subplots(1, 2)
    for name in NAMES:
        own = [row for row in rows if row["method"] == name]
        contexts = [row["context"] for row in own]
        speed.plot(contexts, [row["ms_per_query"] for row in own], "o-", color=_COLORS[name], label=NAMES[name])
        for measure, style in _MEASURES.items():
            if (name, measure) == ("dsa", "recall"):
                continue  # it is 1, the others' yardstick
            label = f"{NAMES[name]}, {measure.replace('_', ' ')}"
            values = [np.nan if row[measure] is None else row[measure] for row in own]
            quality.plot(contexts, values, "o" + style, color=_COLORS[name], label=label)
    speed.set(title="Time of indexing", ylabel="ms per query, top-k included", yscale="log")
    speed.yaxis.set_major_formatter("{x:g}")
    quality.set(title="Quality", ylabel="share", ylim=(0, 1.05))
    for axes in (speed, quality):
        axes.set_xscale("log", base=2)
        ticks = sorted({row["context"] for row in rows})
        axes.set_xticks(ticks, map(shapes.label, ticks))
        axes.minorticks_off()
        axes.set_xlabel("context, tokens")
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, fontsize="small", handlelength=4)
    return result
