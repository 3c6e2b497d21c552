"""What is written down of a measurement: the machine, numbers as JSON has them, rows one after the other."""

import contextlib
import fnmatch
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import jax


class Named(Protocol):
    """A row to measure, whose `str` says which one failed."""

    @property
    def row(self) -> str: ...


def device() -> dict[str, Any]:
    """What a figure was measured on."""
    return {
        "device": jax.devices()[0].device_kind, "platform": jax.default_backend(), "cpu_cores": os.cpu_count(),
        "jax": jax.__version__,
    }  # fmt: skip


def plain(value: Any, digits: int) -> Any:
    """The same in so many digits, with null for what is not a number, which JSON does not have."""
    if isinstance(value, float):
        return float(f"{value:.{digits}g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: plain(item, digits) for name, item in value.items()}
    return [plain(item, digits) for item in value] if isinstance(value, list | tuple) else value


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A file to write, which becomes `path` when it is whole: a run may be stopped at any time."""
    partial = path.with_name(f"partial-{path.name}")
    yield partial
    partial.replace(path)


def measure_all[Row: Named](
    rows: Iterable[Row], pattern: str, measure: Callable[[Row], dict], line: Callable[[dict], str], file: Path | None
) -> int:
    """Measures rows and prints a line of each.

    Args:
        rows: of which those run whose name matches `pattern`.
        measure: gives the figures of a row, which `line` prints.
        file: where all figures are written as JSON; None: nowhere.

    Returns: the exit status, 1 if a row failed.
    """
    results, failed = [], 0
    for row in rows:
        if not fnmatch.fnmatch(row.row, pattern):
            continue
        try:
            results.append(measure(row))
            print(line(results[-1]), flush=True)
        except Exception as error:  # a row that fails must not cost the others; the exit status tells
            failed += 1
            print(f"{row}: FAILED {error!r:.300}", flush=True)
        if file:  # after each, since the machine may be taken away
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(results, indent=1) + "\n")
    return 1 if failed else 0
