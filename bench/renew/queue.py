"""Jobs on the GPUs of this machine, in their order, until all have run or time is up.

A job starts when as many GPUs are free as it takes. While one that takes several waits for them, those after it run
that end before. Where time is short, a job that takes rows measures the first of them.
"""

import dataclasses
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from bench.renew.job import Figure, Job
from bench.renew.process import Ended, Running

_TICK_S = 0.05


@dataclasses.dataclass(frozen=True, kw_only=True)
class Place:
    """Where jobs run.

    Attributes:
        gpus: as CUDA_VISIBLE_DEVICES names them.
        ends_at: when all has to have ended, by `time.monotonic`; None: never.
        results, logs: folders.
        environment: of all processes.
    """

    gpus: tuple[str, ...]
    ends_at: float | None
    results: Path
    logs: Path
    environment: Mapping[str, str]

    def cores(self, gpus: Sequence[str]) -> list[int]:
        """The share of these GPUs of the cores that this process has; none: no core has to be left to others."""
        if len(gpus) == len(self.gpus) or not hasattr(os, "sched_getaffinity"):
            return []
        every, n = sorted(os.sched_getaffinity(0)), len(self.gpus)
        return [core for i, core in enumerate(every) if self.gpus[i * n // len(every)] in gpus]

    @property
    def left_s(self) -> float:
        return float("inf") if self.ends_at is None else self.ends_at - time.monotonic()


def run(
    jobs: Sequence[Job], place: Place, tell: Callable[[str], None], tick_s: float = _TICK_S
) -> tuple[list[Ended], list[Job]]:
    """Runs jobs; returns how they ended, and what was not started.

    Args:
        tell: is given a line for each job that ends, and for each failure meanwhile.
    """
    waiting, running, ended, free = list(jobs), list[Running](), list[Ended](), list(place.gpus)
    refused = list[Job]()
    began = time.monotonic()

    def took(end: Ended) -> None:
        ended.append(end)
        free.extend(end.gpus)
        free.sort(key=place.gpus.index)
        if end.again is not None:
            waiting.insert(0, end.again)
        if end.is_refused:  # with what other processes of it were to measure
            refused.extend(job for job in waiting if job.name == end.job.name)
            waiting[:] = [job for job in waiting if job.name != end.job.name]
        tell(f"{time.monotonic() - began:5.0f} s  {line(end)}")

    try:
        while True:
            while start := _next(waiting, running, free, place):
                at, job = start
                gpus = [free.pop(0) for _ in range(job.gpus)]
                rest = _without(waiting.pop(at), job.figures)
                if rest is not None:
                    waiting.insert(at, rest)
                cores = place.cores(gpus)
                running.append(Running(job, gpus, cores, place.results, place.logs, place.environment, tell))
            if not running:
                return ended, [*refused, *waiting]
            time.sleep(tick_s)
            is_over = place.left_s <= 0
            for one in list(running):
                end = one.end("stopped", "time is up") if is_over else one.look()
                if end is not None:
                    running.remove(one)
                    took(end)
    finally:
        for one in running:  # this process is to end
            took(one.end("stopped", "interrupted"))


def _next(
    waiting: Sequence[Job], running: Sequence[Running], free: Sequence[str], place: Place
) -> tuple[int, Job] | None:
    """The place of the next job to start, and what of it there is time for; None: nothing can start now."""
    until_s = place.left_s
    for at, job in enumerate(waiting):
        part = job.within(until_s)
        if part is not None and part.gpus <= len(free):
            return at, part
        wait_s = _wait_s(running, job.gpus - len(free)) if job.gpus > len(free) else None
        # What then has no time left never starts, and no other waits for it.
        if wait_s is not None and job.within(place.left_s - wait_s) is not None:
            until_s = min(until_s, wait_s)
    return None


def _wait_s(running: Sequence[Running], n: int) -> float | None:
    """Seconds until n more GPUs are free, about; None: so many never are."""
    for one in sorted(running, key=lambda one: one.expected_end):
        n -= len(one.gpus)
        if n <= 0:
            return one.expected_end - time.monotonic()
    return None


def _without(job: Job, figures: Sequence[Figure]) -> Job | None:
    rest = tuple(figure for figure in job.figures if figure not in figures)
    return job.of(rest) if rest else None


def line(end: Ended) -> str:
    """What is printed of a job that has ended."""
    rows = f"{len(end.measured)} of {len(end.job.figures)} rows" if end.job.figures else ""
    again = "" if end.again is None else f"; {len(end.again.figures)} rows begin again"
    why = f": {end.why:.200}{again}" if end.why else ""
    return f"{end.job.name:20} {end.how:8} {rows:>16} in {end.seconds:4.0f} s{why}"
