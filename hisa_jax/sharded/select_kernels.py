"""One device's part of a selection over several by kernels: its candidates and their sort keys, exchanged and merged.

Each device merges an equal share of the queries (`exchange.py`).
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from hisa_jax.layout import Call
from hisa_jax.methods import BlockSparse, Dsa, Hisa, Method, Scan
from hisa_jax.pallas import tokens_of_blocks
from hisa_jax.selection import Selection
from hisa_jax.sharded import exchange
from hisa_jax.sharded.stripes import Shard
from hisa_jax.xla import select as xla
from hisa_jax.xla import stages, topk

# [B, T, j] int32 each: sort keys, `INVISIBLE` where there is none; ids or positions, then -1.
Found = tuple[Array, Array]


def select_shard(
    backend: Callable[[], Any],
    call: Call,
    method: Method,
    tiles: xla.Tiles,
    shard: Shard,
    *,
    return_scores: bool,
    return_blocks: bool,
    interpret: Any = False,
) -> Selection:
    """The selection of all queries of a batch, the same on all devices; inside `jax.shard_map`.

    Args:
        backend: imports one that has `select_shard`; interpret: handed to its kernels.
        call: a batch with the keys that this device has of each sequence; shard: which those are.
    """
    assert call.k is not None and call.lengths is not None
    local, S, visible, lengths = backend().select_shard, call.max_keys, call.visible, call.lengths
    axis, n_devices = shard.axis, shard.n_devices
    first_key = lax.axis_index(axis) * S
    k = min(method.topk, shard.max_keys)

    def merged(found: Found, first: Array, k: int) -> Found:
        """The k best of what all devices have found: positions from each device's `first` on, and sort keys."""
        sort_keys, ids = found
        ids = jnp.where(ids >= 0, ids + first, -1)
        B, T, j = ids.shape
        filled = (sort_keys, topk.INVISIBLE), (ids, -1)
        shares = (exchange.to_owner(x.reshape(-1, j), fill, axis, n_devices) for x, fill in filled)
        best = local.merge(*shares, k, interpret=interpret)
        ids, sort_keys = (exchange.from_owners(x, axis, B * T).reshape(B, T, k) for x in best)
        return sort_keys, ids

    n_tokens, own_visible = jnp.clip(lengths - first_key, 0, S), jnp.clip(visible - first_key, 0, S)
    own_call, blocks = dataclasses.replace(call, visible=own_visible, lengths=n_tokens), None
    if not xla.has_filter(method, shard.max_keys, has_budget=False):
        if not isinstance(method, Dsa):
            eligible = -(-visible // method.block_size)
            blocks = _first(eligible, method.block_topk)
        found = local.best_tokens(own_call, min(k, S), interpret)
    else:
        assert not isinstance(method, Scan)  # declined
        n_blocks, first_block = S // method.block_size, first_key // method.block_size
        eligible = -(-visible // method.block_size)
        own_eligible = jnp.clip(eligible - first_block, 0, n_blocks)
        m = min(method.block_topk, n_blocks)
        found = local.best_blocks(own_call, own_eligible, m, method.block_size, interpret)
        blocks = _kept_blocks(lambda found, k: merged(found, first_block, k), found, first_block, eligible, method)
        if isinstance(method, BlockSparse) and not return_scores:
            flat_blocks = blocks.reshape(-1, blocks.shape[-1])
            indices, count = tokens_of_blocks(flat_blocks, visible.reshape(-1), method)
            indices, count = indices.reshape(*visible.shape, -1), count.reshape(visible.shape)
            return Selection(indices=indices, count=count, blocks=blocks if return_blocks else None)
        # Those of this device first, ascending.
        is_own = (blocks >= first_block) & (blocks < first_block + n_blocks)
        own = jnp.sort(jnp.where(is_own, blocks - first_block, n_blocks), axis=-1)
        own = jnp.where(own < n_blocks, own, -1)[..., :m]
        most = min(k, m * method.block_size)
        found = local.best_in_blocks(own_call, own, most, method.block_size, interpret)
    sort_keys, positions = merged(found, first_key, k)
    is_real = positions >= 0
    missing = ((0, 0), (0, 0), (0, method.topk - k))
    scores = jnp.where(is_real, topk.score_of(sort_keys), -jnp.inf)
    return Selection(
        indices=jnp.pad(positions, missing, constant_values=-1),
        count=jnp.sum(is_real, axis=-1, dtype=jnp.int32),
        scores=jnp.pad(scores, missing, constant_values=-jnp.inf) if return_scores else None,
        blocks=blocks if return_blocks else None,
    )


def _kept_blocks(
    merged: Callable[[Found, int], Found], found: Found, first_block: Array, eligible: Array, method: Hisa | BlockSparse
) -> Array:
    """[B, T, block_topk] int32, ascending, then -1: the forced blocks, which all devices know, and the best others."""
    sort_keys, ids = found
    m, n_first, n_last = method.block_topk, method.keep_first, method.keep_last
    global_ids = ids + first_block
    is_forced = (global_ids < n_first) | (global_ids >= eligible[..., None] - n_last)
    parts = [
        jnp.broadcast_to(jnp.arange(n_first, dtype=jnp.int32), (*eligible.shape, n_first)),
        eligible[..., None] - n_last + jnp.arange(n_last, dtype=jnp.int32),
    ]
    if m > n_first + n_last:
        others = jnp.where(is_forced, topk.INVISIBLE, sort_keys), ids
        parts.insert(1, merged(others, m - n_first - n_last)[1])
    kept = jnp.concatenate(parts, axis=-1)
    return jnp.where(eligible[..., None] <= m, _first(eligible, m), kept)


def _first(counts: Array, k: int) -> Array:
    """[B, T] -> [B, T, k] int32: 0, 1, 2, ... below each count, then -1."""
    return stages.first_positions(counts.reshape(-1), k).reshape(*counts.shape, k)
