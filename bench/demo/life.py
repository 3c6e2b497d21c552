"""Signs of life: on a terminal a bar below what is printed, elsewhere a line whenever something else begins."""

import contextlib
import sys
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

Show = Callable[[str, float], None]


@contextlib.contextmanager
def signs_of_life(console: Console, total: float) -> Iterator[Show]:
    """Gives a function that is told what is being done, and how much of `total` is done."""
    if console.is_terminal and not console.is_dumb_terminal:
        columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
        with Progress(*columns, console=console, transient=True) as progress:
            bar = progress.add_task("", total=total)
            yield lambda what, done: progress.update(bar, description=what, completed=done)
        return
    last = ""

    def show(what: str, done: float) -> None:
        nonlocal last
        if what != last:
            last = what
            print(f"[{done / total:4.0%}] {what}", file=sys.stderr, flush=True)

    yield show
