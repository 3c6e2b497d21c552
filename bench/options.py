"""Types of command-line options that several commands have."""

import argparse
import math
from collections.abc import Callable

from bench import shapes


def whole(least: int, most: int) -> Callable[[str], int]:
    """An int within bounds."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{text!r}, wanted a whole number from {least} to {most:,}")
        return value

    return parse


def positive(text: str) -> float:
    """A number above 0, neither infinite nor NaN."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r}, wanted a number above 0")
    return value


def add_rows(parser: argparse.ArgumentParser) -> None:
    """The option that chooses among the rows of `records.measure_all`."""
    parser.add_argument(
        "--rows", nargs="+", default=["*"], metavar="PATTERN", help="only rows whose name matches one of these"
    )


context = whole(1, shapes.MAX_CONTEXT)
