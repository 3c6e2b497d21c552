"""What the demo shows and writes: the table, found passages, a figure, JSON."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich import box
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from bench import shapes
from bench.demo.result import Result
from bench.quality.ngrams import spread
from bench.records import device

NAMES = {"dsa": "flat", "hisa": "HISA", "scan": "scan", "block-sparse": "block-sparse"}
_COLORS = {"dsa": "#444444", "hisa": "#0b6fb8", "scan": "#2e8b57", "block-sparse": "#d9781c"}
_SCORED = {
    "dsa": "all tokens, all heads", "hisa": "tokens of the best blocks", "scan": "all tokens, few heads",
    "block-sparse": "means of blocks",
}  # fmt: skip
_N_PASSAGES = 2
_AROUND = 12  # tokens shown on each side of a place


def headline(path: Path | None, n_tokens: int, contexts: list[int], n_queries: int) -> str:
    source = "the Python standard library's sources" if path is None else str(path)
    labels = ", ".join(map(shapes.label, contexts))
    return (
        f"2. What a selection costs, at the shape of DeepSeek-V3.2's indexer: 64 heads of 128, {shapes.DSV32.topk} "
        f"tokens chosen. Text: {source}, {n_tokens:,} tokens, in contexts of {labels}. Its queries and keys are hashed "
        f"n-grams of the text, not a model's; up to {n_queries} queries in the last 4096 positions.\n"
        "ms/query: to choose one query's tokens, exact top-k included, compiling left out. faster: than flat, calls in "
        "turns. as flat: the share of flat's tokens that were chosen, too. places: the share of the earlier places "
        "with the same words that were chosen; the vectors are tuned so that flat finds them all. Their speed is that "
        "of a model's vectors. Their shares are not: what a selection is worth, part 1 says."
    )


HEADER = f"{'context':>7}  {'method':<14}{'ms/query':>9}{'faster':>9}{'as flat':>9}{'places':>8}"


def line(row: dict[str, Any]) -> str:
    """A row under `HEADER`."""
    kept = "-" if row["places_kept"] is None else f"{row['places_kept']:.0%}"
    return (
        f"{shapes.label(row['context']):>7}  {NAMES[row['method']]:<14}{row['ms_per_query']:>9.2f}"
        f"{_faster(row):>9}{row['recall']:>9.3f}{kept:>8}"
    )


def _faster(row: dict[str, Any]) -> str:
    return f"{1 / row['time_to_flat']:.1f}x"


def summary(rows: list[dict[str, Any]], model_rows: list[dict[str, Any]]) -> Table:
    """Answers and time side by side: the trained model's rows, and those of the longest context."""
    result = Table(title="Answers and time", title_justify="left", box=box.SIMPLE, pad_edge=False, show_edge=False)
    context = shapes.label(rows[0]["context"])
    for column in ("method", "scores", "answered", f"faster at {context}"):
        result.add_column(column, justify="right" if column[0] in "af" else "left")
    for row, of_model in zip(rows, model_rows, strict=True):
        answered = f"{of_model['right']} of {of_model['questions']}"
        result.add_row(NAMES[row["method"]], _SCORED[row["method"]], answered, _faster(row))
    return result


def conclusion(rows: list[dict[str, Any]], model_rows: list[dict[str, Any]]) -> str:
    """The summary in sentences, with its figures."""
    right, faster = ({row["method"]: row for row in of} for of in (model_rows, rows))
    asked, context = right["dsa"]["questions"], shapes.label(rows[0]["context"])

    def answers(name: str) -> str:
        return f"answers {right[name]['right']} of {asked}"

    return (
        f"Flat scores every token with every head and {answers('dsa')}: the yardstick, and the slowest at long "
        f"contexts. The scan leaves out heads, not tokens: {_faster(faster['scan'])} at {context}, and it "
        f"{answers('scan')}. HISA leaves out the tokens of blocks whose mean scores low: {_faster(faster['hisa'])}, "
        f"and it {answers('hisa')}. How much of that is lost depends on the model: a line can vanish in the mean of "
        f"its block. Block-sparse takes whole blocks by their means and looks at no token: "
        f"{_faster(faster['block-sparse'])}, and it {answers('block-sparse')}. So faster alone says nothing. "
        "On your own model: hisa-jax check --checkpoint DIR --text FILE"
    )


def notes(results: list[Result]) -> Iterator[str]:
    here = device()
    ways = sorted({row["implementation"] for result in results for row in result.rows})
    yield (
        f"Ran: implementation {', '.join(ways)}, the first that can, on {here['device']} with {here['cpu_cores']} "
        f"CPU cores, jax {here['jax']}."
    )
    n_of = [f"{shapes.label(r.context)}: {r.rows[0]['median_n']:.0f}" for r in results if r.rows[0]["median_n"]]
    yield (
        "Places: same last n tokens, beyond the recent ones. The longer n, the easier; its median is "
        f"{', '.join(n_of) or 'unknown, as there were none'}."
    )
    where = [
        f"{NAMES[name]} {shapes.label(result.context)} ({n})"
        for result in results for name, n in result.n_identical.items() if n
    ]  # fmt: skip
    if where:
        yield (
            "Checked: HISA and the scan selected exactly what the flat indexer did for all queries that see at most as "
            f"many tokens as the method has candidates: {', '.join(where)}."
        )


def passages(tokens: list[str], result: Result) -> Iterator[Panel]:
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


def _best_place(result: Result, i: int) -> int | None:
    """Of what the scan found for query i beyond the recent tokens, the place of the best score, if a right answer."""
    indices, scores = np.asarray(result.flat.indices)[0, i], np.asarray(result.flat.scores)[0, i]
    far = np.isin(indices, np.asarray(result.scan.indices)[0, i]) & (indices >= 0)
    far &= indices <= result.task.positions[i] - result.recent
    if not far.any():
        return None
    best = int(indices[np.argmax(np.where(far, scores, -np.inf))])
    return best if best in result.task.places[i] else None


def write(
    folder: Path, path: Path | None, seed: int, rows: list[dict[str, Any]], model_rows: list[dict[str, Any]]
) -> tuple[Path, Path]:
    """Writes demo.json, all rows, and demo.png, answers and time."""
    source = "standard library" if path is None else path.name
    data = {"text": source, "seed": seed, **device(), "rows": rows + model_rows}
    json_path, png_path = folder / "demo.json", folder / "demo.png"
    json_path.write_text(json.dumps(data, indent=1) + "\n")
    figure(rows, model_rows).savefig(png_path, dpi=150)
    return json_path, png_path


def figure(rows: list[dict[str, Any]], model_rows: list[dict[str, Any]]) -> Figure:
    """Answers beside time against context, each line named where it ends. Not by pyplot: no state, no display."""
    result = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(result)
    answers, speed = result.subplots(1, 2, width_ratios=(2, 3))
    first = model_rows[0]
    names = [NAMES[row["method"]] for row in model_rows]
    bars = answers.bar(
        names, [row["right"] for row in model_rows], color=[_COLORS[row["method"]] for row in model_rows]
    )
    answers.bar_label(bars, [f"{row['right']} of {row['questions']}" for row in model_rows], padding=2)
    answers.set(
        title=f"Answers of a trained model\nabout {first['keys']} lines hidden in {first['context']:,} bytes",
        ylabel="questions answered (more is better)", ylim=(0, 1.15 * first["questions"]),
    )  # fmt: skip
    answers.yaxis.set_major_locator(MaxNLocator(integer=True))
    for name in NAMES:
        own = [row for row in rows if row["method"] == name]
        speed.plot([row["context"] for row in own], [row["ms_per_query"] for row in own], "o-", color=_COLORS[name])
        said = NAMES[name] if name == "dsa" else f"{NAMES[name]}: {_faster(own[-1])} as fast"
        end = (own[-1]["context"], own[-1]["ms_per_query"])
        speed.annotate(said, end, (8, 0), textcoords="offset points", va="center", color=_COLORS[name])
    speed.set(
        title=f"Time to choose {shapes.DSV32.topk} tokens of a query\n64 heads of 128, vectors made from text",
        ylabel="ms a query (less is better)", xlabel="context, tokens", yscale="log",
    )  # fmt: skip
    speed.yaxis.set_major_formatter("{x:g}")
    speed.set_xscale("log", base=2)
    ticks = sorted({row["context"] for row in rows})
    speed.set_xticks(ticks, map(shapes.label, ticks))
    speed.minorticks_off()
    speed.set_xlim(ticks[0] / 1.3, ticks[-1] * max(4, (ticks[-1] / ticks[0]) ** 0.6))  # room for the names
    for axes in (answers, speed):
        axes.grid(alpha=0.3, axis="y")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    return result
