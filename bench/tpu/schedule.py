"""Reads the TPU compiler's final schedule of a kernel: VLIW bundles (cycles) of every loop, and the slots they use.

The compiler lists a kernel as numbered bundles, each issued in one cycle, with its loop depth, its branches and, in a
second file, how many slots of each unit it fills. This turns the listing into a tree of loops with trip counts, so that
`cycles()` is the sum over the tree. It is a static figure: no wait for a DMA or a semaphore is in it, no VMEM bank
conflict, and a branch over a region counts as never taken unless its share is given.
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping

UNITS = ("MXU", "XLU", "VALU", "VPOP", "EUP", "VLOAD", "FILL", "VSTORE", "SPILL", "SALU")

_BUNDLE = re.compile(r"^\s*(0x[0-9a-f]+|0)\s+(LH|LB|LE|PB|PF|CT)?\s*:\s*(>*)\s*\{(.*)", re.S)
_EXIT = re.compile(r"scmp\.ge\.s32\.totalorder (%s\w+), (\d+) /\* loop exit test")
_PHI = re.compile(r"= sphi %s\w+, (%s\w+)")
_STAGES = re.compile(r"iteration index, stage = (\d+)")
_JUMP = re.compile(r"sbr\.rel (?:\((!?%p\w+)\) )?target = \$region(\d+)")
_STARTS = re.compile(r"Start(?:/End empty)? region (\d+)")
_DMA = re.compile(r"dma\.(\w+) .*?/\*size_in_granules=\*/(\w+|%s\w+)", re.S)
_IN_VMEM = re.compile(r"^ *#allocation\w+ \[.*?space=vmem, size = (0x[0-9a-f]+), scoped", re.M)
_LARGE = 64  # bundles: a region of this size counts
_SMALL = 24  # bundles: a skipped region below this is not worth a name


@dataclasses.dataclass
class Bundle:
    depth: int
    mark: str
    text: str
    slots: tuple[int, ...]


@dataclasses.dataclass
class Loop:
    """A loop (the root: the kernel itself), or a region that a branch may skip.

    Attributes:
        path: where it stands: "" the root, "0" its first child, "0.1" the second child of that.
        trips: how often it runs each time its parent does; None: only run time knows.
        bundles, slots: of its own, without its children's.
        dma_granules: (direction, size) of the copies started here; size -1 where only run time knows.
    """

    path: str
    is_branch: bool
    trips: float | None
    bundles: int = 0
    slots: dict[str, int] = dataclasses.field(default_factory=lambda: dict.fromkeys(UNITS, 0))
    dma_granules: list[tuple[str, int]] = dataclasses.field(default_factory=list)
    children: list["Loop"] = dataclasses.field(default_factory=list)

    def walk(self) -> Iterator["Loop"]:
        yield self
        for child in self.children:
            yield from child.walk()


@dataclasses.dataclass(frozen=True)
class Cost:
    """Totals of one run of a kernel."""

    cycles: float
    slots: Mapping[str, float]


@dataclasses.dataclass
class Schedule:
    """A kernel's schedule.

    Attributes:
        capacity: slots a bundle has of each unit.
        root: the tree.
        vmem_bytes: of VMEM: scratch, windows of operands, spilled registers.
    """

    name: str
    capacity: Mapping[str, int]
    root: Loop
    vmem_bytes: int

    @property
    def bundles(self) -> int:
        return sum(loop.bundles for loop in self.root.walk())

    def loop(self, path: str) -> Loop:
        for loop in self.root.walk():
            if loop.path == path:
                return loop
        raise KeyError(f"{self.name} has no loop {path!r}; it has\n{self.outline()}")

    def cost(self, trips: Mapping[str, float] | None = None, path: str = "") -> Cost:
        """Sums the tree below `path`.

        Args:
            trips: loop path -> how often it runs each time its parent does, for the loops that only run time knows, or
                to overrule; for a skippable region the share of times that it is not skipped.
        """
        trips = dict(trips or {})
        unknown = set(trips) - {loop.path for loop in self.root.walk()}
        if unknown:
            raise KeyError(f"{self.name} has no loop {sorted(unknown)}; it has\n{self.outline()}")
        return self._cost(self.loop(path), trips)

    def _cost(self, loop: Loop, trips: Mapping[str, float]) -> Cost:
        cycles, slots = float(loop.bundles), {unit: float(n) for unit, n in loop.slots.items()}
        for child in loop.children:
            n = trips.get(child.path, child.trips)
            if n is None:
                raise ValueError(
                    f"{self.name}: trips of loop {child.path!r} are not known; give them\n{self.outline()}"
                )
            inner = self._cost(child, trips)
            cycles += n * inner.cycles
            slots = {unit: slots[unit] + n * inner.slots[unit] for unit in slots}
        return Cost(cycles, slots)

    def names(self, last: tuple[str, ...]) -> dict[str, str]:
        """Path -> name of each loop, and "" -> "".

        Paths differ between chips, as the compiler does without a branch here and there; the order of loops does not.

        Args:
            last: names of the last loops, in program order. If there are more, the first is the "grid", and those after
                it bring in the keys, which differs between chips: "pool" if there is arithmetic in it, else "load".
        """
        loops = [loop for loop in self.root.walk() if loop.path and not loop.is_branch]
        if len(loops) < len(last):
            raise ValueError(f"{self.name} has {len(loops)} loops, wanted {last}\n{self.outline()}")
        first = loops[: len(loops) - len(last)]
        loading = ("pool" if sum(part.bundles for part in loop.walk()) >= _LARGE * 3 else "load" for loop in first[1:])
        named = zip((*["grid"][: len(first)], *loading, *last), loops, strict=True)
        return {"": "", **{loop.path: name for name, loop in named}}

    def named_trips(
        self, names: tuple[str, ...], trips: Mapping[str, float], shares: Mapping[str, float], rest: Mapping[str, float]
    ) -> dict[str, float]:
        """Turns what is known of named loops into the `trips` of `cost`.

        Args:
            names: see `names`.
            trips: name -> how often, each time the surrounding loop does; those not given keep what the compiler knows.
            shares: name -> share of times that the branch right around the loop is taken.
            rest: the same for branches around no loop, where they are not small, by the loop that they are in.
        """
        regions = {loop.path: loop for loop in self.root.walk() if loop.is_branch}
        name_of = self.names(names)
        out = {path: trips[name] for path, name in name_of.items() if name in trips}
        for path, name in name_of.items():
            parent = path.rpartition(".")[0]
            if name in shares and parent in regions:
                out[parent] = shares[name]
        for path, region in regions.items():
            around = path
            while around not in name_of:
                around = around.rpartition(".")[0]
            is_large = all(child.is_branch for child in region.walk()) and region.bundles >= _LARGE
            if is_large and name_of[around] in rest:
                out[path] = rest[name_of[around]]
        return out

    def outline(self) -> str:
        """The tree as text: path, trips, own bundles, own slot use in percent."""
        lines = []
        for loop in self.root.walk():
            use = " ".join(
                f"{unit} {100 * loop.slots[unit] / (self.capacity[unit] * loop.bundles):.0f}%"
                for unit in UNITS
                if loop.bundles and loop.slots[unit] / (self.capacity[unit] * loop.bundles) >= 0.05
            )
            what = "region" if loop.is_branch else "loop"
            times = "?" if loop.trips is None else f"{loop.trips:g}"
            copies = f" DMA {loop.dma_granules}" if loop.dma_granules else ""
            path = loop.path or self.name
            lines.append(
                f"{'  ' * loop.path.count('.')}{what} {path}: x {times}, {loop.bundles} bundles, {use}{copies}"
            )
        return "\n".join(lines)


def read(name: str, final_bundles: str, utilization: str, after_allocation: str) -> Schedule:
    """Parses `*-final_bundles.txt`, `*-final_hlo-static-per-bundle-utilization.txt` and `*-post-ra.txt`."""
    capacity, slots = _slots(utilization)
    bundles = _bundles(final_bundles, slots)
    starts = _region_starts(bundles)
    loops = _loop_spans(bundles)
    branches = [span for span in _branch_spans(bundles, starts) if not _is_guard(span, loops)]
    vmem_bytes = sum(int(size, 16) for size in _IN_VMEM.findall(after_allocation))
    return Schedule(name=name, capacity=capacity, root=_tree(bundles, loops, branches), vmem_bytes=vmem_bytes)


def _slots(utilization: str) -> tuple[dict[str, int], list[tuple[int, ...]]]:
    rows = [line.split() for line in utilization.splitlines()]
    numbers = [tuple(int(x) for x in row) for row in rows if row and all(x.isdigit() for x in row)]
    return dict(zip(UNITS, numbers[0], strict=True)), numbers[1:]


def _bundles(text: str, slots: list[tuple[int, ...]]) -> list[Bundle]:
    chunks: list[str] = []
    for line in text.splitlines():
        if _BUNDLE.match(line):
            chunks.append(line)
        elif chunks:
            chunks[-1] += "\n" + line
    if len(chunks) != len(slots):
        raise ValueError(f"{len(chunks)} bundles listed, slots of {len(slots)}: the compiler's listing has changed")
    bundles: list[Bundle] = []
    for chunk, used in zip(chunks, slots, strict=True):
        match = _BUNDLE.match(chunk)
        assert match
        _, mark, deep, rest = match.groups()
        # An empty bundle is listed without its depth.
        empty = rest.lstrip().startswith("}") and not deep
        depth = bundles[-1].depth if empty and bundles else len(deep)
        bundles.append(Bundle(depth, mark or "", rest, used))
    return bundles


def _region_starts(bundles: list[Bundle]) -> dict[int, int]:
    return {int(region): i for i, bundle in enumerate(bundles) for region in _STARTS.findall(bundle.text)}


def _loop_spans(bundles: list[Bundle]) -> list[tuple[int, int, float | None]]:
    """(first, end, trips) of each loop. A loop starts at LB and lasts until the depth falls for good."""
    spans = []
    for first, bundle in enumerate(bundles):
        if bundle.mark != "LB":
            continue
        end = last = first
        while end + 1 < len(bundles):
            end += 1
            if bundles[end].mark == "LB" and bundles[end].depth <= bundle.depth:
                break
            if bundles[end].depth >= bundle.depth:
                last = end
            elif end - last > 8:  # the back branch and its delay slots may be listed outside the loop
                break
        spans.append((first, last + 1, _trips(bundles, first, last + 1)))
    return spans


def _trips(bundles: list[Bundle], first: int, end: int) -> float | None:
    """The limit of the counter that goes round the loop: of its phi, or else of a test at the loop's own depth."""
    around = set(_PHI.findall(bundles[first].text))
    tests = [
        (match.groups(), bundles[i].depth)
        for i in range(first, min(end + 8, len(bundles)))
        for match in _EXIT.finditer(bundles[i].text)
    ]
    own = [test for test, _ in tests if test[0] in around]
    own = own or [test for test, depth in tests if depth <= bundles[first].depth]
    if not own:
        return None
    counter, limit = own[0]
    stages = [int(s) for s in _STAGES.findall(bundles[first].text)]
    if stages:  # the grid: a software pipeline, of which the first and last iterations only copy
        return int(limit) - max(stages)
    body = "\n".join(bundle.text for bundle in bundles[first:end])
    step = re.search(re.escape(counter) + r" = sadd\.s32 (\d+), ", body)
    return int(limit) / int(step.group(1)) if step else None


def _branch_spans(bundles: list[Bundle], starts: dict[int, int]) -> list[tuple[int, int]]:
    """(first, end) of each region that a forward branch may skip, delay slots left out."""
    spans = []
    for i, bundle in enumerate(bundles):
        for predicate, region in _JUMP.findall(bundle.text):
            target = starts.get(int(region), 0)
            if predicate and target - i > _SMALL:
                spans.append((i + 5, target))
    return spans


def _is_guard(branch: tuple[int, int], loops: list[tuple[int, int, float | None]]) -> bool:
    """Whether it only skips a loop that may run no times."""
    return any(branch[0] == first and abs(branch[1] - end) <= 8 for first, end, _ in loops)


def _tree(bundles: list[Bundle], loops: list[tuple[int, int, float | None]], branches: list[tuple[int, int]]) -> Loop:
    spans = [(first, end, trips, False) for first, end, trips in loops]
    spans += [(first, end, 1.0, True) for first, end in branches]
    spans.sort(key=lambda span: (span[0], -span[1]))
    root = Loop("", False, 1.0)
    open_spans: list[tuple[Loop, int]] = [(root, len(bundles))]
    pending = iter([*spans, (len(bundles), len(bundles), 0.0, False)])
    span = next(pending)
    for i, bundle in enumerate(bundles):
        while i >= open_spans[-1][1]:
            open_spans.pop()
        while span[0] == i:
            parent, parent_end = open_spans[-1]
            first, end, trips, is_branch = span
            span = next(pending)
            if is_branch and (end > parent_end or first + _SMALL > end):
                continue  # a jump out of a loop is its exit, not a region
            path = f"{parent.path}.{len(parent.children)}" if parent.path else str(len(parent.children))
            child = Loop(path, is_branch, trips)
            parent.children.append(child)
            open_spans.append((child, min(end, parent_end)))
        owner = open_spans[-1][0]
        owner.bundles += 1
        for unit, n in zip(UNITS, bundle.slots, strict=True):
            owner.slots[unit] += n
        for direction, size in _DMA.findall(bundle.text):
            owner.dma_granules.append((direction, int(size) if size.isdigit() else -1))
    return root
