"""In which order jobs run: first those whose figures are not there, or are of other code than this."""

import dataclasses
import fnmatch
import functools
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from bench import UserError, records
from bench.renew.job import Figure, Job

# What is known of a figure, the first three of one that is due.
MISSING, OLDER, UNKNOWN, CURRENT = "not there", "older than the code", "of code that is not known", "of this code"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Planned:
    """A job, or the part of one whose figures are all due or all current.

    Attributes:
        states: one of each figure, MISSING to CURRENT.
        dates: when each that is there was measured, if that is known.
    """

    job: Job
    states: tuple[str, ...]
    dates: tuple[str, ...]

    @property
    def is_due(self) -> bool:
        return any(state != CURRENT for state in self.states) or not self.states

    @property
    def count(self) -> str:
        """ "3 not there, 2 older than the code"."""
        return ", ".join(f"{self.states.count(state)} {state}" for state in dict.fromkeys(sorted(self.states)))


def plan(
    jobs: Iterable[Job], folders: Sequence[Path], commit: str | None, device: str | None = None
) -> list[Planned]:  # fmt: skip
    """What is due, in the order of `jobs`, then what is current.

    Jobs that take rows are divided; of others all is due if one figure is. Expected seconds become those that a row
    took, where it says so.

    Args:
        folders: where result files are; the first that has one counts.
        commit: of this code; None: not known.
        device: what figures have to be of; None: any.
    """
    planned = [part for job in jobs for part in _parts(job, _rows_of(job, folders), commit, device)]
    return sorted(planned, key=lambda part: not part.is_due)


def _rows_of(job: Job, folders: Sequence[Path]) -> list[dict[str, Any]]:
    files = [folder / job.file for folder in folders if (folder / job.file).is_file()]
    return records.read(files[0]) if files else []


def _parts(
    job: Job, rows: Sequence[dict[str, Any]], commit: str | None, device: str | None
) -> Iterator[Planned]:  # fmt: skip
    known = [(figure, row := find(figure, rows, device), state(row, job.code, commit)) for figure in job.figures]
    due = [x for x in known if x[2] != CURRENT]
    current = [x for x in known if x[2] == CURRENT]
    for part in (due, current) if job.takes_rows else (known,):
        if part or not known:
            yield Planned(
                job=job.of(tuple(_as_it_took(figure, row) for figure, row, _ in part)),
                states=tuple(state for *_, state in part),
                dates=tuple(row["date"] for _, row, _ in part if row and row.get("date")),
            )


def find(figure: Figure, rows: Iterable[dict[str, Any]], device: str | None = None) -> dict[str, Any] | None:
    """The row of a figure, the newest if several devices have one."""
    wanted = {**figure.fields} | ({} if device is None else {"device": device})
    found = [row for row in rows if all(name in row and row[name] == value for name, value in wanted.items())]
    return max(found, key=lambda row: row.get("date") or "", default=None)


def state(row: dict[str, Any] | None, code: Sequence[str], commit: str | None) -> str:
    """What is known of a figure from its row: MISSING, OLDER, UNKNOWN or CURRENT."""
    if row is None:
        return MISSING
    if (of := row.get("commit")) is None:
        return UNKNOWN
    if of.endswith("+"):  # changes that no commit has, whatever they were
        return OLDER
    return CURRENT if of == commit else _compared(of, tuple(code))


@functools.cache
def _compared(commit: str, code: tuple[str, ...]) -> str:
    """Files here against those of a commit, which need not be an ancestor; 0 and 1 are `git diff`'s answers."""
    command = ["git", "-C", str(records.ROOT), "diff", "--quiet", commit, "--", *code]
    try:
        return {0: CURRENT, 1: OLDER}.get(subprocess.run(command, capture_output=True).returncode, UNKNOWN)
    except OSError:
        return UNKNOWN


def _as_it_took(figure: Figure, row: dict[str, Any] | None) -> Figure:
    return dataclasses.replace(figure, seconds=row["took_s"]) if row and row.get("took_s") else figure


def only(jobs: Iterable[Job], patterns: Sequence[str]) -> list[Job]:
    """The jobs whose names match a pattern, and of those that take rows the rows that do, as kind:row.

    Raises: UserError: a pattern that nothing matches.
    """
    jobs = list(jobs)
    for pattern in patterns:
        if not any(_figures(job, [pattern]) is not None for job in jobs):
            names = ", ".join(dict.fromkeys(job.name for job in jobs))
            raise UserError(f"--only {pattern}: no job or row has such a name; jobs are {names}")
    parts = [(job, _figures(job, patterns)) for job in jobs]
    return [job.of(figures) for job, figures in parts if figures is not None]


def _figures(job: Job, patterns: Sequence[str]) -> tuple[Figure, ...] | None:
    """Those of a job's figures that match; None: neither does the job."""
    if any(fnmatch.fnmatch(job.name, pattern) for pattern in patterns):
        return job.figures
    if not job.takes_rows:
        return None
    found = [f for f in job.figures if any(fnmatch.fnmatch(f"{job.kind}:{f.name}", p) for p in patterns)]
    return tuple(found) or None
