"""Kernels in programs with `jax_enable_x64`, whose values are as before 32 bits wide."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array, lax


def in_32_bits[**P, R](function: Callable[P, R]) -> Callable[P, R]:
    """Traces a function that launches kernels as without `jax_enable_x64`.

    With it a Python number in an index map or a kernel becomes 64 bits wide, which Pallas cannot lower for an
    accelerator (its own `pl.cdiv` does not trace). Nothing here is as wide, so the results are the same.
    A kernel is lowered later, outside of this: there the TPU's rules for `sign`, which is in `//` of integers, and for
    `jnp.any` make 64-bit numbers of their own. Hence `quotient` or `lax.div`, and `is_any`, in its kernels.
    """

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        with jax.enable_x64(False):
            return function(*args, **kwargs)

    return wrapper


def quotient(a: Array | int, b: int) -> Array | int:
    """`a // b` of a number that is not negative."""
    return a // b if isinstance(a, int) else lax.div(a, b)


def is_any(mask: Array) -> Array:
    """`jnp.any`, spelled out."""
    return jnp.max(jnp.where(mask, 1.0, 0.0)) > 0
