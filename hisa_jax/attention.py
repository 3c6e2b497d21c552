"""Sparse multi-head latent attention over the selected tokens, in absorbed form, in pure JAX.

A tile of queries at a time gathers its tokens' latents and attends to them, so memory is that of one tile. The
backward pass gathers and recomputes tile by tile, too, from the saved logsumexp.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from hisa_jax import checks, dispatch
from hisa_jax.sharded import varying
from hisa_jax.xla.query_tiles import QueryTiles


def sparse_mla(
    q: Array,
    kv: Array,
    indices: Array,
    *,
    scale: float,
    value_dim: int = 512,
    sink: Array | None = None,
    return_lse: bool = False,
    implementation: str = "auto",
) -> Array | tuple[Array, Array]:
    """Attends to the selected tokens of a latent cache that all heads share.

    out[t, n] = sum_s p[t, n, s] * kv[s, :value_dim],  p = softmax over the selected s of scale * q[t, n] . kv[s]

    Args:
        q: [B, T, N, Dk] absorbed queries (latent then rope part, 512 + 64 in DeepSeek-V3.2), bfloat16 or float32.
        kv: [B, S, Dk] latents and rope keys, same dtype.
        indices: [B, T, K] int32 positions in the sequence in any order, -1 wherever there is none. What lies outside of
            [0, S) counts as -1. A token listed twice counts twice: it has two shares of the softmax.
        scale: factor of the logits, a finite number.
        value_dim: the first `value_dim` of the Dk features are the values.
        sink: [N] float32, a logit per head that takes part in the softmax and has no value.
        return_lse: also return the logsumexp of the logits, without the sink, for merging partial results.
        implementation: of the forward pass: "mosaic_gpu", "triton", "mosaic_tpu", "xla", or "auto" as for `select`. The
            backward pass is XLA's.

    Returns: [B, T, N, value_dim] in q's dtype, zeros where nothing is selected; with `return_lse` also [B, T, N]
        float32, -inf there. Differentiable in `q`, `kv` and `sink` by reverse mode; `return_lse` too. What a row holds
        that a query does not select, NaN too, changes no bit of the query's output or of any gradient, and the row's
        own gradient from it is 0.
    Raises: TypeError: a dtype or a number not listed above. ValueError: shapes that do not fit; a scale that is not
        finite; an implementation that cannot run here.
    Source: DeepSeek-V2, arXiv 2405.04434, section 2.1 (absorbed form); the sink as in FlashMLA.
    Example:
        >>> q, kv, indices = jnp.ones((1, 2, 4, 24)), jnp.ones((1, 8, 24)), jnp.array([[[0, 3], [5, -1]]])
        >>> hj.sparse_mla(q, kv, indices, value_dim=16, scale=24**-0.5).shape
        (1, 2, 4, 16)
    """
    call = "sparse_mla"
    checks.unsplit(call, q=q, kv=kv, indices=indices, sink=sink)
    check_batch(call, q, kv, indices)
    scale, value_dim, name = check_options(call, q, scale, value_dim, sink, return_lse, implementation)
    (B, T, N, _), S = q.shape, kv.shape[1]
    if 0 in (B, T, S, N, indices.shape[2]):
        out, lse = jnp.zeros((B, T, N, value_dim), q.dtype), jnp.full((B, T, N), -jnp.inf, jnp.float32)
    else:
        out, lse = _attend(*varying.alike(q, kv, indices), scale, value_dim, name)
        out = with_sink(out, lse, sink)
    return (out, lse) if return_lse else out


def check_batch(call: str, q: Array, kv: Array, indices: Array) -> None:
    """Raises unless the arrays of `sparse_mla` fit each other."""
    checks.dtype(call, "q", q, ("bfloat16", "float32"))
    checks.dtype(call, "kv", kv, (q.dtype.name,))
    checks.shape(call, "q", q, ("B", "T", "N", "Dk"))
    B, T, _, Dk = q.shape
    checks.shape(
        call, "kv", kv, (B, "S", Dk), f"its first and last axes must equal q's B and Dk (q is {list(q.shape)})"
    )
    checks.int32(call, "indices", indices, (B, T, "K"), f"one list a query (q is {list(q.shape)})")
    checks.value(
        (indices >= -1) & (indices < kv.shape[1]),
        f"{call}: indices range from {{least}} to {{most}}, wanted -1 to {kv.shape[1] - 1}",
        least=jnp.min(indices, initial=-1),
        most=jnp.max(indices, initial=-1),
    )


def check_options(
    call: str, q: Array, scale: float, value_dim: int, sink: Array | None, return_lse: bool, implementation: str
) -> tuple[float, int, str]:
    """What all forms of the attention take beside queries [..., N, Dk] and latents: raises if it does not fit.

    Returns: scale and value_dim as `check_numbers`; the name of the implementation to run.
    """
    scale, value_dim = check_numbers(call, scale, value_dim, q.shape[-1])
    check_sink(call, sink, q)
    checks.flags(call, return_lse=return_lse)
    problem = dispatch.AttentionProblem(N=q.shape[-2], key_dim=q.shape[-1], value_dim=value_dim, dtype=q.dtype.name)
    name = dispatch.choose(call, implementation, dispatch.attention_reasons(dispatch.Device.default(), problem))
    return scale, value_dim, name


def check_numbers(call: str, scale: float, value_dim: int, Dk: int) -> tuple[float, int]:
    """The static numbers of a call as Python's own, which promote no dtype; raises if they are none or out of range."""
    if isinstance(scale, bool) or not isinstance(scale, int | float | np.number):
        raise TypeError(f"{call}: scale is {type(scale).__name__}, wanted a number known at trace time")
    if not abs(scale) <= float(np.finfo(np.float32).max):
        raise ValueError(f"{call}: scale={scale}, wanted a finite float32 number")
    if isinstance(value_dim, bool) or not isinstance(value_dim, int | np.integer):
        raise TypeError(f"{call}: value_dim is {type(value_dim).__name__}, wanted a whole number")
    if not 1 <= value_dim <= Dk:
        raise ValueError(f"{call}: value_dim={value_dim}, wanted 1 to Dk = {Dk}")
    return float(scale), int(value_dim)


def check_sink(call: str, sink: Array | None, q: Array) -> None:
    """Raises unless a sink is None or has one logit for each head of q [..., N, Dk]."""
    if sink is not None:
        checks.dtype(call, "sink", sink, ("float32",))
        checks.shape(call, "sink", sink, (q.shape[-2],), f"one logit a head (q is {list(q.shape)})")


def with_sink(out: Array, lse: Array, sink: Array | None) -> Array:
    """[..., N, V], [..., N], [N] or None -> [..., N, V]: a logit without a value beside those of the tokens."""
    if sink is None:
        return out
    # Where nothing is selected `out` is 0, whatever is kept of it; beside a sink of -inf the difference would be NaN.
    lse = jnp.where(jnp.isneginf(lse), 0, lse)
    # What the sink takes from every value: 1 - exp(lse) / (exp(lse) + exp(sink)).
    kept = jax.nn.sigmoid(lse - sink.reshape((1,) * (lse.ndim - 1) + sink.shape))
    return (out * kept[..., None]).astype(out.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _attend(
    q: Array, kv: Array, indices: Array, scale: float, value_dim: int, implementation: str
) -> tuple[Array, Array]:
    """[B, T, N, Dk], [B, S, Dk], [B, T, K] -> [B, T, N, value_dim], [B, T, N] float32."""
    attend = _xla if implementation == "xla" else dispatch.attention(implementation)
    return attend(q, kv, indices, scale=scale, value_dim=value_dim)


@functools.partial(jax.jit, static_argnames=("scale", "value_dim"))
def _xla(q: Array, kv: Array, indices: Array, *, scale: float, value_dim: int) -> tuple[Array, Array]:
    (B, T, N, _), K = q.shape, indices.shape[2]
    tiles = QueryTiles.of(T, N * K)  # the logits: few queries when heads and tokens are many

    def tile(operands: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        b, q, indices = operands
        selected, is_real = _gather(kv, b, indices)
        logits = _logits(q, selected, is_real, scale)
        lse = jax.nn.logsumexp(logits, axis=-1)  # [t, N]
        p = _probabilities(logits, lse)
        return _dot("tnk,tkv->tnv", p, selected[..., :value_dim]).astype(q.dtype), lse

    out, lse = lax.map(tile, (tiles.sequences(B), tiles.cut(q), tiles.cut(indices, -1)))
    return tiles.join(out, B, T), tiles.join(lse, B, T)


def _attend_forward(q: Array, kv: Array, indices: Array, scale: float, value_dim: int, implementation: str) -> Any:
    out, lse = _attend(q, kv, indices, scale, value_dim, implementation)
    return (out, lse), (q, kv, indices, out, lse)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _attend_backward(
    scale: float, value_dim: int, implementation: str, saved: tuple[Array, ...], gradients: tuple[Array, Array]
) -> tuple[Array, Array, None]:
    """The gradient of a softmax by its saved logsumexp, as in FlashAttention-2 (arXiv 2307.08691), section 3.1."""
    q, kv, indices, out, lse = saved
    d_out, d_lse = gradients
    (B, T, N, _), K = q.shape, indices.shape[2]
    tiles = QueryTiles.of(T, N * K)
    # d logits = p * (d p - delta): delta gathers what the normalisation and the logsumexp pass on.
    delta = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1) - d_lse  # [B, T, N]

    def tile(d_kv: Array, operands: tuple[Array, ...]) -> tuple[Array, Array]:
        b, q, indices, lse, d_out, delta = operands
        selected, is_real = _gather(kv, b, indices)
        p = _probabilities(_logits(q, selected, is_real, scale), lse)
        d_p = _dot("tnv,tkv->tnk", d_out, selected[..., :value_dim])
        # Where nothing is selected the caller may pass on NaN: the gradient of a logsumexp of -inf, for instance.
        d_logits = jnp.where(is_real[:, None, :], p * (d_p - delta[..., None]) * scale, 0)
        d_q = _dot("tnk,tkd->tnd", d_logits, selected)
        d_selected = _dot("tnk,tnd->tkd", d_logits, q)
        d_selected = d_selected.at[..., :value_dim].add(_dot("tnk,tnv->tkv", p, d_out))
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
    d_kv, d_q = lax.scan(tile, varying.like(jnp.zeros(kv.shape, jnp.float32), saved), parts)
    return tiles.join(d_q, B, T).astype(q.dtype), d_kv.astype(kv.dtype), None


_attend.defvjp(_attend_forward, _attend_backward)


def _gather(kv: Array, b: Array, indices: Array) -> tuple[Array, Array]:
    """[B, S, Dk], [], [t, K] -> the selected tokens [t, K, Dk] and which of them are real [t, K]."""
    S = kv.shape[1]
    is_real = (indices >= 0) & (indices < S)
    selected = kv[b, jnp.clip(indices, 0, S - 1)]
    # A token that nobody selected may hold NaN, which a probability of 0 would not hide.
    return jnp.where(is_real[..., None], selected, 0), is_real


def _logits(q: Array, selected: Array, is_real: Array, scale: float) -> Array:
    logits = _dot("tnd,tkd->tnk", q, selected) * scale
    return jnp.where(is_real[:, None, :], logits, -jnp.inf)


def _probabilities(logits: Array, lse: Array) -> Array:
    """exp(logits - lse), and 0 in rows where nothing is selected."""
    return jnp.exp(logits - jnp.where(jnp.isneginf(lse), 0, lse)[..., None])


def _dot(formula: str, a: Array, b: Array) -> Array:
    """A float32 sum of products; beside bfloat16 values, probabilities and gradients enter as bfloat16."""
    if jnp.bfloat16 in (a.dtype, b.dtype):
        a, b = a.astype(jnp.bfloat16), b.astype(jnp.bfloat16)
    return jnp.einsum(formula, a, b, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
