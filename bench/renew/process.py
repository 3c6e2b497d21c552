"""A job that runs: its process and all that this one has started, its log, and how it ended."""

import contextlib
import dataclasses
import itertools
import os
import re
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO

from bench import UserError, records
from bench.renew.job import Figure, Job
from bench.renew.plan import find

# A row of a bench, or a test of several processes, that has failed.
_FAILED = re.compile(r": FAILED |\] (FAILED|ERROR) ")
_GONE_S = 5.0  # within which a process that was killed has to be gone


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ended:
    """How a job ended.

    Attributes:
        how: "measured", "failed", "hung" or "stopped", since time was up.
        why: the line that says so, "" if it was all right.
        measured, missed: its figures.
        again: what of it is worth another process: rows after the one at which this one stuck; None: nothing.
        gpus: that are free again; those of a process that cannot be killed are not.
        is_refused: it came to no row, as far as it says: a package is missing, say. No other process of it would.
    """

    job: Job
    how: str
    why: str
    seconds: float
    measured: tuple[Figure, ...]
    missed: tuple[Figure, ...]
    again: Job | None
    gpus: tuple[str, ...]
    is_refused: bool


class Running:
    """A job on some GPUs, and some cores.

    Args:
        environment: of the process, but for what the job and its GPUs add.
        cores: that its threads may use; none: all.
        tell: is given each line that says that something failed.
    """

    def __init__(
        self, job: Job, gpus: Sequence[str], cores: Sequence[int], results: Path, logs: Path,
        environment: Mapping[str, str], tell: Callable[[str], None],
    ):  # fmt: skip
        self.job, self.gpus, self._tell = job, tuple(gpus), tell
        self._results, self._began = results, records.now()
        self.started = self._last_line_at = time.monotonic()
        self._unfinished, self._last, self._failures = b"", "", list[str]()
        command = job.command(results)
        with _new(logs, job.name.replace(":", "-")) as log:
            log.write(f"== {records.now()} {shlex.join(command)}\n".encode())
            log.flush()
            self._log = open(log.name, "rb")  # noqa: SIM115, it is read until the process has ended
            self._log.seek(0, os.SEEK_END)
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, cwd=records.ROOT,
                env={**environment, **job.environment, "CUDA_VISIBLE_DEVICES": ",".join(gpus)}, start_new_session=True,
            )  # fmt: skip
        # Another job compiles meanwhile: on cores of its own it does not delay what this one's host launches.
        if cores and hasattr(os, "sched_setaffinity"):
            with contextlib.suppress(ProcessLookupError):  # it has ended
                os.sched_setaffinity(self._process.pid, cores)

    @property
    def expected_end(self) -> float:
        return max(self.started + self.job.seconds, time.monotonic() + 1)

    def look(self) -> Ended | None:
        """Reads what it has printed, ends it if it hangs; None: it runs."""
        code = self._process.poll()  # before its lines are read, so that none comes later
        self._read_lines()
        if code is not None:
            self._kill()  # what it has started and left
            return self._ended("failed" if code else "measured", self._why(code), is_cut=code < 0)
        silent = time.monotonic() - self._last_line_at
        if silent > self.job.patience_s:
            return self.end("hung", f"no line for {silent:.0f} s, the last: {self._last or 'none'}")
        return None

    def end(self, how: str, why: str) -> Ended:
        """Kills it and all that it has started."""
        self._kill()
        try:
            self._process.wait(_GONE_S)
        except subprocess.TimeoutExpired:
            why += f"; process {self._process.pid} does not end, its GPUs are left to it"
            self.gpus = ()
        self._read_lines()
        return self._ended(how, why, is_cut=True)

    def _kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def _read_lines(self) -> None:
        new = self._log.read()
        if not new:
            return
        self._last_line_at = time.monotonic()
        *lines, self._unfinished = (self._unfinished + new).split(b"\n")
        for line in (raw.decode(errors="replace").strip() for raw in lines):
            self._last = line or self._last
            if _FAILED.search(line):
                self._failures.append(line)
                self._tell(f"  {self.job.name}: {line}")

    def _why(self, code: int) -> str:
        if code < 0:
            return f"{signal.Signals(-code).name}, the last line: {self._last or 'none'}"
        if code and self._failures and self.job.figures:
            return self._failures[-1]
        return (self._last or f"exit status {code}") if code else ""

    def _ended(self, how: str, why: str, is_cut: bool) -> Ended:
        """`is_cut`: in the middle of a row, for all that is known."""
        self._log.close()
        job, seconds = self.job, time.monotonic() - self.started
        try:
            rows = records.read(self._results / job.file) if job.file else []
        except UserError as error:
            rows, why = [], str(error)
        missed = tuple(f for f in job.figures if not ((row := find(f, rows)) and row.get("date", "") >= self._began))
        measured = tuple(figure for figure in job.figures if figure not in missed)
        says_all_is_well = how == "measured"  # so that rows that are not there have to be missed, as of other peers
        if says_all_is_well and missed:
            how, why = "failed", f"{len(missed)} rows are not in {job.file}; the last line: {self._last or 'none'}"
        is_refused = not (measured or self._failures or is_cut) and bool(missed)
        is_over = is_refused or how == "stopped" or says_all_is_well
        again = None if is_over else self._again(missed, bool(measured), is_cut)
        return Ended(
            job=job, how=how, why=why, seconds=seconds, measured=measured, missed=missed, gpus=self.gpus, again=again,
            is_refused=is_refused,
        )  # fmt: skip

    def _again(self, missed: Sequence[Figure], has_measured: bool, is_cut: bool) -> Job | None:
        """The rows that it did not come to, or that failed after another one, which may have left the GPU unusable."""
        if not self.job.takes_rows or (self.job.is_rest and not has_measured):
            return None
        told = [line.partition(": FAILED ")[0] for line in self._failures]
        rest = [figure for figure in missed if figure.name not in told] if is_cut else missed
        return dataclasses.replace(self.job.of(tuple(rest[1:])), is_rest=True) if rest[1:] else None


def _new(folder: Path, name: str) -> IO[bytes]:
    """A log that no other process has, to write: name.log, name-2.log, ..."""
    for number in itertools.count(1):
        with contextlib.suppress(FileExistsError):
            return (folder / (f"{name}.log" if number == 1 else f"{name}-{number}.log")).open("xb")
    raise AssertionError
