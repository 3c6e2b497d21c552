"""Inputs for the kernel tests."""

import jax.numpy as jnp
import numpy as np


def integers(seed, B, T, S, H, D, dtype, has_scale):
    """Small integers and powers of two: every sum is exact, so selections must match to the bit, ties and all."""
    rng = np.random.default_rng(seed)
    q = jnp.asarray(rng.integers(-2, 3, (B, T, H, D)), dtype)
    k = jnp.asarray(rng.integers(-2, 3, (B, S, D)), dtype)
    w = jnp.asarray(rng.integers(-2, 3, (B, T, H)), jnp.float32)
    return q, k, jnp.asarray(2.0 ** rng.integers(-2, 2, (B, S)), jnp.float32) if has_scale else None, w


def normal(seed, B, T, S, H, D, dtype, has_scale):
    """Random normal data, as the benches use."""
    rng = np.random.default_rng(seed)
    q = jnp.asarray(rng.standard_normal((B, T, H, D)), jnp.float32).astype(dtype)
    k = jnp.asarray(rng.standard_normal((B, S, D)), jnp.float32).astype(dtype)
    w = jnp.asarray(0.1 * rng.standard_normal((B, T, H)), jnp.float32)
    scale = jnp.asarray(np.exp(0.1 * rng.standard_normal((B, S))), jnp.float32)
    return q, k, scale if has_scale else None, w
