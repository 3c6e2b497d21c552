"""What a compiled program exchanges and which kernels it runs, read from its text."""

import math
import re
from collections.abc import Sequence
from typing import NamedTuple

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_COLLECTIVE = re.compile(
    r"= (?P<results>.+?) (?P<kind>all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)"
    r"(?P<start>-start)?\("
)
_ARRAY = re.compile(r"\b(pred|[a-z]+\d+[a-z0-9]*)\[([0-9,]*)\]")
_BITS = {"pred": 8, "f8e4m3fn": 8}
_CALLED = re.compile(r"(?:calls|to_apply|body|condition|called_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"(?:branch_computations=\{([^}]*)\}|(?:true|false)_computation=%?([\w.\-]+))")
_MESH_GROUPS = re.compile(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}")
_LISTED_GROUPS = re.compile(r"replica_groups=\[(\d+),(\d+)\]")
_WRITTEN_GROUPS = re.compile(r"replica_groups=\{\{([0-9,]+)\}")
_KERNEL = re.compile(r'^\s*(?:ROOT )?%([\w\-]+?)(?:\.\d+)* = .*custom_call_target="tpu_custom_call"')


class Collective(NamedTuple):
    """One exchange.

    Attributes:
        kind: as XLA calls it, "all-gather" for instance.
        dtype, elements: of the result on one device; of several results the largest.
        devices: how many take part.
        times: how often a step runs it.
        moved_bytes: that a device sends in all of these, by a ring.
    """

    kind: str
    dtype: str
    elements: int
    devices: int
    times: int
    moved_bytes: float


def collectives(text: str, n_devices: int, runs: Sequence[int]) -> list[Collective]:
    """All exchanges of a step, those of layers counted as often as they run.

    Args:
        text: of the compiled program.
        n_devices: of the mesh.
        runs: layers of each loop over layers, in order.

    Raises: ValueError: other loops exchange something, whose length is not known.
    """
    lines = _lines(text)
    found = []
    for computation, count in _times(lines, runs).items():
        for line in lines[computation]:
            if match := _COLLECTIVE.search(line):
                arrays = [
                    (d, math.prod(map(int, n.split(","))) if n else 1) for d, n in _ARRAY.findall(match["results"])
                ]
                # A started exchange also returns its operands and counters.
                arrays = [max(arrays, key=lambda x: x[1])] if match["start"] else arrays
                size = sum(n * _bytes(d) for d, n in arrays)
                dtype, elements = max(arrays, key=lambda x: x[1])
                n = _group(line, n_devices)
                moved = size * (n - 1) * {"all-reduce": 2 / n, "reduce-scatter": 1.0}.get(match["kind"], 1 / n)
                found.append(Collective(match["kind"], dtype, elements, n, count, moved * count))
    return found


def kernels(text: str) -> set[str]:
    """Names of the kernels that are called."""
    return {match[1] for line in text.splitlines() if (match := _KERNEL.match(line))}


def _bytes(dtype: str) -> int:
    return (_BITS.get(dtype) or int(re.sub(r"^[a-z]+", "", dtype))) // 8


def _lines(text: str) -> dict[str, list[str]]:
    """Computation -> its lines."""
    found: dict[str, list[str]] = {}
    name = ""
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            name = match[1]
            found["ENTRY" if line.startswith("ENTRY") else name] = body = []
        elif name:
            body.append(line)
    return found


def _times(lines: dict[str, list[str]], runs: Sequence[int]) -> dict[str, int]:
    """How often each computation with exchanges runs; a branch as if it were always taken."""
    times: dict[str, int] = {}

    def visit(computation: str, count: int) -> None:
        times[computation] = times.get(computation, 0) + count
        for line in lines[computation]:
            for name in _called(line):
                if name in lines and _exchanges(lines, name):
                    if " while(" in line:
                        raise ValueError(f"{line.strip()[:100]}: exchanges something, wanted no such loop in a layer")
                    visit(name, count)

    loops = [name for line in lines["ENTRY"] if " while(" in line for name in _called(line) if _exchanges(lines, name)]
    if len(loops) != sum(n > 1 for n in runs):
        raise ValueError(f"the program has {len(loops)} loops over layers, wanted one for each of {list(runs)}")
    for name, n in zip(loops, (n for n in runs if n > 1), strict=True):
        visit(name, n)
    times["ENTRY"] = 1
    return times


def _called(line: str) -> list[str]:
    """The computations that an operation runs.

    One exchange that goes on during several operations is written in each of them: where it starts it is counted.
    """
    if " fusion(" in line and "collective-start" not in line.split(" = ")[0]:
        return []
    called = _CALLED.findall(line)
    for several, one in _BRANCHES.findall(line):
        called += [name.strip().lstrip("%") for name in several.split(",")] if several else [one]
    return called


def _exchanges(lines: dict[str, list[str]], computation: str) -> bool:
    body = lines.get(computation, [])
    return any(_COLLECTIVE.search(line) for line in body) or any(
        _exchanges(lines, name) for line in body for name in _called(line)
    )


def _group(line: str, n_devices: int) -> int:
    """How many devices take part."""
    if match := _MESH_GROUPS.search(line):
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", match[1])}
        return math.prod(sizes.get(name, 1) for name in re.findall(r"'([^']+)'", match[2]))
    if match := _LISTED_GROUPS.search(line):
        return int(match[2])
    if match := _WRITTEN_GROUPS.search(line):
        return match[1].count(",") + 1
    return n_devices
