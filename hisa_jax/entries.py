"""Entries of several tokens and heads that choose by themselves, for every form of a call.

An implementation knows one thing: queries of some heads that choose among keys. So entries are its keys, and where each
head chooses by itself, heads are its queries. What it finds is handed out as tokens, or with heads as an axis.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from hisa_jax.candidates import CandidateBlocks
from hisa_jax.layout import Call
from hisa_jax.methods import Method
from hisa_jax.selection import Selection, nothing


def most_tokens[N: (int, Array)](n_keys: N, method: Method) -> N:
    """Most tokens of a sequence that has so many whole entries."""
    return n_keys * method.entry_size + method.entry_size - 1


def as_keys(call: Call, seen: Array, method: Method) -> Call:
    """A call as implementations read it: `visible` counts entries, given the tokens that each query sees; lists are in
    order; queries are heads that choose together.
    """
    listed = call.candidates
    call = dataclasses.replace(
        call,
        visible=seen // method.entry_size,
        candidates=None if listed is None else listed.in_order(call.max_keys),
    )
    return _each_head(call) if method.per_head else call


def choose(
    run: Callable[..., Selection],
    call: Call,
    method: Method,
    *args: Any,
    return_scores: bool,
    return_blocks: bool,
) -> Selection:
    """The selection of a call by `run`, an implementation's `select`.

    Args:
        call: with entries for keys, but its `visible` counts tokens.
    """
    shape, H, seen = call.shape, call.q.shape[-2], call.visible
    options: Any = dict(return_scores=return_scores, return_blocks=return_blocks)
    inner = as_keys(call, seen, method)
    is_empty = 0 in (*inner.shape, call.n_sequences, call.max_keys)
    if is_empty or (call.table is not None and call.table.shape[0] == 0):
        found = nothing(inner.shape, method, **options)
    else:
        found = run(inner, method, *args, **options)
    return handed_out(found, seen, shape, H, method)


def handed_out(found: Selection, seen: Array, shape: tuple[int, ...], H: int, method: Method) -> Selection:
    """What an implementation found, a row a query, as the caller wants it: by tokens, with heads as an axis."""
    if method.per_head:
        found = jax.tree.map(lambda x: x.reshape(*shape, H, *x.shape[len(shape) :]), found)
        seen = jnp.broadcast_to(seen[..., None], (*shape, H))
    if method.entry_size == 1 or method.returns == "entries":
        return found
    r, K = method.entry_size, found.indices.shape[-1]
    rows = found.indices.reshape(-1, K)
    members = rows[:, :, None] * r + jnp.arange(r, dtype=jnp.int32)[None, None, :]
    indices = jnp.where(rows[:, :, None] >= 0, members, -1).reshape(rows.shape[0], K * r)
    count, scores = found.count.reshape(-1) * r, found.scores
    if scores is not None:
        scores = jnp.repeat(scores.reshape(-1, K), r, axis=1)
    if method.tail:
        n, end = count, seen.reshape(-1)
        count = n + end % r
        missing = ((0, 0), (0, r - 1))
        slots = jnp.arange(K * r + r - 1, dtype=jnp.int32)[None, :]
        is_tail = (slots >= n[:, None]) & (slots < count[:, None])
        # Later than every entry, so that all stay in order.
        of_tail = (end - count)[:, None] + slots
        indices = jnp.where(is_tail, of_tail, jnp.pad(indices, missing, constant_values=-1))
        if scores is not None:
            scores = jnp.where(is_tail, jnp.inf, jnp.pad(scores, missing, constant_values=-jnp.inf))
    rest = found.count.shape
    return dataclasses.replace(
        found,
        indices=indices.reshape(*rest, indices.shape[-1]),
        count=count.reshape(rest),
        scores=None if scores is None else scores.reshape(*rest, scores.shape[-1]),
    )


def _each_head(call: Call) -> Call:
    """Heads as queries, one after the other: [.., T, H, D] -> [.., T * H, 1, D], each with a weight of 1."""
    *rows, T, H, D = call.q.shape

    def repeated(x: Array) -> Array:
        return jnp.repeat(x, H, axis=len(rows))

    candidates, offsets = call.candidates, call.query_offsets
    if candidates is not None:
        ids = candidates.ids
        ids = repeated(ids) if ids.ndim == len(rows) + 2 else ids.reshape(*rows, T * H, -1)
        candidates = CandidateBlocks(ids, candidates.block_size)
    return dataclasses.replace(
        call,
        q=call.q.reshape(*rows, T * H, 1, D),
        w=jnp.ones((*rows, T * H, 1), np.float32),
        visible=repeated(call.visible),
        query_offsets=None if offsets is None else offsets * H,
        candidates=candidates,
        budget=None if call.budget is None else repeated(call.budget),
    )
