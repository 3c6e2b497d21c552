"""What lm-eval found for several indexers, as one table: values with intervals, differences on the same questions."""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from hisa_jax.models.evaluate import statistics

LENGTH = "max_length"  # how a question says how long it is, ours as RULER's


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        task, metric: as lm-eval calls them.
        length: tokens of the questions, None if they do not say.
        values: by indexer, of each question in the same order.
    """

    task: str
    metric: str
    length: int | None
    values: dict[str, list[float]]


def rows_of(samples: Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]]) -> list[Row]:
    """The rows of what was asked.

    Args:
        samples: by indexer and task lm-eval's samples of each question.

    Returns: rows in the order of tasks. A metric that is no number a question has none.
    Raises: ValueError: indexers that were asked different questions.
    """
    rows: dict[tuple[str, str, int | None], Row] = {}
    for indexer, of_tasks in samples.items():
        for task, of_task in of_tasks.items():
            for sample in sorted(of_task, key=lambda sample: sample["doc_id"]):
                length = sample["doc"].get(LENGTH)
                for metric, value in _metrics(sample, length):
                    row = rows.setdefault((task, metric, length), Row(task, metric, length, {}))
                    row.values.setdefault(indexer, []).append(value)
    for row in rows.values():
        if len({len(values) for values in (row.values.get(indexer, []) for indexer in samples)}) > 1:
            raise ValueError(f"{row.task}: indexers have {row.metric} of different questions")
    return sorted(rows.values(), key=lambda row: (row.task, row.metric, row.length or 0))


def _metrics(sample: Mapping[str, Any], length: int | None) -> Iterator[tuple[str, float]]:
    several = sample.get("filter", "none") != "none"
    for metric in sample["metrics"]:
        value, name = sample[metric], metric
        if metric.isdigit():  # RULER's metrics are lengths, and -1 at those of other questions
            if metric != str(length):
                continue
            name = "string match"
        if isinstance(value, int | float | np.number | np.bool_) and not math.isnan(value):
            yield f"{name}, {sample['filter']}" if several else name, float(value)


def json_of(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Rows with all that the table shows, and each question's value."""
    found = []
    for row in rows:
        first = next(iter(row.values))
        for indexer, values in row.values.items():
            mean, low, high = map(_finite, interval(values))
            difference = None
            if indexer != first:
                compared = map(_finite, statistics.paired(row.values[first], values))
                difference = dict(zip(("mean", "low", "high"), compared, strict=True))
            found.append({
                "task": row.task, "metric": row.metric, "length": row.length, "indexer": indexer, "n": len(values),
                "mean": mean, "low": low, "high": high, "difference": difference, "values": values,
            })  # fmt: skip
    return found


def _finite(number: float) -> float | None:
    """JSON has no NaN."""
    return None if math.isnan(number) else number


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean and 95 % interval: Wilson's where all values are 0 or 1, else the normal one."""
    if set(values) <= {0.0, 1.0}:
        return sum(values) / len(values), *statistics.wilson(int(sum(values)), len(values))
    return statistics.mean(values)


def table(rows: Sequence[Row]) -> list[str]:
    """The lines of the table: a column an indexer; all but the first with their difference to it."""
    if not rows:
        return []
    indexers = list(rows[0].values)
    header = ["task", "tokens", "metric", "n", indexers[0], *(f"{name}, minus {indexers[0]}" for name in indexers[1:])]
    body = [header]
    for row in rows:
        first = row.values[indexers[0]]
        cells = [row.task, "" if row.length is None else str(row.length), row.metric, str(len(first))]
        for indexer in indexers:
            cells.append(_shown(interval(row.values[indexer])))
            if indexer != indexers[0]:
                cells[-1] += "  " + _shown(statistics.paired(first, row.values[indexer]), "+")
        body.append(cells)
    widths = [max(map(len, column)) for column in zip(*body, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip() for cells in body]
    return [lines[0], "-" * max(map(len, lines)), *lines[1:]]


def _shown(found: tuple[float, float, float], sign: str = "") -> str:
    mean, low, high = found
    bounds = "" if math.isnan(low) else f" [{low:{sign}.3f}, {high:{sign}.3f}]"
    return f"{mean:{sign}.3f}{bounds}"
