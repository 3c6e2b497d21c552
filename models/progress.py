"""Signs of life while something takes long: a line now and then, on a terminal one line that changes."""

import sys
import time
from typing import TextIO

_EVERY = 5.0  # seconds between lines that are not on a terminal


class Progress:
    """Writes what is done; call it with what, how much of it is done, and of how much.

    Args:
        stream: default: standard error.
    """

    def __init__(self, stream: TextIO | None = None):
        self._stream = sys.stderr if stream is None else stream
        self._start = self._last = time.perf_counter()

    def __call__(self, what: str, done: int, total: int) -> None:
        now = time.perf_counter()
        if done == 0:
            self._start, self._last = now, now - _EVERY
        is_last = done >= total
        if self._stream.isatty():
            text = f"{what}, {now - self._start:.1f} s" if is_last else f"{what}: {done} of {total}"
            self._stream.write(f"\r\x1b[K{text}" + ("\n" if is_last else ""))
        elif is_last or now - self._last >= _EVERY:
            text = f"{what}, {now - self._start:.1f} s" if is_last else f"{what}: {done} of {total}"
            self._stream.write(text + "\n")
            self._last = now
        self._stream.flush()
