"""Which implementation runs, and why the others do not. Alone here are kernels imported."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from hisa_jax import xla
from hisa_jax.methods import Method


@dataclasses.dataclass(frozen=True, kw_only=True)
class Device:
    """What a choice depends on of the hardware: `platform` ("cpu", "gpu", "tpu") and `kind` ("NVIDIA H200")."""

    platform: str
    kind: str

    @classmethod
    def default(cls) -> "Device":
        """The device on which JAX puts new arrays."""
        device = jax.config.jax_default_device or jax.devices()[0]
        if isinstance(device, str):
            device = jax.devices(device)[0]
        return cls(platform=device.platform, kind=device.device_kind)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """What a choice depends on of the call: index heads, their size, dtypes, and the method."""

    H: int
    D: int
    q_dtype: str
    k_dtype: str
    method: Method


@dataclasses.dataclass(frozen=True, kw_only=True)
class Implementation:
    """A way to run the selection.

    Attributes:
        why_not: None if it can run this problem on this device, else the sentence that the user reads. The problem
            is None where only the device is asked about.
        select, select_packed: the functions of `xla.py` with these names, or others of their signature.
    """

    why_not: Callable[[Device, Problem | None], str | None]
    select: Callable[..., Any]
    select_packed: Callable[..., Any]


def _unavailable(backend: str, reason: str) -> Implementation:
    def missing(*args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(f"kernels_pallas.{backend}")

    return Implementation(
        why_not=lambda device, problem: reason,
        select=missing,
        select_packed=missing,
    )


_NOT_WIRED = "its kernels do not take the inputs of select yet, only those named in kernels_pallas/README.md"

# In the order in which "auto" tries them.
IMPLEMENTATIONS: dict[str, Implementation] = {
    "mosaic_gpu": _unavailable("mosaic_gpu", _NOT_WIRED),
    "triton": _unavailable("triton", _NOT_WIRED),
    "mosaic_tpu": _unavailable("mosaic_tpu", "it has no kernels yet"),
    "xla": Implementation(why_not=lambda device, problem: None, select=xla.select, select_packed=xla.select_packed),
}


def reasons(device: Device, problem: Problem | None) -> dict[str, str | None]:
    """Why each implementation cannot run, None for those that can, in the order of preference."""
    return {name: implementation.why_not(device, problem) for name, implementation in IMPLEMENTATIONS.items()}


def choose(call: str, implementation: str, device: Device, problem: Problem) -> str:
    """The name of the implementation that runs.

    Raises: ValueError: one that does not exist, or one that cannot run here: says why and which can.
    """
    if implementation != "auto" and implementation not in IMPLEMENTATIONS:
        names = ", ".join(["auto", *IMPLEMENTATIONS])
        raise ValueError(f"{call}: implementation={implementation!r}, wanted one of {names}")
    why_not = reasons(device, problem)
    usable = [name for name, reason in why_not.items() if reason is None]
    if implementation == "auto":
        return usable[0]
    if why_not[implementation] is not None:
        raise ValueError(
            f'{call}: implementation="{implementation}" cannot run here: {why_not[implementation]}. '
            f"Usable: {', '.join(usable)}"
        )
    return implementation
