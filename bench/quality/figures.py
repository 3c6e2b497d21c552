"""The figures of the quality report, by name. Not by pyplot: no state, no display."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from bench import shapes
from bench.quality.tables import METHODS, OTHERS, averaged, contexts, excess, find, pooled, variants_in
from bench.quality.variants import BLOCK_SPARSE, FLAT, HISA, SCAN

Row = dict[str, Any]
_COLORS = {FLAT: "#444444", HISA: "#0b6fb8", SCAN: "#2e8b57", BLOCK_SPARSE: "#d9781c"}


def all_figures(rows: Sequence[Row]) -> dict[str, Figure]:
    """Those that there are rows for."""
    made: dict[str, Figure] = {}
    if contexts(rows, "needle", "multikey", "tasks"):
        made["accuracy"] = accuracy(rows)
    if contexts(rows, "bits"):
        made["bits"] = bits(rows)
    for method in METHODS:
        if find(rows, part="needle", method=method):
            made[f"needle_{method.lower()}"] = needle(rows, method)
    if contexts(rows, "layers"):
        made["layers"] = layers(rows)
    for part in ("scans", "ablations"):
        if contexts(rows, part):
            made[part] = variants(rows, part)
    return made


def accuracy(rows: Sequence[Row]) -> Figure:
    """Exact answers against context, a panel a task."""
    tasks = sorted({row["task"] for row in rows if row["part"] == "tasks"})
    panels = [("needle", {"part": "needle"}), ("multi-key", {"part": "multikey"})]
    panels += [(task, {"part": "tasks", "task": task}) for task in tasks]
    figure, all_axes = _figure(len(panels))
    for axes, (title, wanted) in zip(all_axes, panels, strict=True):
        for method in METHODS:
            found = []
            for context in contexts(rows, wanted["part"]):
                share = pooled(find(rows, method=method, context=context, **wanted))
                if share is not None:
                    found.append((context, share["accuracy"], share["low"], share["high"]))
            _line(axes, found, method)
        _by_context(axes, rows, title, "exact answers")
        axes.set_ylim(-0.03, 1.03)
    all_axes[0].legend(frameon=False)
    return figure


def bits(rows: Sequence[Row]) -> Figure:
    """Bits a byte by position in the longest context, and what the others need more."""
    context = contexts(rows, "bits")[-1]
    own = [
        row for row in find(rows, part="bits", context=context) if (row["first"], row["end"]) != (0, context)
    ]  # fmt: skip
    figure, (absolute, more) = _figure(2)
    for method in METHODS:
        of_method = find(own, method=method)
        _line(absolute, [(row["end"], row["bits"], row["low"], row["high"]) for row in of_method], method)
        if method != FLAT:
            pairs = [
                (row["end"], excess(own, method, first=row["first"], end=row["end"])) for row in of_method
            ]  # fmt: skip
            _line(more, [(end, *interval) for end, interval in pairs if interval is not None], method)
    for axes, title in ((absolute, "bits a byte"), (more, "bits a byte more than flat")):
        axes.set_xscale("log", base=2)
        ends = sorted({row["end"] for row in own})
        axes.set_xticks(ends, map(shapes.label, ends))
        axes.set(title=title, xlabel=f"position up to, in {shapes.label(context)} of held-out text")
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    return figure


def needle(rows: Sequence[Row], method: str) -> Figure:
    """Depth against context."""
    own = find(rows, part="needle", method=method)
    at, depths = sorted({row["context"] for row in own}), sorted({row["depth"] for row in own})
    # Contexts and depths that were not measured stay white.
    grid = np.full((len(depths), len(at)), np.nan)
    for row in own:
        grid[depths.index(row["depth"]), at.index(row["context"])] = row["accuracy"]
    figure, (axes,) = _figure(1)
    image = axes.imshow(grid, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
    for (i, j), value in np.ndenumerate(grid):
        if not np.isnan(value):
            axes.text(j, i, f"{100 * value:.0f}", ha="center", va="center")
    axes.set_xticks(range(len(at)), map(shapes.label, at))
    axes.set_yticks(range(len(depths)), [f"{depth:g}" for depth in depths])
    axes.set(title=f"needle, {method}: exact answers, %", xlabel="context", ylabel="depth: 0 start, 1 end")
    figure.colorbar(image, ax=axes)
    return figure


def layers(rows: Sequence[Row]) -> Figure:
    """Recall, IoU and mass by layer, a shade a context; queries of text above, of retrieval below."""
    measures = ("recall", "iou", "mass")
    figure, all_axes = _figure(6)
    at = contexts(rows, "layers")
    for axes, (queries, measure) in zip(
        all_axes, [(q, m) for q in ("text", "retrieval") for m in measures], strict=True
    ):
        for method in OTHERS:
            for i, context in enumerate(at):
                wanted = dict(part="layers", queries=queries, measure=measure, method=method, context=context)
                own = sorted(find(rows, **wanted), key=lambda row: row["layer"])
                label = f"{method}, {shapes.label(context)}"
                # The longest context is the darkest.
                alpha = (i + 1.5) / (len(at) + 0.5)
                points = [row["layer"] for row in own], [row["mean"] for row in own]
                axes.plot(*points, "o-", color=_COLORS[method], alpha=alpha, label=label)
        axes.set(title=f"{measure}, {queries} queries", xlabel="layer", ylim=(0, 1.03))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
    all_axes[0].legend(frameon=False, fontsize="x-small", ncols=2)
    return figure


def variants(rows: Sequence[Row], part: str) -> Figure:
    """Accuracy, extra bits and recall of each variant of a method, at the longest context."""
    context = contexts(rows, part)[-1]
    own = find(rows, part=part, context=context)
    names = [name for name in variants_in(own) if find(own, method=name, task="multikey")]
    shares = [pooled(find(own, method=name, task="multikey")) for name in names]
    extra = [excess(own, name) for name in names]
    recall = [averaged(own, method=name, queries="retrieval", measure="recall") for name in names]
    figure, all_axes = _figure(3, width=4.6)
    panels = (
        ("multi-key, exact answers", [np.nan if share is None else share["accuracy"] for share in shares]),
        ("bits a byte more than flat", [np.nan if more is None else more[0] for more in extra]),
        ("recall, retrieval queries", [np.nan if mean is None else mean for mean in recall]),
    )
    for i, (axes, (title, values)) in enumerate(zip(all_axes, panels, strict=True)):
        axes.barh(range(len(names)), values, color=[_COLORS.get(name, "#7fb2d8") for name in names])
        axes.set_yticks(range(len(names)), names if i == 0 else [])
        axes.invert_yaxis()
        axes.set_title(f"{title}, {shapes.label(context)}", fontsize="medium")
        axes.grid(alpha=0.3, axis="x")
    return figure


def _figure(n: int, width: float = 4.2) -> tuple[Figure, list[Any]]:
    columns = min(n, 4 if n % 3 else 3)
    lines = -(-n // columns)
    figure = Figure(figsize=(width * columns, 3.6 * lines), layout="constrained")
    FigureCanvasAgg(figure)
    all_axes = figure.subplots(lines, columns, squeeze=False).ravel()
    for axes in all_axes[n:]:
        axes.set_axis_off()
    return figure, list(all_axes[:n])


def _line(axes: Any, found: Sequence[tuple], method: str) -> None:
    if not found:
        return
    x, middle, low, high = (np.array(column, float) for column in zip(*found, strict=True))
    axes.plot(x, middle, "o-", color=_COLORS[method], label=method)
    axes.fill_between(x, low, high, color=_COLORS[method], alpha=0.15, linewidth=0)


def _by_context(axes: Any, rows: Sequence[Row], title: str, name: str) -> None:
    at = contexts(rows, "needle", "multikey", "tasks")
    axes.set_xscale("log", base=2)
    axes.set_xticks(at, map(shapes.label, at))
    axes.set(title=title, xlabel="context", ylabel=name)
    axes.grid(alpha=0.3)
