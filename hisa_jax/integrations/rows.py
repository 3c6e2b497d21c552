"""Choosing in rows that a mask divides: several sequences one after the other, or tokens with gaps between them.

    row            a a a a b b b . .     two sequences and padding; a query of b sees the b's up to its own
    select, 1st    a a a a               a sequence at a time, from its own start: there its blocks begin
    select, 2nd            b b b

Which tokens are of one sequence follows from the mask alone: what its queries see begins with the same token.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

import hisa_jax as hj
from hisa_jax import checks
from hisa_jax.sharded import varying


class Seen(NamedTuple):
    """What queries see of the tokens that a row has, counted from its first one.

    Attributes: `first` [b, t] int32, the first token of the query's sequence; `visible` [b, t] int32, how many there
        are of it and those after it; `order` [b, t] int32, which of the row's sequences that is.
    """

    first: Array
    visible: Array
    order: Array


def seen_of(is_seen: Array, columns: Array | None) -> Seen:
    """[b, t, s] bool -> what each query sees.

    Args:
        is_seen: which columns it sees.
        columns: [b, s] int32, the columns that hold tokens, in order, then the others; None: all do.
    """
    S = is_seen.shape[2]
    token = jnp.broadcast_to(jnp.arange(S, dtype=jnp.int32), (is_seen.shape[0], S))
    if columns is not None:
        token = jnp.argsort(columns, axis=1).astype(jnp.int32)  # the inverse: the number of each column's token
    token = token[:, None, :]
    visible = jnp.sum(is_seen, axis=2, dtype=jnp.int32)
    first = jnp.min(jnp.where(is_seen, token, S), axis=2)
    last = jnp.max(jnp.where(is_seen, token, -1), axis=2)
    checks.value(
        (last - first + 1 == visible) | (visible == 0),
        "integrations.rows: is_seen has a query with unseen tokens between those that it sees, wanted none from the "
        "first of its sequence on",
    )
    order = jnp.cumsum(first[:, 1:] != first[:, :-1], axis=1, dtype=jnp.int32)
    return Seen(first, visible, jnp.pad(order, ((0, 0), (1, 0))))


def select(
    q: Array, k: Array, w: Array, seen: Seen, columns: Array | None, *, method: hj.Method, implementation: str
) -> Array:
    """[b, t, h, d], [b, s, d], [b, t, h] -> [b, t, topk] int32, the columns that each query chooses, then -1.

    The i-th sequence of every row at a time: as often as the row with the most has sequences. `seen` and `columns` are
    those of `seen_of`, the others as for `hj.select`.
    """
    (B, T, _, _), S = q.shape, k.shape[1]
    if columns is not None:
        k = jnp.take_along_axis(k, columns[..., None], axis=1)
    last = jnp.max(jnp.where(seen.visible > 0, seen.order, -1))

    def one(carry: tuple[Array, Array]) -> tuple[Array, Array]:
        i, found = carry
        is_own = (seen.order == i) & (seen.visible > 0)
        start = jnp.min(jnp.where(is_own, seen.first, S), axis=1) % S
        visible = jnp.where(is_own, seen.visible, 0)
        keys = jax.vmap(lambda k, start: jnp.roll(k, -start, axis=0))(k, start)
        indices = hj.select(
            q, keys, w, method, query_positions=visible - 1, lengths=jnp.max(visible, axis=1),
            implementation=implementation,
        ).indices  # fmt: skip
        chosen = jnp.where(indices < 0, -1, indices + start[:, None, None])
        return i + 1, jnp.where(is_own[..., None], chosen, found)

    nothing = jnp.full((B, T, method.topk), -1, jnp.int32)
    start = varying.like((jnp.zeros((), jnp.int32), nothing), q)
    _, found = lax.while_loop(lambda carry: carry[0] <= last, one, start)
    if columns is None:
        return found
    at = jax.vmap(lambda columns, found: columns[jnp.maximum(found, 0)])(columns, found)
    return jnp.where(found < 0, -1, at.astype(jnp.int32))


def scores(q: Array, k: Array, w: Array, chunk: int, precision: Any) -> Array:
    """The indexer's scores [b, t, s] float32, with gradients; the products of `chunk` heads at a time are in memory."""
    einsum = functools.partial(jnp.einsum, precision=precision, preferred_element_type=jnp.float32)

    @jax.checkpoint
    def add(total: Array, heads: tuple[Array, Array]) -> tuple[Array, None]:
        q, w = heads
        return total + einsum("btsh,bth->bts", jax.nn.relu(einsum("bthd,bsd->btsh", q, k)), w), None

    (B, T, H, D), S = q.shape, k.shape[1]
    heads = jnp.moveaxis(q.reshape(B, T, H // chunk, chunk, D), 2, 0), jnp.moveaxis(w.reshape(B, T, -1, chunk), 2, 0)
    return lax.scan(add, jnp.zeros((B, T, S), jnp.float32), heads)[0]
