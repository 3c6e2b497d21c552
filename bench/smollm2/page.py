"""Rows of the lab as tables: a line a method, a table for each kind of indexers."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import UserError
from bench.smollm2.methods import FLAT
from bench.smollm2.prompts import KINDS

Row = dict[str, Any]
NONE = ""


def read(file: Path) -> list[Row]:
    """The rows that a run has written.

    Raises: UserError: no such file, or another kind of file.
    """
    try:
        return [json.loads(line) for line in file.read_text().splitlines()]
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read: {error}") from error


def markdown(rows: Sequence[Row]) -> str:
    """All tables."""
    parts = []
    for about in dict.fromkeys(map(_about, (row for row in rows if row["kind"] in ("compare", "answer")))):
        own = [row for row in rows if _about(row) == about]
        for topk in sorted({row["topk"] for row in own if row.get("topk")}, key=lambda k: (k != _main_topk(own), k)):
            table = _methods(own, topk)
            if table:
                parts.append(f"**{_title(about)}, {topk} tokens chosen**\n\n{table}")
        heads = [row for row in own if row["kind"] == "heads"]
        if heads:
            parts.append(f"**{_title(about)}: the heads**\n\n{_heads(heads)}")
    adversaries = [row for row in rows if row["kind"] == "adversary"]
    if adversaries:
        parts.append(f"**The adversary: recall**\n\n{_adversaries(adversaries)}")
    return "\n\n".join(parts) + "\n"


def _about(row: Row) -> tuple[Any, ...]:
    return tuple(row.get(name) for name in ("heads", "seed", "step", "joint_step"))


def _title(about: tuple[Any, ...]) -> str:
    heads, seed, step, joint = about
    together = f", then {joint} with the model" if joint else ""
    return f"{heads} heads, seed {seed}, {step} steps{together}"


def _main_topk(rows: Sequence[Row]) -> int | None:
    """The one that the model runs with."""
    return next((row["topk"] for row in rows if row["kind"] == "answer" and row["topk"]), None)


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] + ["--:"] * (len(columns) - 1), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _methods(rows: Sequence[Row], topk: int) -> str:
    compared = {row["method"]: row for row in rows if row["kind"] == "compare" and row["topk"] == topk}
    answered = {row["method"]: row for row in rows if row["kind"] == "answer" and row["topk"] in (topk, None)}
    if set(answered) == {"dense"}:
        answered = {}
    found = []
    for name in dict.fromkeys(["dense", *compared, *answered] if answered else compared):
        one, other = compared.get(name, {}), answered.get(name, {})
        cells = [name, _number(one, "candidates", ".0f"), _number(one, "recall", ".4f")]
        cells += [_number(one, "worst_layer", ".3f"), _number(one, "mass", ".3f")]
        if answered:
            base = FLAT if name != "dense" else "dense"
            cells.append(_number(other, f"over_{base}", "+.4f") + _interval(other, f"over_{base}_se"))
            kinds = other.get("answers", {})
            cells += [_answers(kinds.get(kind)) for kind in KINDS]
        found.append(cells)
    columns = ["candidates by", "tokens", "recall", "worst layer", "attention mass"]
    return table([*columns, *(["bits over flat", *KINDS] if answered else [])], found) if found else ""


def _answers(kind: Row | None) -> str:
    """Words: how many are the likeliest of the choices. Passages: the share of tokens that are the likeliest."""
    if kind is None:
        return NONE
    several = kind["asked"] and kind["best"] == 0 and kind["tokens"] > 0
    return f"{100 * kind['tokens']:.0f} % of tokens" if several else f"{kind['best']} of {kind['asked']}"


def _heads(rows: Sequence[Row]) -> str:
    found = [
        [
            row["measure"].replace("_", " "),
            f"{row['mean']:.3f}",
            f"{min(row['by_layer']):.3f}",
            f"{max(row['by_layer']):.3f}",
        ]
        for row in rows
    ]
    return table(["measure", "mean", "least layer", "greatest layer"], found)


def _adversaries(rows: Sequence[Row]) -> str:
    names = list(rows[0]["recall"])
    columns = [
        "method",
        *(f"{row['open']:g} open, {row['shared']:g} shared, {row['negative']:g} below 0" for row in rows),
    ]
    return table(columns, [[name, *(f"{row['recall'][name]:.3f}" for row in rows)] for name in names])


def _number(row: Row, name: str, form: str) -> str:
    return NONE if row.get(name) is None else f"{row[name]:{form}}"


def _interval(row: Row, name: str) -> str:
    return f" ± {1.96 * row[name]:.4f}" if row.get(name) else NONE
