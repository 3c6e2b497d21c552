"""What crosses between devices, read from a compiled program."""

import math
import re

_KINDS = re.compile(r"(all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(-start)?\(")


def collectives(compiled) -> list[tuple[str, str, int]]:
    """[(kind, dtype, elements)] of every result of a collective, on one device."""
    found = []
    for line in compiled.as_text().splitlines():
        if match := _KINDS.search(line):
            results = re.findall(r"(\w+)\[([0-9,]*)\]", line.split(match[0])[0])
            found += [(match[1], dtype, math.prod(int(n) for n in shape.split(",") if n)) for dtype, shape in results]
    return found


def elements(found, kind: str) -> int:
    """Of all results of one kind."""
    return sum(n for each, _, n in found if each == kind)
