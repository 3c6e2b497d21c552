"""The picture of docs/lighthouse.md from rows that `python -m bench lighthouse --json` wrote."""

from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from bench import shapes

_STAGES = {"score": "#9ecae1", "select": "#6baed6", "gather": "#4292c6", "spread": "#2171b5", "attention": "#fdae6b"}


def figure(rows: list[dict[str, Any]]) -> Figure:
    """How many times faster than dense attention by context, and what the forward pass is spent on."""
    picture = Figure(figsize=(10, 3.6), layout="constrained")
    FigureCanvasAgg(picture)
    gains, shares = picture.subplots(1, 2)
    rows = sorted(rows, key=lambda row: row["tokens"])
    at, labels = np.arange(len(rows)), [shapes.label(row["tokens"]) for row in rows]
    for field, label in (("forward_gain", "forward"), ("forward_backward_gain", "forward and gradient")):
        gains.plot(at, [row[field] for row in rows], marker="o", label=label)
    gains.axhline(rows[0]["ceiling"], color="#888888", linestyle="--", label="(tokens / entries) squared")
    gains.set_ylim(0)
    gains.set_ylabel("times faster than dense attention")
    bottom = np.zeros(len(rows))
    for stage, color in _STAGES.items():
        whole = [sum(row["ms"][name] for name in _STAGES) for row in rows]
        share = np.array([100 * row["ms"][stage] / ms for row, ms in zip(rows, whole, strict=True)])
        shares.bar(at, share, bottom=bottom, color=color, label=stage)
        bottom += share
    shares.set_ylabel("% of the stages of a forward pass")
    for axes in (gains, shares):
        axes.set_xticks(at, labels)
        axes.set_xlabel("tokens")
        axes.legend(fontsize="small")
    return picture
