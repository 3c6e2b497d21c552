"""The rows of `python -m bench indexers` as tables in Markdown."""

from collections.abc import Sequence
from typing import Any

Row = dict[str, Any]


def tables(rows: Sequence[Row]) -> str:
    """A table an indexer, those that choose over pools first; what training reached stands before it."""
    parts = []
    for indexer in dict.fromkeys(row["indexer"] for row in rows):
        of = [row for row in rows if row["indexer"] == indexer]
        trained = [row for row in of if row["part"] == "train"]
        measured = [row for row in of if row["part"] != "train"]
        lines = [f"**{indexer}**"]
        if trained:
            lines[0] += f", trained for {trained[-1]['step']} steps to a divergence of {trained[-1]['kl']:.3f}"
        if measured:
            lines += ["", *table(measured)]
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def table(rows: Sequence[Row]) -> list[str]:
    """Lines of one table; costs where the rows have them."""
    if "worst_query" in rows[0]:
        lines = ["| rule | recall, mean / worst query |", "|---|--:|"]
        return lines + [f"| {row['method']} | {row['recall']:.3f} / {row['worst_query']:.3f} |" for row in rows]
    columns = ["rule", "recall of text", "of questions", "bits over flat", "answers"]
    if has_costs := "cost" in rows[0]:
        columns[1:1] = ["cost", "at 128K"]
    lines = [f"| {' | '.join(columns)} |", f"|---{'|--:' * (len(columns) - 1)}|"]
    for row in rows:
        cells = [
            _recall(row, "text"), _recall(row, "asking"), _over(row), f"{row['right']} of {row['questions']}",
        ]  # fmt: skip
        if has_costs:
            cells[:0] = [f"{row['cost']:.3f}", f"{row['cost_128K']:.3f}"]
        lines.append(f"| {row['method']} | {' | '.join(cells)} |")
    return lines


def _recall(row: Row, kind: str) -> str:
    """Of all layers, and of the worst one."""
    return f"{row[f'recall_{kind}']:.3f} / {row[f'worst_{kind}']:.3f}"


def _over(row: Row) -> str:
    interval = row["bits_interval"]
    return f"{row['bits_over']:+.4f}" + (f" ± {interval:.4f}" if interval == interval and interval else "")
