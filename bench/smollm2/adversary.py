"""The scan's worst case, drawn: heads that have nothing in common, few open at a token, some weights below 0."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.scipy.stats import norm

from bench.smollm2.filters import Method, View, chosen

D = 128


def draw(key: Array, t: int, S: int, H: int, is_open: Array, shared: Array, negative: Array) -> View:
    """Queries that see all keys.

    Args:
        is_open: share of heads open at a token.
        shared: how much of each head's direction all heads of a query have in common, a squared cosine.
        negative: share of weights below 0.
    """
    keys = jax.random.split(key, 6)
    own, common = jax.random.normal(keys[0], (t, H, D)), jax.random.normal(keys[1], (t, 1, D))
    q = jnp.sqrt(1 - shared) * own + jnp.sqrt(shared) * common
    k = jax.random.normal(keys[2], (S, D))
    # One dim of every key is the same; there each head has the offset that leaves so few tokens open.
    q = q.at[:, :, 0].set(norm.ppf(is_open) * jnp.sqrt(jnp.sum(q[:, :, 1:] ** 2, axis=-1)))
    k = k.at[:, 0].set(1.0)
    w = jnp.abs(jax.random.normal(keys[3], (t, H))) + 0.1
    w = jnp.where(jax.random.uniform(keys[4], (t, H)) < negative, -w, w)
    return View(q, w, k, jnp.full((t,), S, jnp.int32))


def recalls(methods: Mapping[str, Method], S: int, H: int, seed: int = 0, t: int = 64) -> list[dict[str, Any]]:
    """Share of the flat selection that each method finds, a row a case."""

    @jax.jit
    def measure(key: Array, is_open: Array, shared: Array, negative: Array) -> Array:
        view = draw(key, t, S, H, is_open, shared, negative)
        masks = [chosen(method, view) for method in methods.values()]
        return jnp.stack([jnp.sum(mask & masks[0]) / jnp.sum(masks[0]) for mask in masks])

    rows = []
    for is_open in (0.5, 0.16, 0.05):
        for shared in (0.0, 0.2, 0.5):
            for negative in (0.0, 0.3):
                with jax.default_matmul_precision("highest"):
                    found = measure(jax.random.key(seed), is_open, shared, negative)
                case = {"open": is_open, "shared": shared, "negative": negative}
                rows.append({**case, "recall": dict(zip(methods, map(float, found), strict=True))})
    return rows
