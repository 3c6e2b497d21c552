"""Matrices in float8_e4m3fn with a float32 scale a block, as DeepSeek's checkpoints have them, kept so in memory.

A weight is read as `parameter[...]`, whatever it is: here that is value times scale in the dtype of the activations,
rounded once. So a product gives what it gives for weights that were brought to that dtype when they were loaded, bit
for bit. The compiler makes them inside of the product that reads them: memory holds, and moves, 8 bits a weight.
"""

import dataclasses
import math
from collections.abc import Sequence
from types import EllipsisType

import jax
import jax.numpy as jnp
from jax import Array

VALUE_DTYPE = jnp.dtype(jnp.float8_e4m3fn)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockScaled:
    """A weight of one or more matrices; `weight[...]` is the weight itself.

    Attributes:
        values: [...] float8_e4m3fn, in the layout of the parameter.
        scales: float32, of the same rank: an axis of n runs of values' axis of size s has a scale for each s / n.
        dtype: what `weight[...]` is in.
    """

    values: Array
    scales: Array
    dtype: jnp.dtype = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    def __getitem__(self, index: EllipsisType) -> Array:
        assert index is Ellipsis, "a weight is read whole"
        shape, n = self.shape, self.scales.shape
        values, scales = self.values, self.scales
        # The last axis is repeated, a 128th of the weight; of the others each run is an axis of its own, so that the
        # scales are broadcast along the rows of a tile and nothing of the weight's size is made.
        scales = jnp.repeat(scales, shape[-1] // n[-1], axis=-1)
        runs = [x for size, count in zip(shape[:-1], n[:-1], strict=True) for x in (count, size // count)]
        ones = [x for count in n[:-1] for x in (count, 1)]
        wide = values.reshape(*runs, shape[-1]).astype(jnp.float32) * scales.reshape(*ones, shape[-1])
        return wide.astype(self.dtype).reshape(shape)


def run_of(block: int, sizes: int | Sequence[int]) -> int:
    """Numbers in a row that share a scale: whole parts of a block that the axis, and what it was cut from, divide."""
    return math.gcd(block, *((sizes,) if isinstance(sizes, int) else sizes))
