"""Bytes that the first GPU has sent to others over NVLink, by the driver's counters: what went, rings and all."""

import re
import subprocess

from bench.gpu.span import first_gpu

_SENT = re.compile(r"Data Tx: (\d+) KiB")
_COMMAND = ("nvidia-smi", "nvlink", "--getthroughput", "d")


def sent_bytes() -> int | None:
    """Since the driver started, in whole KiB a link; None where there is no such counter."""
    try:
        command = (*_COMMAND, f"--id={first_gpu()}")
        text = subprocess.run(command, capture_output=True, text=True, check=True, timeout=5).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    links = [int(kib) for kib in _SENT.findall(text)]
    return 1024 * sum(links) if links else None


def difference(before: int | None, after: int | None, times: int = 1) -> int | None:
    """Bytes of each of so many times."""
    return None if before is None or after is None else (after - before) // times
