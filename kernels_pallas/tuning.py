"""Launch configurations found by measurement: data, `tuned.json`, which `python -m bench tune` writes.

They change the speed, never the result. A shape or device that was not measured gets the kernel's `heuristic`.
"""

import functools
import json
import pathlib
from typing import Any

import jax

FILE = pathlib.Path(__file__).with_name("tuned.json")


def tuned[Config](config: type[Config], kernel: str, **shape: int | str) -> Config | None:
    """The fastest configuration measured for a kernel on the default device; None if this shape was not measured.

    Args:
        config: class of the configuration; `kernel`: its name in the file, "mosaic_gpu.refine".
        shape: all that the choice depends on, as `python -m bench tune` records it.
    """
    fields = _entries().get(key(jax.devices()[0].device_kind, kernel, shape))
    return None if fields is None else config(**fields)


def key(device: str, kernel: str, shape: dict[str, int | str]) -> str:
    """One string a device, kernel and shape."""
    return " ".join([device, kernel, *(f"{name}={value}" for name, value in sorted(shape.items()))])


@functools.cache
def _entries() -> dict[str, dict[str, Any]]:
    entries = json.loads(FILE.read_text()) if FILE.exists() else []
    return {key(x["device"], x["kernel"], x["shape"]): x["config"] for x in entries}
