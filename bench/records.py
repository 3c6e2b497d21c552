"""What is written down of a measurement: the machine and the code, numbers as JSON has them, rows of a file."""

import contextlib
import datetime
import fcntl
import fnmatch
import functools
import json
import math
import os
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax

from bench import UserError

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
COMMIT = "HISA_JAX_COMMIT"  # what `python -m bench renew --commit` tells its jobs, of a copy that has no .git
CODE = ("hisa_jax", "kernels_pallas", "models", "bench", ":!bench/results")
# What a row is of, as far as it says so. All else is what was found, or the circumstances.
_IDENTITY = (
    "row", "device", "implementation", "shape", "model", "config", "layers", "attention_only", "indexer", "method",
    "mesh", "devices", "context", "queries", "batch", "requests", "n_new", "chunk", "page_size", "dtype", "latents",
    "tokens", "heads", "dim",
)  # fmt: skip


class Named(Protocol):
    """A row to measure, whose `str` tells it from all others."""

    @property
    def row(self) -> str: ...


def device() -> dict[str, Any]:
    """What a figure was measured on, of which code, and when."""
    return {
        "device": jax.devices()[0].device_kind, "platform": jax.default_backend(), "cpu_cores": os.cpu_count(),
        "jax": jax.__version__, "commit": commit(), "date": now(),
    }  # fmt: skip


@functools.cache
def commit() -> str | None:
    """The short hash of this checkout's commit, with a "+" if code differs from it; None: this is no checkout."""
    if given := os.environ.get(COMMIT):
        return given
    found = git("rev-parse", "--show-toplevel", "--short", "HEAD").split("\n")
    if len(found) < 2 or Path(found[0]) != ROOT.resolve():  # none, or that of a repository around a copy
        return None
    return found[1] + ("+" if git("status", "--porcelain", "--", *CODE) else "")


def git(*arguments: str) -> str:
    """What git says of this checkout; nothing where there is no git or it fails."""
    try:
        command = ["git", "--no-optional-locks", "-C", str(ROOT), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()


def now() -> str:
    """The time, UTC: these texts are ordered as their times are."""
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


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


def read(file: Path) -> list[dict[str, Any]]:
    """The rows of a file, none if it is not there. Raises UserError if it holds something else."""
    if not file.exists():
        return []
    try:
        rows = json.loads(file.read_text())
    except ValueError as error:
        raise UserError(f"{file}: wanted rows as JSON: {error}") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{file}: wanted a list of rows, it holds a {type(rows).__name__}")
    return rows


def merge(file: Path, row: dict[str, Any]) -> None:
    """Writes a row into a file of rows: in the place of the one that is of the same, or as the last.

    Several processes may do so at once, and each may be stopped at any time: the file is always whole.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with _alone_in(file.parent):
        rows = read(file)
        places = [i for i, other in enumerate(rows) if identity(other) == identity(row)]
        if places:
            rows[places[0]] = row
        else:
            rows.append(row)
        with whole_file(file) as partial:
            partial.write_text(json.dumps(rows, indent=1) + "\n")


def identity(row: dict[str, Any]) -> str:
    """What a row is of: what a later measurement of the same has, too."""
    return json.dumps({name: row[name] for name in _IDENTITY if name in row}, sort_keys=True)


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Other processes that ask wait. The lock is the folder's own, so that no file is left, and ends with a process."""
    opened = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(opened, fcntl.LOCK_EX)
        yield
    finally:
        os.close(opened)


def measure_all[Row: Named](
    rows: Iterable[Row], patterns: Sequence[str], measure: Callable[[Row], dict], line: Callable[[dict], str],
    file: Path | None,
) -> int:  # fmt: skip
    """Measures rows and prints a line of each.

    Args:
        rows: of which those run whose name, or whole text, matches one of `patterns`.
        measure: gives the figures of a row, which `line` prints.
        file: where each is written as soon as it is measured (`merge`); None: nowhere.

    Returns: the exit status, 1 if a row failed.
    Raises: UserError: no row matches; `file` holds something else; what `measure` says of the options.
    """
    rows = list(rows)
    chosen = [row for row in rows if any(fnmatch.fnmatch(x, p) for x in (row.row, str(row)) for p in patterns)]
    if rows and not chosen:
        raise UserError(f"--rows {' '.join(patterns)}: no row has such a name; there are {_some(rows)}")
    if file:
        read(file)  # what cannot be written to is said before anything is measured
    failed = 0
    for row in chosen:
        start = time.perf_counter()
        try:
            result = measure(row)
            result["took_s"] = round(time.perf_counter() - start, 1)
            if file:
                merge(file, result)
            print(line(result), flush=True)
        except UserError:
            raise
        except Exception as error:  # a row that fails must not cost the others; the exit status tells
            failed += 1
            print(f"{row}: FAILED {error!r:.300}", flush=True)
    return 1 if failed else 0


def _some(rows: Sequence[Named]) -> str:
    names = list(dict.fromkeys(row.row for row in rows))
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
