"""Rows of the lab as tables, for each kind of indexers: text and answers, selections, heads."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import UserError
from bench.smollm2.methods import FLAT
from bench.smollm2.prompts import COPY, KINDS

Row = dict[str, Any]
_NONE = ""
_ABOUT = ("heads", "seed", "step", "schedule", "queries", "joint_step")


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
    measured = [row for row in rows if row["kind"] in ("compare", "answer", "heads")]
    for about in dict.fromkeys(map(_about, measured)):
        own = [row for row in measured if _about(row) == about]
        for title, made in (
            ("text and answers", _answers(own)),
            ("recall of flat: mean / worst layer", _selections(own)),
            ("recall at other numbers of chosen tokens", _other_topks(own)),
            ("the heads", _heads(own)),
        ):
            if made:
                parts.append(f"**{_title(about)}: {title}**\n\n{made}")
    opposed = [row for row in rows if row["kind"] == "adversary"]
    if opposed:
        parts.append(f"**Heads that have nothing in common: recall of the flat selection**\n\n{_adversary(opposed)}")
    return "\n\n".join(parts) + "\n"


def _about(row: Row) -> tuple[Any, ...]:
    return tuple(row.get(name) for name in _ABOUT)


def _title(about: tuple[Any, ...]) -> str:
    heads, seed, step, schedule, queries, joint = about
    together = f", then {joint} with the model" if joint else ""
    return f"{heads} heads, seed {seed}, {step} of {schedule} steps of {queries} queries{together}"


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] + ["--:"] * (len(columns) - 1), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _answers(rows: Sequence[Row]) -> str:
    """A line a method: what its candidates are, what they hold, what the model does with them."""
    # A part run twice counts once.
    answered = list({row["method"]: row for row in rows if row["kind"] == "answer"}.values())
    compared = {row["method"]: row for row in rows if row["kind"] == "compare" and row["topk"] == _topk(rows)}
    found = []
    for row in answered:
        one = compared.get(row["method"], {})
        base = FLAT if f"over_{FLAT}" in row else "dense"
        found.append([
            row["method"], _number(one, "candidates", ".0f"), _number(one, "recall", ".4f"),
            _number(one, "worst_layer", ".3f"), _number(one, "mass", ".3f"),
            f"{row[f'over_{base}']:+.4f} ± {1.96 * row[f'over_{base}_se']:.4f}" if row["method"] != base else "0",
            *(_of_kind(row["answers"].get(kind), kind) for kind in KINDS),
        ])  # fmt: skip
    columns = ["candidates by", "tokens", "recall", "worst layer", "attention mass", f"bits over {FLAT}", *KINDS]
    return table(columns, found) if found else ""


def _of_kind(kind: Row | None, name: str) -> str:
    if kind is None:
        return _NONE
    return f"{100 * kind['tokens']:.0f} % of tokens" if name == COPY else f"{kind['right']} of {kind['asked']}"


def _topk(rows: Sequence[Row]) -> int:
    """The number of chosen tokens that the model runs with: most methods are compared at it."""
    topks = [row["topk"] for row in rows if row["kind"] == "compare"]
    return max(set(topks), key=topks.count, default=0)


def _parts(method: str) -> tuple[str, str]:
    """ "scan, 2 k" -> "scan", "2 k"."""
    name, _, times = method.rpartition(", ")
    return (name, times) if times.endswith(" k") else (method, "")


def _selections(rows: Sequence[Row]) -> str:
    """A line a way to find candidates, a column how many, in times k."""
    topk = _topk(rows)
    cells: dict[str, dict[str, str]] = {}
    for row in rows:
        if row["kind"] == "compare" and row["topk"] == topk and row["method"] != FLAT:
            name, times = _parts(row["method"])
            cells.setdefault(name, {})[times] = f"{row['recall']:.4f} / {row['worst_layer']:.2f}"
    columns = sorted({times for of in cells.values() for times in of}, key=lambda times: (len(times) == 0, times))
    named = ["k" if times == "" else times for times in columns]
    lines = [[name, *(of.get(times, _NONE) for times in columns)] for name, of in cells.items()]
    return table(["candidates by", *named], lines) if lines else ""


def _other_topks(rows: Sequence[Row]) -> str:
    compared = [row for row in rows if row["kind"] == "compare" and row["method"] != FLAT]
    topks = sorted({row["topk"] for row in compared})
    others = {row["method"] for row in compared if row["topk"] != _topk(rows)}
    if not others:
        return ""
    of = {(row["method"], row["topk"]): f"{row['recall']:.4f}" for row in compared}
    names = [name for name in dict.fromkeys(row["method"] for row in compared) if name in others]
    return table(
        ["candidates by", *(f"k = {k}" for k in topks)], [[n, *(of.get((n, k), _NONE) for k in topks)] for n in names]
    )


def _heads(rows: Sequence[Row]) -> str:
    found = [
        [row["measure"].replace("_", " "), *(f"{x:.3f}" for x in (row["mean"], min(layers), max(layers)))]
        for row in rows
        if row["kind"] == "heads" and (layers := row["by_layer"])
    ]
    return table(["measure", "mean", "least layer", "greatest layer"], found) if found else ""


def _adversary(rows: Sequence[Row]) -> str:
    """A line a case, a column a method."""
    names = [name for name in rows[0]["recall"] if name != FLAT]
    lines = [
        [f"{row['open']:.0%} open, {row['shared']:.0%} shared, {row['negative']:.0%} below 0"]
        + [f"{row['recall'][name]:.3f}" if name in row["recall"] else _NONE for name in names]
        for row in rows
    ]
    return table(["heads", *names], lines)


def _number(row: Row, name: str, form: str) -> str:
    return _NONE if row.get(name) is None else f"{row[name]:{form}}"
