"""Sparse multi-head latent attention over the selected tokens, in absorbed form, in pure JAX.

A tile of queries at a time gathers its tokens' latents and attends to them, so memory is that of one tile. The
backward pass gathers and recomputes tile by tile, too, from the saved logsumexp.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

from hisa_jax.latents import QuantizedLatents
from hisa_jax.sharded import varying
from hisa_jax.xla.query_tiles import QueryTiles


@functools.partial(jax.jit, static_argnames=("scale", "value_dim"))
def forward(
    q: Array, kv: Array | QuantizedLatents, indices: Array, *, scale: float, value_dim: int
) -> tuple[Array, Array]:
    """[B, T, N, Dk], [B, S, Dk], [B, T, K] -> [B, T, N, value_dim], and the logsumexp of the logits, [B, T, N]."""
    (B, T, N, _), K = q.shape, indices.shape[2]
    tiles = QueryTiles.of(T, N * K)  # the logits: few queries when heads and tokens are many

    def tile(operands: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        b, q, indices = operands
        selected, is_real = _gather(kv, b, indices, q.dtype)
        logits = _logits(q, selected, is_real, scale)
        lse = jax.nn.logsumexp(logits, axis=-1)  # [t, N]
        p = probabilities(logits, lse)
        return dot("tnk,tkv->tnv", p, selected[..., :value_dim]).astype(q.dtype), lse

    out, lse = lax.map(tile, (tiles.sequences(B), tiles.cut(q), tiles.cut(indices, -1)))
    return tiles.join(out, B, T), tiles.join(lse, B, T)


@functools.partial(jax.jit, static_argnums=(0, 1))
def backward(
    scale: float, value_dim: int, saved: tuple, gradients: tuple[Array, Array]
) -> tuple[Array, Array | QuantizedLatents]:
    """The gradient of a softmax by its saved logsumexp, as in FlashAttention-2 (arXiv 2307.08691), section 3.1."""
    q, kv, indices, out, lse = saved
    d_out, d_lse = gradients
    (B, T, N, _), K = q.shape, indices.shape[2]
    tiles = QueryTiles.of(T, N * K)
    # d logits = p * (d p - delta): delta gathers what the normalisation and the logsumexp pass on.
    delta = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1) - d_lse  # [B, T, N]

    def tile(d_kv: Any, operands: tuple[Array, ...]) -> tuple[Any, Array]:
        b, q, indices, lse, d_out, delta = operands
        selected, is_real = _gather(kv, b, indices, q.dtype)
        p = probabilities(_logits(q, selected, is_real, scale), lse)
        d_p = dot("tnv,tkv->tnk", d_out, selected[..., :value_dim])
        # Where nothing is selected the caller may pass on NaN: the gradient of a logsumexp of -inf, for instance.
        d_logits = jnp.where(is_real[:, None, :], p * (d_p - delta[..., None]) * scale, 0)
        d_q = dot("tnk,tkd->tnd", d_logits, selected)
        if isinstance(kv, QuantizedLatents):  # constants: no gradient goes through them
            return d_kv, d_q
        d_selected = dot("tnk,tnd->tkd", d_logits, q)
        d_selected = d_selected.at[..., :value_dim].add(dot("tnk,tnv->tkv", p, d_out))
        return d_kv.at[b, jnp.where(is_real, indices, -1)].add(
            d_selected, mode="drop", wrap_negative_indices=False
        ), d_q

    parts = (
        tiles.sequences(B),
        tiles.cut(q),
        tiles.cut(indices, -1),
        tiles.cut(lse),
        tiles.cut(d_out),
        tiles.cut(delta),
    )
    start = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), kv)
    d_kv, d_q = lax.scan(tile, varying.like(start, saved), parts)
    return tiles.join(d_q, B, T).astype(q.dtype), jax.tree.map(lambda d, x: d.astype(x.dtype), d_kv, kv)


def _gather(kv: Array | QuantizedLatents, b: Array, indices: Array, dtype: DTypeLike) -> tuple[Array, Array]:
    """[B, S, Dk], [], [t, K] -> the selected tokens [t, K, Dk] and which of them are real [t, K]."""
    S = kv.shape[1]
    is_real = (indices >= 0) & (indices < S)
    selected = jax.tree.map(lambda x: x[b, jnp.clip(indices, 0, S - 1)], kv)
    if isinstance(selected, QuantizedLatents):
        selected = selected.dequantize().astype(dtype)
    # A token that no query selected may hold NaN, which a probability of 0 would not hide.
    return jnp.where(is_real[..., None], selected, 0), is_real


def _logits(q: Array, selected: Array, is_real: Array, scale: float) -> Array:
    logits = dot("tnd,tkd->tnk", q, selected) * scale
    return jnp.where(is_real[:, None, :], logits, -jnp.inf)


def probabilities(logits: Array, lse: Array) -> Array:
    """exp(logits - lse), and 0 in rows where nothing is selected."""
    return jnp.exp(logits - jnp.where(jnp.isneginf(lse), 0, lse)[..., None])


def dot(formula: str, a: Array, b: Array) -> Array:
    """A float32 sum of products; beside bfloat16 values, probabilities and gradients enter as bfloat16."""
    if jnp.bfloat16 in (a.dtype, b.dtype):
        a, b = a.astype(jnp.bfloat16), b.astype(jnp.bfloat16)
    return jnp.einsum(formula, a, b, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
