"""Sums whose bits do not depend on the shape around them, so that a device of a mesh has those of one alone.

On CPUs alone, where XLA adds in an order that depends on how many sums and products there are. Elsewhere XLA sums as it
likes, which is faster there.
"""

import jax
import jax.numpy as jnp
from jax import Array


def is_in_one_order() -> bool:
    """Whether the bits are to be those of one device, at the price of smaller products."""
    return jax.default_backend() == "cpu"


def total(x: Array, axis: int) -> Array:
    """The sum over an axis of one or more: on CPUs in pairs, an entry of the first half with one of the second."""
    if not is_in_one_order():
        return jnp.sum(x, axis=axis)
    n = x.shape[axis]
    more = [(0, 0)] * x.ndim
    more[axis] = (0, (1 << (n - 1).bit_length()) - n)
    x = jnp.pad(x, more)
    while x.shape[axis] > 1:
        first, second = jnp.split(x, 2, axis=axis)
        x = first + second
    return jnp.squeeze(x, axis)
