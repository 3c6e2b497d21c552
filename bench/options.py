"""Types of command-line options that several commands have."""

import argparse
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


context = whole(1, shapes.MAX_CONTEXT)
