"""The indexer's training loss: how far its choice is from where the attention looks.

    loss[t] = KL(p[t] || softmax over s of I[t, s])
    p[t, s] = mean over heads n of softmax over s of scale * attention_q[t, n] . attention_kv[s]

over the candidates s of query t: the selected tokens in DSA's sparse stage, all visible ones in its dense warm-up. A
tile of queries at a time makes its scores and its target, forward and again backward: no [T, S] is ever in memory.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from hisa_jax import checks
from hisa_jax.sharded import varying
from hisa_jax.xla.query_tiles import QueryTiles


def indexer_kl(
    q: Array,
    k: Array,
    w: Array,
    attention_q: Array,
    attention_kv: Array,
    *,
    scale: float,
    indices: Array | None = None,
) -> Array:
    """The divergence of the indexer's distribution from the attention's, a loss a query.

    Args:
        q, k, w: [B, T, H, D], [B, S, D] bfloat16 or float32 and [B, T, H] float32 of the indexer, of inputs that are
            detached from the model (`lax.stop_gradient`), as DeepSeek-V3.2 trains it.
        attention_q, attention_kv: [B, T, N, Dk], [B, S, Dk] absorbed queries and latents, as for `sparse_mla`.
        scale: of the attention's logits.
        indices: [B, T, K] int32 candidates, -1 where there is none: a `Selection`'s. None: all tokens up to the query's
            own, the queries being the last T of the S tokens.

    Returns: [B, T] float32, 0 where there is no candidate. Differentiable in `q`, `k` and `w` by reverse mode; the
        attention is the target and gets no gradient. Keys and latents that are no candidates of a query change no bit
        of its loss, nor of any gradient, whatever they hold; nor does a query whose loss is not used.
    Raises: TypeError, ValueError: dtypes and shapes other than these.
    Source: DeepSeek-V3.2, section 2.1.1, equations for the dense warm-up and the sparse stage.
    Example:
        >>> q, k, w = jnp.ones((1, 2, 4, 8)), jnp.ones((1, 5, 8)), jnp.ones((1, 2, 4))
        >>> hj.indexer_kl(q, k, w, q, k, scale=1.0).shape
        (1, 2)
    """
    call = "indexer_kl"
    for name, x in (("q", q), ("k", k), ("attention_q", attention_q), ("attention_kv", attention_kv)):
        checks.dtype(call, name, x, ("bfloat16", "float32"))
    checks.dtype(call, "w", w, ("float32",))
    checks.finite(call, "scale", scale)
    checks.shape(call, "q", q, ("B", "T", "H", "D"))
    checks.unsplit(call, q=q, k=k, w=w, attention_q=attention_q, attention_kv=attention_kv, indices=indices)
    (B, T, H, D) = q.shape
    checks.shape(call, "k", k, (B, "S", D), f"its first and last axes must equal q's B and D (q is {list(q.shape)})")
    checks.shape(call, "w", w, (B, T, H), f"one weight a query and head (q is {list(q.shape)})")
    checks.shape(call, "attention_q", attention_q, (B, T, "N", "Dk"), f"the same queries (q is {list(q.shape)})")
    S, Dk = k.shape[1], attention_q.shape[3]
    checks.shape(call, "attention_kv", attention_kv, (B, S, Dk), f"the same tokens (k is {list(k.shape)})")
    if indices is None:
        if T > S:
            raise ValueError(f"{call}: q has T = {T} queries but k only S = {S} keys, of which they must be the last")
        if 0 in (B, T):
            return jnp.zeros((B, T), jnp.float32)
        visible = jnp.broadcast_to(jnp.arange(S - T + 1, S + 1, dtype=jnp.int32), (B, T))[..., None]
        return _kl(*varying.alike(q, k, w, attention_q, attention_kv, visible), scale, True)
    checks.dtype(call, "indices", indices, ("int32",))
    checks.shape(call, "indices", indices, (B, T, "K"), f"one list a query (q is {list(q.shape)})")
    if 0 in (B, T, S, indices.shape[2]):
        return jnp.zeros((B, T), jnp.float32)
    return _kl(*varying.alike(q, k, w, attention_q, attention_kv, indices), scale, False)


class _Tile(NamedTuple):
    """Some queries of sequence `b`; `which`: [t, K] candidates or, where all visible tokens are, [t, 1] how many."""

    b: Array
    q: Array
    w: Array
    attention_q: Array
    which: Array


class _Scored(NamedTuple):
    """What a tile knows: `keys` [t, K, D] or of all queries [S, D], `products` [t, H, K] of heads with keys,
    log-probabilities [t, K] of the indexer (-inf for no candidate), the target [t, K] (0 there), what is one [t, K]."""

    keys: Array
    products: Array
    log_p: Array
    target: Array
    is_candidate: Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def _kl(
    q: Array, k: Array, w: Array, attention_q: Array, kv: Array, which: Array, scale: float, is_dense: bool
) -> Array:
    B, T = q.shape[:2]

    def loss(tile: _Tile) -> Array:
        scored = _scored(tile, k, kv, scale, is_dense)
        p = scored.target
        # Where p is 0 so is its term, whatever the logarithms are.
        log_ratio = jnp.log(jnp.where(p > 0, p, 1)) - jnp.where(p > 0, scored.log_p, 0)
        return jnp.sum(p * log_ratio, axis=1)

    tiles, cut = _tiles(q, w, attention_q, kv, which, is_dense)
    return tiles.join(lax.map(loss, cut), B, T)


def _kl_forward(
    q: Array, k: Array, w: Array, attention_q: Array, kv: Array, which: Array, scale: float, is_dense: bool
) -> tuple[Array, tuple[Array, ...]]:
    return _kl(q, k, w, attention_q, kv, which, scale, is_dense), (q, k, w, attention_q, kv, which)


def _kl_backward(scale: float, is_dense: bool, saved: tuple[Array, ...], d_loss: Array) -> tuple[Array | None, ...]:
    """d loss / d I = softmax(I) - p, and from there through w and the relu."""
    q, k, w, attention_q, kv, which = saved
    B, T = q.shape[:2]
    tiles, cut = _tiles(q, w, attention_q, kv, which, is_dense)

    def one(d_k: Array, operands: tuple[_Tile, Array]) -> tuple[Array, tuple[Array, Array]]:
        tile, d_loss = operands
        keys, products, log_p, p, is_candidate = _scored(tile, k, kv, scale, is_dense)
        has_any = jnp.sum(p, axis=1, keepdims=True)  # 1, or 0 without candidates
        d_scores = d_loss[:, None] * (jnp.exp(log_p) * has_any - p)
        # What a query does not see, and a query whose loss is not used, may hold NaN, which a factor of 0 would not
        # hide. Where NaN counts, the query's `d_scores` are NaN and carry it, so numbers alone meet them in a product.
        d_scores = jnp.where(is_candidate & (d_loss != 0)[:, None], d_scores, 0)
        passes = (d_scores != 0)[:, None, :] & ~(products <= 0)
        keys, q = (jnp.where(jnp.isfinite(x), x, 0) for x in (keys, tile.q))
        d_w = _dot_gradient("tk,thk->th", d_scores, jnp.where(passes, products, 0))
        d_products = jnp.where(passes, d_scores[:, None, :] * tile.w[:, :, None], 0)
        if is_dense:
            d_q = _dot_gradient("thk,kd->thd", d_products, keys)
            d_k = d_k.at[tile.b].add(_dot_gradient("thk,thd->kd", d_products, q))
        else:
            d_q = _dot_gradient("thk,tkd->thd", d_products, keys)
            # No candidate is position -1, which must not wrap around to the last key.
            d_k = d_k.at[tile.b, tile.which].add(
                _dot_gradient("thk,thd->tkd", d_products, q), mode="drop", wrap_negative_indices=False
            )
        return d_k, (d_q, d_w)

    d_k, (d_q, d_w) = lax.scan(one, varying.like(jnp.zeros(k.shape, jnp.float32), saved), (cut, tiles.cut(d_loss)))
    return (
        tiles.join(d_q, B, T).astype(q.dtype),
        d_k.astype(k.dtype),
        tiles.join(d_w, B, T),
        None,
        None,
        None,
    )


_kl.defvjp(_kl_forward, _kl_backward)


def _tiles(q: Array, w: Array, attention_q: Array, kv: Array, which: Array, is_dense: bool) -> tuple[QueryTiles, _Tile]:
    (B, T, H, D), (N, Dk), K = q.shape, attention_q.shape[2:], kv.shape[1] if is_dense else which.shape[2]
    tiles = QueryTiles.of(T, K * (2 * H + N + (0 if is_dense else D + Dk)))
    padding = 0 if is_dense else -1
    return tiles, _Tile(
        tiles.sequences(B), tiles.cut(q), tiles.cut(w), tiles.cut(attention_q), tiles.cut(which, padding)
    )


def _scored(tile: _Tile, k: Array, kv: Array, scale: float, is_dense: bool) -> _Scored:
    S, keys, latents = k.shape[1], k[tile.b], kv[tile.b]
    if is_dense:
        is_candidate = jnp.arange(S, dtype=jnp.int32)[None, :] < tile.which
        rows = "sd"
    else:
        is_candidate = (tile.which >= 0) & (tile.which < S)
        at = jnp.clip(tile.which, 0, S - 1)
        # A token that is no candidate may hold NaN, which a factor of 0 would not hide.
        keys, latents = (jnp.where(is_candidate[..., None], x[at], 0) for x in (keys, latents))
        rows = "tsd"
    logits = scale * _dot(f"tnd,{rows}->tns", tile.attention_q, latents)
    logits = jnp.where(is_candidate[:, None, :], logits, -jnp.inf)
    target = jnp.mean(_exp(logits, jax.nn.logsumexp(logits, axis=2, keepdims=True)), axis=1)
    products = _dot(f"thd,{rows}->ths", tile.q, keys)
    scores = _dot("ths,th->ts", jnp.maximum(products, 0), tile.w)
    scores = jnp.where(is_candidate, scores, -jnp.inf)
    total = jax.nn.logsumexp(scores, axis=1, keepdims=True)
    return _Scored(keys, products, scores - jnp.where(jnp.isneginf(total), 0, total), target, is_candidate)


def _exp(x: Array, total: Array) -> Array:
    """exp(x - total), and 0 where there is nothing to sum."""
    return jnp.exp(x - jnp.where(jnp.isneginf(total), 0, total))


def _dot(formula: str, a: Array, b: Array) -> Array:
    """A float32 sum of exact products: those of two bfloat16 numbers are, by themselves."""
    if a.dtype != b.dtype:
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    return jnp.einsum(formula, a, b, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32)


def _dot_gradient(formula: str, a: Array, b: Array) -> Array:
    """A float32 sum of products of gradients, which tensor cores may round to about 11 bits."""
    return jnp.einsum(
        formula, a.astype(jnp.float32), b.astype(jnp.float32), precision=lax.Precision.HIGH,
        preferred_element_type=jnp.float32,
    )  # fmt: skip
