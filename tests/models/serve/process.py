"""A server in a process of its own, as users start it."""

import contextlib
import os
import pathlib
import re
import signal
import subprocess
import sys
import threading

ROOT = pathlib.Path(__file__).parents[3]


class Served:
    """A running server.

    Attributes:
        url: where it listens.
        process: runs it.
        lines: what it has printed.
    """

    def __init__(self, *arguments, timeout=300.0):
        command = [sys.executable, "-m", "hisa_jax.models", "serve", "--port", "0", *map(str, arguments)]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        self.lines, self.url, self._is_up = [], "", threading.Event()
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        self._reading = threading.Thread(target=self._read, daemon=True)
        self._reading.start()
        if not self._is_up.wait(timeout) or not self.url:
            self.kill()
            raise RuntimeError("the server did not start:\n" + "".join(self.lines[-20:]))

    def _read(self):
        for line in self.process.stdout:
            self.lines.append(line)
            if match := re.match(r"serving \S+ on (http\S+)", line):
                self.url = match[1]
                self._is_up.set()
        self._is_up.set()

    def stop(self, timeout=120.0):
        """As SIGTERM stops it; its exit status, and whether all pages are free."""
        self.process.send_signal(signal.SIGTERM)
        status = self.process.wait(timeout)
        self._reading.join()
        match = re.search(r"stopped: (\d+) of (\d+) pages are free", "".join(self.lines))
        return status, match is not None and match[1] == match[2]

    def kill(self):
        """Whatever it is doing."""
        self.process.kill()
        self.process.wait()
        self._reading.join()
        self.process.stdout.close()


@contextlib.contextmanager
def served(*arguments):
    """A `Served`, killed at the end if it still runs."""
    made = Served(*arguments)
    try:
        yield made
    finally:
        made.kill()
