"""The pieces of which indexers differ: norms, RoPE and its layouts, and what makes one key of several tokens."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from hisa_jax.xla.rounding import widened

# What a token brings to its key, [.., n] each: "key", "gate", and "cos" and "sin" of its position.
Rows = dict[str, Array]


def norm(x: Array, kind: str, weight: Array, bias: Array | None, eps: float) -> Array:
    """[..., D]: LayerNorm ("layer"), RMSNorm ("rms"), or RMSNorm by 1 + weight ("unit"), in float32."""
    x32 = widened(x)
    if kind == "layer":
        x32 = x32 - jnp.mean(x32, axis=-1, keepdims=True)
    # A root and a division, as public code has them: `rsqrt` is less exact.
    x32 = x32 / jnp.sqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    factor, shift = (
        None if y is None else y.astype(jnp.float32).reshape((1,) * (x.ndim - 1) + y.shape) for y in (weight, bias)
    )
    assert factor is not None
    x32 = x32 * (1 + factor if kind == "unit" else factor)
    return (x32 if shift is None else x32 + shift).astype(x.dtype)


def turn(x: Array, cos: Array, sin: Array, where: str, pairs: str) -> Array:
    """RoPE on the first or the last dims of x [..., D], by cos and sin of pairs, [..., n / 2] each.

    Source: RoPE, arXiv 2104.09864. `pairs` is that of `table.Family`.
    """
    n = 2 * cos.shape[-1]
    rest, turned = (x[..., n:], x[..., :n]) if where == "first" else (x[..., :-n], x[..., -n:])
    turned32 = widened(turned)
    first, second = (
        (turned32[..., : n // 2], turned32[..., n // 2 :])
        if pairs == "halves"
        else (turned32[..., 0::2], turned32[..., 1::2])
    )
    both = first * cos - second * sin, second * cos + first * sin
    if pairs == "neighbours":
        turned32 = jnp.stack(both, axis=-1).reshape(turned.shape)
    else:
        turned32 = jnp.concatenate(both, axis=-1)
    turned = turned32.astype(x.dtype)
    return jnp.concatenate([turned, rest] if where == "first" else [rest, turned], axis=-1)


def window(pooled: str | None, entry_size: int) -> int:
    """Tokens that a key is made of: its own, and with "windows" as many before them."""
    return 2 * entry_size if pooled == "windows" else entry_size


def pool(pooled: str, rows: Rows, is_there: Array, ape: Array | None) -> Array:
    """One key of the tokens of a window, before its norm.

    Args:
        rows: [..., n, D] each, or [..., n, 2 * D] for "windows".
        is_there: [..., n] bool, which of these tokens there are.
        ape: [r, D] or [r, 2 * D], what a place in an entry adds to a gate.

    Returns: [..., D]. "mean": that of the tokens, in float32. "gated": their sum by the softmax, channel by channel, of
        gate + ape. "windows": the same of 2 * r tokens, of which those before the entry bring the first half of their
        features and those in it the second.
    Source: GLM-5.3-Flash, DeepSeek-V4 and Qwen4 in transformers 5.24.
    """
    keys = rows["key"]
    if pooled == "mean":
        return jnp.mean(widened(keys), axis=-2).astype(keys.dtype)
    assert ape is not None
    gates = widened(rows["gate"])
    if pooled == "windows":
        D, r = keys.shape[-1] // 2, keys.shape[-2] // 2
        halves = [jnp.split(x, 2, axis=-2) for x in (keys, gates)]
        (before, own), (gates_before, own_gates) = halves
        keys = jnp.concatenate([before[..., :D], own[..., D:]], axis=-2)
        gates = jnp.concatenate([gates_before[..., :D], own_gates[..., D:]], axis=-2)
        ape = jnp.concatenate([ape[:, :D], ape[:, D:]], axis=0)
        assert ape.shape[0] == 2 * r
    logits = gates + ape.astype(jnp.float32).reshape((1,) * (gates.ndim - 2) + ape.shape)
    shares = jax.nn.softmax(jnp.where(is_there[..., None], logits, -jnp.inf), axis=-2)
    return jnp.sum(jnp.where(is_there[..., None], shares.astype(keys.dtype) * keys, 0), axis=-2)


def at(rows: Any, index: Array) -> Any:
    """Of trees of [B, S, ...] the rows at [B, ...] int32, clipped."""

    def taken(x: Array) -> Array:
        clipped = jnp.clip(index, 0, x.shape[1] - 1)
        return jax.vmap(lambda row, i: row[i])(x, clipped)

    return jax.tree.map(taken, rows)


def in_order(rows: Any, positions: Array, S: int) -> Any:
    """Trees of [B, T, ...] with a row a token -> [B, S, ...] with the token of each position, zeros where none is."""

    def placed(x: Array) -> Array:
        targets = jnp.where((positions >= 0) & (positions < S), positions, S)
        empty = jnp.zeros((S, *x.shape[2:]), x.dtype)
        return jax.vmap(lambda row, to: empty.at[to].set(row, mode="drop"))(x, targets)

    return jax.tree.map(placed, rows)
