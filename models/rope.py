"""Rotary position embedding: plain and YaRN frequencies, both layouts of a pair."""

import math

import jax.numpy as jnp
import numpy as np
from jax import Array

from hisa_jax.models.config import Config


def inverse_frequencies(config: Config) -> np.ndarray:
    """Angle per position of each pair of dims.

    Args:
        config: `rope_theta`, `qk_rope_head_dim` and `yarn` of it are used.

    Returns: [R / 2] float32 for R = qk_rope_head_dim.
    Source: RoPE, arXiv 2104.09864; YaRN, arXiv 2309.00071.
    """
    R, theta, yarn = config.qk_rope_head_dim, config.rope_theta, config.yarn
    plain = theta ** (-np.arange(0, R, 2) / R)
    if yarn is None:
        return plain.astype(np.float32)

    def dim_that_turns(times: float) -> float:
        return R * math.log(yarn.original_max_position_embeddings / (times * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dim_that_turns(yarn.beta_fast), dim_that_turns(yarn.beta_slow)
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, R - 1)
    # The published code widens an empty range by this much, so that the ramp becomes a step.
    slope = 1 / (high - low if high != low else 0.001)
    stretched = np.clip((np.arange(R // 2) - low) * slope, 0, 1)
    return (plain / yarn.factor * stretched + plain * (1 - stretched)).astype(np.float32)


def rope_table(config: Config, positions: Array) -> tuple[Array, Array]:
    """Cosines and sines of every position.

    Args:
        config: see `inverse_frequencies`.
        positions: [B, T] int32.

    Returns: cos and sin, [B, T, R / 2] float32 each.
    """
    angles = positions.astype(jnp.float32)[..., None] * jnp.asarray(inverse_frequencies(config))[None, None, :]
    scale = config.yarn.rope_scale if config.yarn else 1.0
    return jnp.cos(angles) * scale, jnp.sin(angles) * scale


def rotate(x: Array, table: tuple[Array, Array], interleaved: bool) -> Array:
    """Turns each pair of dims by its position's angle.

    Args:
        x: [B, T, R] or [B, T, N, R].
        table: cos and sin of `rope_table`.
        interleaved: pairs are dims (2i, 2i + 1) if True, (i, i + R / 2) if False.

    Returns: the rotated x, same shape and dtype, dims in the order they came in.
    """
    R, pair_axis = x.shape[-1], -1 if interleaved else -2
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], *((R // 2, 2) if interleaved else (2, R // 2)))
    first, second = jnp.take(pairs, 0, axis=pair_axis), jnp.take(pairs, 1, axis=pair_axis)
    cos, sin = (t if x.ndim == 3 else t[:, :, None, :] for t in table)
    turned = jnp.stack([first * cos - second * sin, second * cos + first * sin], axis=pair_axis)
    return turned.reshape(x.shape).astype(x.dtype)
