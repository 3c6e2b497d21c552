"""The NVIDIA GPUs that Triton kernels run on."""

import jax.numpy as jnp
from jax.typing import DTypeLike


def why_not(compute_capability: str, dtype: DTypeLike) -> str | None:
    """None, or why a device ("9.0", "" for none) cannot run kernels on arrays of a dtype."""
    major, _, minor = compute_capability.partition(".")
    if not major.isdigit() or int(major) < 8:
        return f"needs compute capability 8.0, this device has {compute_capability or 'none'}"
    if jnp.dtype(dtype) == jnp.dtype(jnp.float8_e4m3fn) and (int(major), int(minor or 0)) < (8, 9):
        return f"float8_e4m3fn needs compute capability 8.9, this device has {compute_capability}"
    return None
