"""`python -m bench gpu-report`: the README's table and plot from rows that `python -m bench gpu --json` wrote.

A `peers.json` beside them, which `python -m bench peers` wrote, gives the peers' lines, and ours where it is newer.
"""

import argparse
import json
import pathlib
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from bench import UserError, shapes
from bench.peers.compare import dtype_of

RESULTS = pathlib.Path(__file__).parents[1] / "results" / "h200.json"
Row = dict[str, Any]
# Name in the table, what selects its rows.
_LINES = {
    "HISA, e4m3": dict(row="hisa", shape="dsv32", dtype="e4m3", implementation="mosaic_gpu"),
    "Scan(), e4m3": dict(row="scan", shape="dsv32", dtype="e4m3", implementation="mosaic_gpu"),
    "Scan(exact_heads=2, candidates=6144), e4m3": dict(
        row="scan_2_heads", shape="dsv32", dtype="e4m3", implementation="mosaic_gpu"
    ),
    "flat indexer, e4m3": dict(row="flat", shape="dsv32", dtype="e4m3", implementation="mosaic_gpu"),
}
# The best of the peers, and beside what of ours it was measured.
_PEERS = {
    "HISA by the best public kernels": dict(row="hisa", shape="dsv32"),
    "flat by the best public kernels": dict(row="flat", shape="dsv32"),
}
_KEY = ("row", "shape", "context", "dtype", "implementation")
_PLOTTED_FIELDS = ("span_ms", "span_ms_p10", "span_ms_p90", "floor_ms")
_PLOTTED = {"HISA, e4m3": "#0b6fb8", "Scan(), e4m3": "#c2410c", "flat indexer, e4m3": "#444444"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", type=pathlib.Path, default=RESULTS, help="measured rows; default: %(default)s")
    parser.add_argument("--plot", type=pathlib.Path, help="write the plot to this file")


def run(args: argparse.Namespace) -> int:
    if not args.json.exists():
        raise UserError(f"--json {args.json}: no such file")
    rows, peers = read(args.json)
    print(table(rows, peers))
    if args.plot:
        figure(rows).savefig(args.plot, dpi=150)
    return 0


def read(file: pathlib.Path) -> tuple[list[Row], list[Row]]:
    """The rows, with the span that was measured last, and those of the peers, if there are any."""
    rows, beside = json.loads(file.read_text()), file.with_name("peers.json")
    peers = json.loads(beside.read_text()) if beside.exists() else []
    found = {(x["row"], x["shape"], x["context"], dtype_of(x["row"]), "mosaic_gpu"): x for x in peers}
    return [_last(row, found.get(tuple(row[name] for name in _KEY))) for row in rows], peers


def _last(row: Row, beside: Row | None) -> Row:
    """The row, or with the span that it had beside a peer if that is newer. Rows without a date are older than all."""
    if beside is None or beside["date"] <= row.get("date", ""):
        return row
    low, high = beside["ours_ms_p10_p90"]
    return row | {"span_ms": beside["ours_ms"], "span_ms_p10": low, "span_ms_p90": high, "date": beside["date"]}


def table(rows: list[Row], peers: list[Row]) -> str:
    """Markdown: a call's milliseconds by context of every whole indexer, and what HISA and the scan are faster by."""
    lines = {name: line for name, wanted in _LINES.items() if (line := by_context(rows, wanted))}
    for name, wanted in _PEERS.items():
        if line := {x["context"]: {"span_ms": x["best_ms"]} for x in peers if wanted.items() <= x.items()}:
            lines[name] = line
    contexts = sorted({context for line in lines.values() for context in line})
    cells = [["", *map(shapes.label, contexts)], ["---"] * (len(contexts) + 1)]
    for name, line in lines.items():
        cells.append([name, *(f"{line[c]['span_ms']:.2f}" if c in line else "" for c in contexts)])
    flat = lines["flat indexer, e4m3"]
    for name in ("HISA", "Scan()"):
        line = lines[f"{name}, e4m3"]
        ratios = [
            f"**{flat[c]['span_ms'] / line[c]['span_ms']:.1f}x**" if c in line and c in flat else "" for c in contexts
        ]
        cells.append([f"{name} faster by", *ratios])
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def by_context(rows: list[Row], wanted: Row) -> dict[int, Row]:
    """Context -> the row that has all that is wanted, and the span of a call."""
    return {
        row["context"]: row
        for row in rows
        if "span_ms" in row and all(row[name] == value for name, value in wanted.items())
    }


def figure(rows: list[Row]) -> Figure:
    """Time against context, HISA, scan and flat, with the range of the samples and the floors."""
    result = Figure(figsize=(6, 4), layout="constrained")
    FigureCanvasAgg(result)
    axes = result.subplots()
    ticks: set[int] = set()
    for name, color in _PLOTTED.items():
        line = by_context(rows, _LINES[name])
        contexts = sorted(line)
        ticks |= set(contexts)
        ms, low, high, floor = ([line[c][key] for c in contexts] for key in _PLOTTED_FIELDS)
        axes.plot(contexts, ms, "o-", color=color, label=name)
        axes.fill_between(contexts, low, high, color=color, alpha=0.2, linewidth=0)
        axes.plot(contexts, floor, ":", color=color, label=f"{name}: floor")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xticks(sorted(ticks), map(shapes.label, sorted(ticks)))
    axes.minorticks_off()
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set(
        title=f"Indexing 4096 queries on one {rows[0]['device']}",
        xlabel="context, tokens",
        ylabel="ms, exact top-2048 included",
    )
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize="small")
    return result
