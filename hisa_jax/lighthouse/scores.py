"""How much a token's query and its key count in the selection: free of parameters and of gradients."""

from collections.abc import Callable

import jax.numpy as jnp
from jax import Array

from hisa_jax.lighthouse.method import DILATION, Lighthouse
from hisa_jax.lighthouse.sums import total
from hisa_jax.xla.rounding import widened

Attend = Callable[[Array, Array, Array], Array]


def scores(q: Array, k: Array, v: Array | None, method: Lighthouse, attend: Attend) -> tuple[Array, Array]:
    """Scores of queries and of keys, the best of each group of query heads.

    Args:
        q, k, v: [B, T, H, D], [B, T, G, D], [B, T, G, V]; v is for the dilated scorer.
        method: its `scorer`.
        attend: causal attention of such arrays, for the dilated scorer.

    Returns: two [B, T, G] float32, what orders as the l2 norms do; NaN scores below all others.
    """
    if method.scorer == "norm":
        return _strength(q, k.shape[2]), _strength(k, k.shape[2])
    assert v is not None  # the caller has checked
    B, T, H, _ = q.shape
    G = k.shape[2]

    def by_class(x: Array) -> Array:
        """[B, T, ...] -> [B * DILATION, T / DILATION, ...]: tokens of the same position modulo DILATION."""
        rows, each = T // DILATION, x.shape[2:]
        return x.reshape(B, rows, DILATION, *each).swapaxes(1, 2).reshape(B * DILATION, rows, *each)

    def in_order(x: Array) -> Array:
        return x.reshape(B, DILATION, T // DILATION, *x.shape[2:]).swapaxes(1, 2).reshape(B, T, *x.shape[2:])

    q, k, v = map(by_class, (q, k, v))
    every_k, every_v = (jnp.repeat(x, H // G, axis=2) for x in (k, v))
    return _strength(in_order(attend(q, k, v)), G), _strength(in_order(attend(every_k, q, every_v)), G)


def _strength(x: Array, G: int) -> Array:
    """[B, T, H, D] -> [B, T, G]: the largest squared norm among the heads of a group."""
    B, T, H, _ = x.shape
    # Not the root: it would make ties of numbers that differ.
    squares = total(jnp.square(widened(x)), -1)
    return jnp.max(jnp.where(jnp.isnan(squares), -1.0, squares).reshape(B, T, G, H // G), axis=-1)
