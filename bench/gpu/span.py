"""How long one call takes on a GPU: from the start of its first kernel to the end of its last, by the profiler.

What a caller waits for beside this is the launch. `bench.timing.device_times` repeats calls in a loop: its figures hold
what the loop itself costs, and the clock of a card that is busy for long.
"""

import os
import pathlib
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.profiler import ProfileData

from bench.timing import once

_APART_S = 4e-3  # between two calls, at least, far more than within one, where the host may be busy with other work
_WARM_S = 0.05  # of calls before those that count: an idle card clocks down
# Options of the compiler. By itself XLA launches fewer than five kernels one by one, and the host takes longer than
# they do; in the program of a model's step they are part of a graph.
AS_A_GRAPH = {"xla_gpu_graph_min_graph_size": 1}


class Span(NamedTuple):
    """Milliseconds, and what they were spent on.

    Attributes:
        ms: of each call; `kernels`: name -> median milliseconds a call, of all kernels of that name, longest first.
    """

    ms: list[float]
    kernels: dict[str, float]


class Event(NamedTuple):
    """A kernel or a copy on the device; nanoseconds."""

    start: float
    end: float
    name: str


def spans(call: Callable[[], object], n: int = 20) -> Span:
    """The spans of n calls, each waited for and apart from the one before; L2 is as that one left it.

    Raises: RuntimeError: the profiler saw another number of calls than were made.
    """
    return spans_of([call], n)[0]


def by_jax(run: Callable[[], object], planes: str = "/device:GPU:0") -> list[Event]:
    """What runs meanwhile on the GPUs whose planes begin so, by JAX's profiler."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            run()
        file = next(pathlib.Path(folder).rglob("*.xplane.pb"))
        return device_events(ProfileData.from_file(str(file)), planes)


def spans_of(
    calls: Sequence[Callable[[], object]], n: int = 20, record: Callable[[Callable[[], None]], list[Event]] = by_jax
) -> list[Span]:
    """`spans` of each, by one run of the profiler, which takes a second to start and to read.

    Args:
        record: runs what it is given and returns the events, by their start.
    """
    apart = _APART_S
    for call in calls:
        _, took = once(call)  # which may compile: what it took counts only if the calls after it take as long
        end = time.perf_counter() + _WARM_S
        while time.perf_counter() < end:
            _, took = once(call)
        # A long call has the host start kernels all through it, and waits the longer for a host that is busy.
        apart = max(apart, 2e-3 * took)

    def run() -> None:
        for call in calls:
            for _ in range(n):
                jax.block_until_ready(call())
                time.sleep(apart)

    seen = calls_of(record(run), apart)
    if len(seen) != n * len(calls):
        raise RuntimeError(f"spans: the profiler saw {len(seen)} calls, wanted the {n * len(calls)} that were made")
    return [_span(seen[i * n : (i + 1) * n]) for i in range(len(calls))]


def _span(calls: list[list[Event]]) -> Span:
    names = {event.name for events in calls for event in events}
    each = {x: float(np.median([sum(e.end - e.start for e in c if e.name == x) for c in calls])) / 1e6 for x in names}
    return Span(
        ms=[(max(e.end for e in events) - events[0].start) / 1e6 for events in calls],
        kernels=dict(sorted(each.items(), key=lambda item: -item[1])),
    )


def device_events(profile: ProfileData, planes: str = "/device:GPU:0") -> list[Event]:
    """All that ran on the streams of the GPUs whose planes begin so, by start."""
    found = [plane for plane in profile.planes if plane.name.startswith(planes)]
    # Lines that are no streams hold the same time again, by module or by the names of the program.
    lines = [line for plane in found for line in plane.lines if line.name.startswith("Stream")]
    return sorted(Event(e.start_ns, e.end_ns, e.name) for line in lines for e in line.events)


def calls_of(events: list[Event], apart: float = _APART_S) -> list[list[Event]]:
    """Events that are less than half of the pause between calls apart belong to one call."""
    calls: list[list[Event]] = []
    end = -np.inf
    for event in events:
        if event.start - end > apart * 1e9 / 2:
            calls.append([])
        calls[-1].append(event)
        end = max(end, event.end)
    return calls


def first_gpu() -> str:
    """The number or the name by which nvidia-smi knows the first GPU that JAX sees."""
    return os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0].strip() or "0"


def clock_mhz() -> int | None:
    """The clock of the first GPU's multiprocessors now; None: no nvidia-smi."""
    command = ["nvidia-smi", "--query-gpu=clocks.sm", "--format=csv,noheader,nounits", f"--id={first_gpu()}"]
    try:
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    except (OSError, subprocess.CalledProcessError, ValueError):
        return None
