"""Heads as kernels take them: at least 16 of each query, and with a relu.

Fewer heads are repeated, each with its share of its weight. Without an activation a head becomes two, q of weight w and
-q of weight -w, since x = relu(x) - relu(-x). Both change no score, but by the order in which float32 numbers are added
up: shares are powers of two, and the products of -q are those of q. The keys are read as often as before, so that where
reading them takes the time, as in decoding, the rows that were added cost nothing.
"""

import dataclasses

import jax.numpy as jnp

from hisa_jax.layout import Call
from hisa_jax.methods import Method, Scan, is_by_best_token

LEAST = 16  # rows of the tensor cores' products
_SIGNED = (1, 2, 4, 8, 16, 32, 64)  # heads without an activation, as the caller counts them: each becomes two


def n_heads(H: int, method: Method) -> int:
    """How many heads kernels are given in place of H."""
    signed = _signed(H, method)
    return LEAST if signed < LEAST and LEAST % signed == 0 else signed


def why_not(H: int, q_dtype: str, method: Method) -> str | None:
    """None, or why kernels cannot have the heads of a call."""
    if method.activation is not None or _stays(H, method):
        return None
    call = f"a {type(method).__name__} of activation=None"
    if q_dtype == "int8":
        return f"has no kernels for {call} with int8 queries: -128 has no opposite"
    if H not in _SIGNED:
        return f"needs {', '.join(map(str, _SIGNED[:-1]))} or {_SIGNED[-1]} heads for {call}, not {H}"
    return None


def is_flat(method: Method, H: int) -> bool:
    """Whether a scan has no head that is not exact: then it is the flat indexer, of the keys themselves."""
    return isinstance(method, Scan) and method.exact_heads >= H and method.sketch is None


def as_kernels_take(call: Call, method: Method) -> tuple[Call, Method]:
    """A call with heads for kernels, and the method that means the same of these."""
    H, q, w = call.q.shape[-2], call.q, call.w
    if _stays(H, method):
        return call, method
    if method.activation is None:
        q, w = jnp.concatenate([q, -q], axis=-2), jnp.concatenate([w, -w], axis=-1)
    times = n_heads(H, method) // q.shape[-2]
    if times > 1:
        q, w = jnp.repeat(q, times, axis=-2), jnp.repeat(w / times, times, axis=-1)
    return dataclasses.replace(call, q=q, w=w), of_heads(H, method)


def of_heads(H: int, method: Method) -> Method:
    """The method of H heads as one of those that kernels are given: a scan has more exact ones.

    Those of one head are side by side and of one size, so that all or none are exact.
    """
    if not isinstance(method, Scan):
        return dataclasses.replace(method, activation="relu")
    return dataclasses.replace(method, exact_heads=method.exact_heads * (n_heads(H, method) // H))


def _stays(H: int, method: Method) -> bool:
    """Whether there is a kernel for a head by itself."""
    return H == 1 and is_by_best_token(method)


def _signed(H: int, method: Method) -> int:
    return H * (1 if method.activation else 2)
