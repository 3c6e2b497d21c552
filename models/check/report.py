"""What `check` shows and writes: means over layers, the worst layer, all layers as JSON."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import hisa_jax as hj
from hisa_jax.models.check.measures import FLAT, Measured

SHARE = 0.995  # of the flat indexer's tokens
_COLUMNS = {"recall": ("recall", 4), "mass": ("attention", 3), "iou": ("IoU", 3)}  # heading, digits of the mean


def rows_of(methods: Mapping[str, hj.Method], layers: Mapping[int, Mapping[str, Measured]]) -> list[dict[str, Any]]:
    """A method each: by measure the mean over layers, the worst layer's value, and every layer's."""
    rows = []
    for name, method in methods.items():
        row: dict[str, Any] = {"method": name, "definition": repr(method), "candidates": candidates_of(method)}
        for measure in _COLUMNS:
            row[measure] = summary({layer: getattr(of[name], measure) for layer, of in layers.items()}, min)
        rows.append(row)
    return rows


def summary(by_layer: Mapping[int, float], worst: Any) -> dict[str, Any]:
    """The mean over layers, the worst one, and all of them."""
    layer = worst(by_layer, key=lambda layer: by_layer[layer])
    return {
        "mean": sum(by_layer.values()) / len(by_layer), "worst": by_layer[layer], "worst_layer": layer,
        "by_layer": {str(layer): value for layer, value in by_layer.items()},
    }  # fmt: skip


def candidates_of(method: hj.Method) -> int | None:
    """Tokens that are scored exactly for a query; None: all that it sees."""
    return None if isinstance(method, hj.Dsa) else method.block_topk * method.block_size


def table(rows: Sequence[Mapping[str, Any]]) -> Any:
    """For a terminal."""
    from rich import box
    from rich.table import Table

    made = Table(
        title="Against the flat indexer: mean over layers, worst layer (its number)",
        title_justify="left",
        box=box.SIMPLE,
        pad_edge=False,
        show_edge=False,
    )
    for column in ("method", "candidates", *(heading for heading, _ in _COLUMNS.values())):
        made.add_column(column, justify="left" if column == "method" else "right")
    for row in rows:
        cells = [row["method"], "all" if row["candidates"] is None else f"{row['candidates']:,}"]
        for measure, (_, digits) in _COLUMNS.items():
            found = row[measure]
            cells.append(f"{found['mean']:.{digits}f} {found['worst']:.3f} ({found['worst_layer']})")
        made.add_row(*cells, style="bold" if row["method"] == FLAT else "")
    return made


def sentences(data: Mapping[str, Any]) -> list[str]:
    """What the table means, and what was read."""
    fewest, topk = data["fewest_candidates"], data["topk"]
    return [
        f"{100 * SHARE:g} % of the flat indexer's tokens over all layers takes hj.Scan(topk={topk}, "
        f"candidates={fewest['all']}) ({fewest['all'] / topk:.2f} k), in the worst layer, {fewest['worst_layer']}, "
        f"{fewest['worst']:,} ({fewest['worst'] / topk:.2f} k).",
        f"Read: {data['tokens']:,} tokens of {data['text']}; {data['queries']} queries of the last half, which select "
        f"{topk:,} tokens each. Attention: the share of the model's own attention over all visible tokens that "
        "falls on the selected ones.",
    ]


def write(path: Path, data: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=1) + "\n")
