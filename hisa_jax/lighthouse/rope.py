"""Rotary positions of entries: a position for each entry and key head."""

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jax import Array

from hisa_jax.lighthouse.method import Pyramid
from hisa_jax.xla.causal import wide_dtype

Rotate = Callable[[Array, Array], Array]


@dataclasses.dataclass(frozen=True)
class Rotation:
    """Turns pairs of features (i, i + D / 2) by position * theta ** (-2 i / D).

    Source: RoPE, arXiv 2104.09864.
    """

    theta: float

    def __call__(self, x: Array, positions: Array) -> Array:
        """x [B, S, G, R, D], of R heads in each of G groups; positions [B, S, G] int32, or [B, S, 1] for all groups."""
        D = x.shape[-1]
        wide = wide_dtype(x.dtype)
        frequencies = jnp.asarray(self.theta ** (-np.arange(0, D, 2) / D), wide)
        angles = positions.astype(wide)[..., None, None] * frequencies.reshape(1, 1, 1, 1, -1)
        first, second = jnp.split(x.astype(wide), 2, axis=-1)
        cos, sin = jnp.cos(angles), jnp.sin(angles)
        return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def last_positions(entries: Array, positions: Array, pyramid: Pyramid) -> Array:
    """[B, S, G] windows, [B, T] int32 positions of the tokens -> [B, S, G] that of each window's last token.

    0 where there is no window.
    """
    last = entries
    for start, width in zip(pyramid.starts, pyramid.widths, strict=True):
        last = jnp.where(entries >= start, (entries - start) * width + width - 1, last)
    B, S, G = entries.shape
    last = jnp.clip(last, 0, pyramid.n_tokens - 1)
    found = jnp.take_along_axis(positions, last.reshape(B, S * G), axis=1).reshape(B, S, G)
    return jnp.where(entries >= 0, found, 0)
