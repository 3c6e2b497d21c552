"""The table and the plot of ratios, from rows that `python -m bench peers` has measured."""

from typing import TYPE_CHECKING, Any

from bench.peers.compare import in_order, label

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def line(x: dict[str, Any]) -> str:
    """What is printed of a row."""
    failed = "".join(f"; {name} not timed: {why}" for name, why in x["failed"].items())
    return (
        f"{label(x):32} ours {x['ours_ms']:8.4f} ms, {x['best']} {x['best_ms']:8.4f}, ratio {x['ratio']:.3f}, "
        f"agree {x['agrees']:.4f}, {x['clock_mhz']} MHz{failed}"
    )


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown, microseconds of one call by the profiler."""
    cells = [["", "ours, us", "best peer, us", "ours / peer", "best peer"], ["---", "--:", "--:", "--:", "---"]]
    for x in in_order(rows):
        ours, best = (f"{1e3 * ms:.1f}" for ms in (x["ours_ms"], x["best_ms"]))
        cells.append([label(x), ours, best, f"{x['ratio']:.2f}", x["best"]])
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def figure(rows: list[dict[str, Any]]) -> "Figure":
    """A bar a row: our time over the best peer's. Left of the line we are faster."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # a machine that measures need not have it
    from matplotlib.figure import Figure

    rows = in_order(rows)
    result = Figure(figsize=(7, 1 + 0.28 * len(rows)), layout="constrained")
    FigureCanvasAgg(result)
    axes = result.subplots()
    ratios = [x["ratio"] for x in rows]
    colors = ["#0b6fb8" if ratio <= 1 else "#c2410c" for ratio in ratios]
    bars = axes.barh([label(x) for x in rows], ratios, color=colors)
    axes.axvline(1, color="#444444", linewidth=1)
    axes.bar_label(bars, fmt="%.2f", padding=3, fontsize="small", bbox=dict(facecolor="white", linewidth=0, pad=1))
    axes.margins(y=0.01)
    axes.invert_yaxis()
    axes.set(
        title=f"One call on one {rows[0]['device']}, by the profiler",
        xlabel="our time / best peer's time (below 1: ours is faster)",
        xlim=(0, 1.15 * max(1.0, *ratios)),
    )
    return result
