"""What a GPU did meanwhile: the kernels that the profiler saw by what they are for, and the longest waits."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from bench.gpu.span import Event

# The first that fits a kernel's name; what fits none is XLA's own: norms, rotations, casts, gathers, sampling.
_BEGINNINGS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("pages", ("hisa_append",)),
    ("selection", ("hisa_", "dsa_")),
    ("attention", ("sparse_",)),
    ("exchange", ("nccl", "all_", "reduce_scatter", "collective", "psum", "pmax")),
    ("products", ("gemm", "nvjet", "cutlass", "cublas", "sm90", "sm80", "void cutlass", "void cublas", "void gemv")),
    ("copies", ("Mem", "mem")),
)
REST = "fusions"
IDLE = "between kernels"
_GAPS_SHOWN = 4


class Timeline(NamedTuple):
    """Milliseconds of the first GPU.

    Attributes:
        parts: by what kernels are for, and `IDLE`, the longest first.
        kernels: by name, the longest first.
        gaps: the longest waits, with the kernels before and after.
    """

    parts: dict[str, float]
    kernels: dict[str, float]
    gaps: list[tuple[float, str, str]]


def part_of(kernel: str) -> str:
    """What a kernel is for."""
    return next((part for part, beginnings in _BEGINNINGS if kernel.startswith(beginnings)), REST)


def timeline(events: Sequence[Event]) -> Timeline:
    """Of events by their start; none is an empty one."""
    kernels, parts, gaps = dict[str, float](), dict[str, float](), list[tuple[float, str, str]]()
    last: Event | None = None  # that ends last so far
    for event in events:
        ms = (event.end - event.start) / 1e6
        kernels[event.name] = kernels.get(event.name, 0.0) + ms
        parts[part_of(event.name)] = parts.get(part_of(event.name), 0.0) + ms
        if last is not None and event.start > last.end:
            gaps.append(((event.start - last.end) / 1e6, last.name, event.name))
        last = event if last is None or event.end > last.end else last
    parts[IDLE] = sum(ms for ms, _, _ in gaps)
    return Timeline(_longest(parts), _longest(kernels), sorted(gaps, reverse=True)[:_GAPS_SHOWN])


def lines(what: str, row: dict[str, Any]) -> list[str]:
    """A timeline as a row of JSON has it, in words."""
    if not row["kernels"]:
        return []
    shown = list(row["kernels"].items())[:6]
    return [
        f"  {what}: " + ", ".join(f"{part} {ms:.2f} ms" for part, ms in row["parts"].items()),
        "    kernels: " + ", ".join(f"{name} {ms:.2f}" for name, ms in shown),
        "    waits: " + ", ".join(f"{ms:.2f} from {before} to {after}" for ms, before, after in row["gaps"]),
    ]


def _longest(ms: dict[str, float]) -> dict[str, float]:
    return dict(sorted(ms.items(), key=lambda item: -item[1]))
