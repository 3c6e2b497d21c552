"""Indexers of DeepSeek's shape, one a layer: many small heads that read the layer's normed input."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from bench.smollm2.model import Config, rotate

SIZE = 128  # of a head


class Indexers(NamedTuple):
    """Parameters, float32, of all layers stacked or of one.

    `q` [L, E, H * D], `k` [L, E, D], `scale` and `bias` [L, D] of the keys' LayerNorm, `w` [L, E, H].
    """

    q: Array
    k: Array
    scale: Array
    bias: Array
    w: Array

    @property
    def H(self) -> int:
        return self.w.shape[-1]


def random_indexers(key: Array, config: Config, H: int) -> Indexers:
    L, E = config.n_layers, config.width
    keys = jax.random.split(key, 3)
    shapes = ((L, E, H * SIZE), (L, E, SIZE), (L, E, H))
    q, k, w = (jax.random.normal(one, shape) * E**-0.5 for one, shape in zip(keys, shapes, strict=True))
    return Indexers(q, k, jnp.ones((L, SIZE)), jnp.zeros((L, SIZE)), 0.3 * w)


def index_keys(one: Indexers, h: Array, table: tuple[Array, Array]) -> Array:
    """[S, E] -> [S, D] in the dtype of `h`: LayerNorm, then RoPE on the first dims."""
    k = (h @ one.k.astype(h.dtype)).astype(jnp.float32)
    k = (k - jnp.mean(k, axis=-1, keepdims=True)) * jax.lax.rsqrt(jnp.var(k, axis=-1, keepdims=True) + 1e-5)
    return _turned((k * one.scale[None, :] + one.bias[None, :]).astype(h.dtype), table)


def index_queries(one: Indexers, h: Array, table: tuple[Array, Array]) -> tuple[Array, Array]:
    """[t, E] -> queries [t, H, D] in the dtype of `h`, weights [t, H] float32 with both scales in them."""
    t, H = h.shape[0], one.H
    q = (h @ one.q.astype(h.dtype)).reshape(t, H, SIZE)
    w = (h @ one.w.astype(h.dtype)).astype(jnp.float32) * (H * SIZE) ** -0.5
    return _turned(q, table), w


def _turned(x: Array, table: tuple[Array, Array]) -> Array:
    n = 2 * table[0].shape[-1]
    return jnp.concatenate([rotate(x[..., :n], table), x[..., n:]], axis=-1)


def index_scores(q: Array, k: Array, w: Array, products: Any = jnp.float32) -> Array:
    """[t, H, D], [S, D], [t, H] -> [t, S] float32: sum_h w[t, h] * relu(q[t, h] . k[s]).

    Args:
        products: dtype of the products; bfloat16 halves what a gradient keeps.
    """
    found = jnp.einsum("thd,sd->ths", q, k, preferred_element_type=products)
    return jnp.sum(jax.nn.relu(found).astype(jnp.float32) * w[:, :, None], axis=1)
