"""What the demo measures at one context, for who prints it."""

import dataclasses
from typing import Any

import hisa_jax as hj
from bench.quality.ngrams import Task


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """What was measured at one context.

    Attributes:
        recent: tokens before a query in which a place does not count as found.
        rows: a method each, as they are written to JSON.
        n_identical: queries for which a method was found identical to the flat indexer, as the contract has it.
        flat, scan: their selections, the flat one with its scores.
    """

    context: int
    recent: int
    task: Task
    rows: list[dict[str, Any]]
    n_identical: dict[str, int]
    flat: hj.Selection
    scan: hj.Selection
