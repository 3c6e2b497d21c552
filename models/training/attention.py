"""Causal attention to all tokens, without [T, T] in memory: cuDNN's on NVIDIA GPUs, tiles of queries elsewhere."""

import jax
import jax.numpy as jnp
from jax import Array

from hisa_jax.xla import causal


def causal_attention(q: Array, k: Array, v: Array, scale: float) -> Array:
    """softmax over s <= t of scale * q[t, n] . k[s, n], times v[s, n].

    Args:
        q, k, v: [B, T, N, D] of the same dtype, bfloat16 where cuDNN is to run them.
        scale: factor of the logits.

    Returns: [B, T, N, D], differentiable.
    """
    if jax.default_backend() == "gpu" and q.dtype == jnp.bfloat16 and q.shape == v.shape:
        return jax.nn.dot_product_attention(q, k, v, scale=scale, is_causal=True, implementation="cudnn")
    return causal.causal_attention(q, k, v, scale)
