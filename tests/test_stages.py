"""Stages by themselves, where what they get wrong could not be seen in a whole selection."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hisa_jax.layout import Keys
from hisa_jax.xla import stages


@pytest.mark.parametrize("has_scale", [False, True], ids=["float32", "scaled"])
def test_a_mean_is_over_the_tokens_present_whatever_the_others_hold(has_scale):
    """A partly filled block is always kept, so no selection depends on its mean."""
    rng, n, size = np.random.default_rng(0), 5, 16
    keys, scales = rng.integers(-3, 4, (n * size, 8)).astype(np.float32), 2.0 ** rng.integers(-2, 3, n * size)
    counts = np.array([16, 1, 0, 15, 8], np.int32)
    is_there = (np.arange(size) < counts[:, None]).reshape(-1, 1)
    spoilt = Keys(jnp.where(is_there, keys, np.nan), jnp.asarray(scales, jnp.float32) if has_scale else None)
    for tile_n in (2, 100):
        pool = jax.jit(stages.pool, static_argnums=(3, 4))
        got = pool(spoilt, jnp.arange(n, dtype=jnp.int32) * size, jnp.asarray(counts), size, tile_n)
        values = np.where(is_there, keys * (scales[:, None] if has_scale else 1), 0).reshape(n, size, 8)
        wanted = values.sum(1) / np.maximum(counts, 1)[:, None]
        np.testing.assert_allclose(got, wanted, rtol=1e-6)
