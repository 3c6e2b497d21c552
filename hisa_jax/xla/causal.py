"""Causal attention to all tokens in XLA, without [T, T] in memory: a tile of queries at a time."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import DTypeLike

_TILE = 512


def wide_dtype(dtype: DTypeLike) -> np.dtype:
    """What sums of such numbers are made in: float32, or float64 of those."""
    return np.dtype(np.float64 if np.dtype(dtype) == np.float64 else np.float32)


def causal_attention(q: Array, k: Array, v: Array, scale: float) -> Array:
    """softmax over s <= t of scale * q[t, h] . k[s, g], times v[s, g], for the heads h of group g.

    Args:
        q, k, v: [B, T, H, D], [B, T, G, D], [B, T, G, V] of one dtype; H is a multiple of G.
        scale: factor of the logits.

    Returns: [B, T, H, V], differentiable.
    """
    (B, T, H, D), G = q.shape, k.shape[2]
    tile = min(_TILE, T)
    n = -(-T // tile)
    padded = jnp.pad(q, ((0, 0), (0, n * tile - T), (0, 0), (0, 0)))
    tiles = padded.reshape(B, n, tile, G, H // G, D).swapaxes(0, 1)
    one = jax.checkpoint(functools.partial(_tile, k=k, v=v, scale=scale))
    out = lax.map(one, (jnp.arange(n, dtype=jnp.int32) * tile, tiles))
    return out.swapaxes(0, 1).reshape(B, n * tile, H, v.shape[-1])[:, :T]


def _tile(operands: tuple[Array, Array], *, k: Array, v: Array, scale: float) -> Array:
    """Queries [B, t, G, R, D] from position `first` on."""
    first, q = operands
    wide = wide_dtype(q.dtype)
    at = first + jnp.arange(q.shape[1], dtype=jnp.int32)
    is_visible = jnp.arange(k.shape[1], dtype=jnp.int32)[None, :] <= at[:, None]
    logits = scale * jnp.einsum("btgrd,bsgd->bgrts", q, k, preferred_element_type=wide)
    logits = jnp.where(is_visible[None, None, None], logits, jnp.finfo(wide).min)
    p = _softmax(logits).astype(v.dtype)
    return jnp.einsum("bgrts,bsgv->btgrv", p, v)


@jax.custom_jvp
def _softmax(logits: Array) -> Array:
    """Over the last axis.

    `jax.nn.softmax` divides by the sums, each for many numbers. XLA makes that a product with the inverse or leaves it,
    by what is around it: on a mesh other than on one device, and then their gradients are not of the same bits.
    """
    e = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
    return e * (1 / jnp.sum(e, axis=-1, keepdims=True))


@_softmax.defjvp
def _softmax_derivative(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    p, (d,) = _softmax(*primals), tangents
    return p, p * (d - jnp.sum(p * d, axis=-1, keepdims=True))
