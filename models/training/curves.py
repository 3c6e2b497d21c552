"""The figure of a run's curves.csv."""

import csv
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

_PANELS = (
    ("text_bits", "text, bits a byte"),
    ("answers_right", "answer bytes predicted"),
    ("kl", "KL of the indexer, nats"),
)
_SMOOTHED = 20  # steps


def draw(source: Path, target: Path) -> None:
    """Draws loss, retrieval and KL against bytes read, stage by stage, as PNG."""
    with source.open(newline="") as file:
        rows = list(csv.DictReader(file))
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (column, title) in zip(figure.subplots(1, len(_PANELS)), _PANELS, strict=True):
        for stage in dict.fromkeys(row["stage"] for row in rows):
            own = [row for row in rows if row["stage"] == stage]
            x = np.array([int(row["bytes"]) for row in own]) / 1e6
            y = np.array([float(row[column]) for row in own])
            if column != "kl" or y.any():
                (line,) = axes.plot(x, y, alpha=0.25)
                axes.plot(x, _smooth(y), color=line.get_color(), label=stage)
        axes.set_xlabel("million bytes read")
        axes.set_title(title)
        axes.grid(alpha=0.3)
        if column == "kl":
            axes.set_yscale("log")
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize="small")
    figure.savefig(target, dpi=120)


def _smooth(y: np.ndarray) -> np.ndarray:
    """Mean of the last `_SMOOTHED` values."""
    sums = np.cumsum(np.concatenate([[0.0], y]))
    at = np.arange(1, len(y) + 1)
    first = np.maximum(at - _SMOOTHED, 0)
    return (sums[at] - sums[first]) / (at - first)
