"""Causal attention to all tokens, without [T, T] in memory: cuDNN's on NVIDIA GPUs, tiles of queries elsewhere."""

import functools

import jax
import jax.numpy as jnp
from jax import Array, lax

_TILE = 512


def causal_attention(q: Array, k: Array, v: Array, scale: float) -> Array:
    """softmax over s <= t of scale * q[t, n] . k[s, n], times v[s, n].

    Args:
        q, k, v: [B, T, N, D] of the same dtype, bfloat16 where cuDNN is to run them.
        scale: factor of the logits.

    Returns: [B, T, N, D], differentiable.
    """
    if jax.default_backend() == "gpu" and q.dtype == jnp.bfloat16 and q.shape == v.shape:
        return jax.nn.dot_product_attention(q, k, v, scale=scale, is_causal=True, implementation="cudnn")
    B, T, N, D = q.shape
    tile = min(_TILE, T)
    n = -(-T // tile)
    tiles = jnp.pad(q, ((0, 0), (0, n * tile - T), (0, 0), (0, 0))).reshape(B, n, tile, N, D).swapaxes(0, 1)
    one = jax.checkpoint(functools.partial(_tile, k=k, v=v, scale=scale))
    out = lax.map(one, (jnp.arange(n, dtype=jnp.int32) * tile, tiles))
    return out.swapaxes(0, 1).reshape(B, n * tile, N, v.shape[-1])[:, :T]


def _tile(operands: tuple[Array, Array], *, k: Array, v: Array, scale: float) -> Array:
    first, q = operands
    at = first + jnp.arange(q.shape[1], dtype=jnp.int32)
    is_visible = jnp.arange(k.shape[1], dtype=jnp.int32)[None, :] <= at[:, None]
    return jax.nn.dot_product_attention(q, k, v, mask=is_visible[None, None], scale=scale)
