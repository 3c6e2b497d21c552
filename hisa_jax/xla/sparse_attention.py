"""Sparse grouped-query attention over listed blocks of tokens, in pure JAX.

A tile of queries at a time gathers its tokens' keys and values and attends to them, so memory is that of one tile. The
backward pass gathers and recomputes tile by tile, too, from the saved logsumexp. Tokens are blocks of one.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array, lax

from hisa_jax.layout import BlockLists
from hisa_jax.sharded import varying
from hisa_jax.xla.attention import dot, probabilities
from hisa_jax.xla.query_tiles import QueryTiles


@functools.partial(jax.jit, static_argnames=("scale", "block_size"))
def forward(q: Array, k: Array, v: Array, lists: BlockLists, *, scale: float, block_size: int) -> tuple[Array, Array]:
    """[B, T, Hq, D], [B, S, G, D], [B, S, G, V] -> [B, T, Hq, V], and the logsumexp of the logits, [B, T, Hq]."""
    (B, T), G = q.shape[:2], k.shape[2]
    tiles = _tiles(q, k, v, lists, block_size)

    def tile(operands: tuple[Array, Array, BlockLists]) -> tuple[Array, Array]:
        b, q, lists = operands
        tokens, is_real = _tokens(lists, G, block_size)
        keys, values = _gather(k, b, tokens, is_real), _gather(v, b, tokens, is_real)
        logits = _logits(_by_group(q, G), keys, is_real, scale)
        lse = jax.nn.logsumexp(logits, axis=-1)  # [t, G, R]
        out = dot("tgrn,tgnv->tgrv", probabilities(logits, lse), values).astype(q.dtype)
        return out.reshape(*q.shape[:2], -1), lse.reshape(q.shape[:2])

    out, lse = lax.map(tile, (tiles.sequences(B), tiles.cut(q), _cut(tiles, lists)))
    return tiles.join(out, B, T), tiles.join(lse, B, T)


@functools.partial(jax.jit, static_argnums=(0, 1))
def backward(
    scale: float, block_size: int, saved: tuple, gradients: tuple[Array, Array]
) -> tuple[Array, Array, Array]:  # fmt: skip
    """The gradient of a softmax by its saved logsumexp, as in FlashAttention-2 (arXiv 2307.08691), section 3.1."""
    q, k, v, lists, out, lse = saved
    d_out, d_lse = gradients
    (B, T), G = q.shape[:2], k.shape[2]
    tiles = _tiles(q, k, v, lists, block_size)
    # d logits = p * (d p - delta): delta gathers what the normalisation and the logsumexp pass on.
    delta = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1) - d_lse  # [B, T, Hq]

    def tile(sums: tuple[Array, ...], operands: tuple) -> tuple[tuple[Array, ...], Array]:
        b, q, lists, *others = operands
        q_of, lse, d_out, delta = (_by_group(x, G) for x in (q, *others))
        tokens, is_real = _tokens(lists, G, block_size)
        keys, values = _gather(k, b, tokens, is_real), _gather(v, b, tokens, is_real)
        p = probabilities(_logits(q_of, keys, is_real, scale), lse)
        d_p = dot("tgrv,tgnv->tgrn", d_out, values)
        # Where nothing is listed the caller may pass on NaN: the gradient of a logsumexp of -inf, for instance.
        d_logits = jnp.where(is_real[:, :, None], p * (d_p - delta[..., None]) * scale, 0)
        at = b, jnp.where(is_real, tokens, -1), _groups(G)
        of_tokens = dot("tgrn,tgrd->tgnd", d_logits, q_of), dot("tgrn,tgrv->tgnv", p, d_out)
        sums = tuple(
            total.at[at].add(part, mode="drop", wrap_negative_indices=False)
            for total, part in zip(sums, of_tokens, strict=True)
        )
        return sums, dot("tgrn,tgnd->tgrd", d_logits, keys).reshape(q.shape)

    parts = tiles.sequences(B), tiles.cut(q), _cut(tiles, lists), *map(tiles.cut, (lse, d_out, delta))
    start: tuple[Array, ...] = tuple(jnp.zeros(x.shape, jnp.float32) for x in (k, v))
    (d_k, d_v), d_q = lax.scan(tile, varying.like(start, saved), parts)
    return tiles.join(d_q, B, T).astype(q.dtype), d_k.astype(k.dtype), d_v.astype(v.dtype)


def _tiles(q: Array, k: Array, v: Array, lists: BlockLists, block_size: int) -> QueryTiles:
    """Tiles by what a query makes: logits, keys and values."""
    G, tokens = k.shape[2], lists.ids.shape[3] * block_size
    return QueryTiles.of(q.shape[1], tokens * (q.shape[2] + G * (k.shape[3] + v.shape[3])))


def _cut(tiles: QueryTiles, lists: BlockLists) -> BlockLists:
    return BlockLists(tiles.cut(lists.ids, -1), tiles.cut(lists.last))


def _groups(G: int) -> Array:
    return jnp.arange(G, dtype=jnp.int32)[None, :, None]


def _by_group(x: Array, G: int) -> Array:
    """[t, Hq, ...] -> [t, G, R, ...]: heads that share keys stand together."""
    return x.reshape(x.shape[0], G, -1, *x.shape[2:])


def _tokens(lists: BlockLists, G: int, block_size: int) -> tuple[Array, Array]:
    """[t, L, K], [t, 2] -> the tokens of the blocks, [t, G, K * block_size], and which of them count."""
    ids, (last, count) = lists.ids[..., None], (lists.last[:, i, None, None, None] for i in range(2))
    inside = jnp.arange(block_size, dtype=jnp.int32)[None, None, None]
    is_real = (ids >= 0) & (inside < jnp.where(ids == last, count, block_size))
    shape = ids.shape[0], G, ids.shape[2] * block_size
    flat = (x.reshape(x.shape[0], x.shape[1], -1) for x in (ids * block_size + inside, is_real))
    tokens, is_real = (jnp.broadcast_to(x, shape) for x in flat)
    return tokens, is_real


def _gather(x: Array, b: Array, tokens: Array, is_real: Array) -> Array:
    """[B, S, G, D], [], [t, G, n] -> [t, G, n, D], each group of its own tokens."""
    found = x[b, jnp.where(is_real, tokens, 0), _groups(x.shape[2])]
    # A token that no query selected may hold NaN, which a probability of 0 would not hide.
    return jnp.where(is_real[..., None], found, 0)


def _logits(q: Array, keys: Array, is_real: Array, scale: float) -> Array:
    return jnp.where(is_real[:, :, None], dot("tgrd,tgnd->tgrn", q, keys) * scale, -jnp.inf)
