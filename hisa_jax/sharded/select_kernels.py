"""One device's part of a selection over several by kernels: its candidates and their sort keys, exchanged and merged.

Each device merges an equal share of the queries, or all of few (`exchange.py`). As in `select_xla.py`, keys in one
piece are stripes of which there is one a device, and all results have a row a query.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from hisa_jax import kernel_heads
from hisa_jax.layout import Call
from hisa_jax.methods import BlockSparse, Dsa, Hisa, Method, Scan
from hisa_jax.pallas import tokens_of_blocks
from hisa_jax.selection import Selection
from hisa_jax.sharded.communicator import Communicator
from hisa_jax.sharded.exchange import Rows
from hisa_jax.sharded.stripes import Shard, Stripes
from hisa_jax.xla import select as xla
from hisa_jax.xla import stages, topk

# [T, j] int32 each: sort keys, `INVISIBLE` where there is none; ids or positions, ascending, then -1.
Found = tuple[Array, Array]
Merge = Callable[[Array, Array, int], tuple[Array, Array]]


class Local(Protocol):
    """What kernels_pallas/README.md promises of `select_shard`.

    Attributes: `most_to_all`, bytes of candidates of all devices up to which a second exchange takes longer than to
        send all of them to all.
    """

    most_to_all: int

    def best_blocks(self, call: Call, eligible: Array, k: int, block_size: int, interpret: Any = False) -> Found: ...
    def best_in_blocks(self, call: Call, ids: Array, k: int, block_size: int, interpret: Any = False) -> Found: ...
    def best_tokens(self, call: Call, k: int, interpret: Any = False) -> Found: ...
    def best_scanned(
        self, call: Call, seen: Array, method: Scan, k: int, devices: Communicator, interpret: Any = False
    ) -> Found: ...
    def merge(self, sort_keys: Array, positions: Array, k: int, *, interpret: Any = False) -> tuple[Array, Array]: ...


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
    """The selection of all queries, the same on all devices; inside `jax.shard_map`.

    Args:
        backend: imports one that has `select_shard`; interpret: handed to its kernels.
        call: all queries, and of each sequence the keys, or the pages in its table, that this device has.
        shard: which those are.
    """
    is_flat = kernel_heads.is_flat(method, call.q.shape[-2])
    call, method = kernel_heads.as_kernels_take(call, method)
    search = _Search(call, shard, shard.stripes(), backend().select_shard, interpret)
    visible = call.queries.visible
    k, blocks = min(method.topk, shard.max_keys), None
    if is_flat or not xla.has_filter(method, shard.max_keys, has_budget=False):
        if not isinstance(method, Dsa):
            blocks = stages.first_positions(-(-visible // method.block_size), method.block_topk)
        found = search.best_tokens(k)
    elif isinstance(method, Scan):
        found = search.best_scanned(method, k)
    else:
        blocks = search.kept_blocks(method)
        if isinstance(method, BlockSparse) and not return_scores:
            indices, count = tokens_of_blocks(blocks, visible, method)
            return call.unflatten(Selection(indices=indices, count=count, blocks=blocks if return_blocks else None))
        found = search.best_in_blocks(blocks, k, method.block_size)
    sort_keys, positions = found
    is_real, missing = positions >= 0, ((0, 0), (0, method.topk - k))
    scores = jnp.where(is_real, topk.score_of(sort_keys), -jnp.inf)
    return call.unflatten(
        Selection(
            indices=jnp.pad(positions, missing, constant_values=-1),
            count=jnp.sum(is_real, axis=1, dtype=jnp.int32),
            scores=jnp.pad(scores, missing, constant_values=-jnp.inf) if return_scores else None,
            blocks=blocks if return_blocks else None,
        )
    )


@dataclasses.dataclass(frozen=True)
class _Search:
    """What one device looks for among its keys, and what all have found.

    Attributes: `tokens`, which tokens of each sequence are this device's; `local`, a backend's stages.
    """

    call: Call
    shard: Shard
    tokens: Stripes
    local: Local
    interpret: Any

    @property
    def own_call(self) -> Call:
        """The same queries, which see only tokens of this device."""
        call = self.call
        lengths = None if call.lengths is None else self.tokens.before(call.lengths)
        return dataclasses.replace(call, visible=self.tokens.before(call.visible), lengths=lengths)

    def best_tokens(self, k: int) -> Found:
        """The k best of all visible tokens."""
        found = self.local.best_tokens(self.own_call, min(k, self.call.max_keys), self.interpret)
        return self._merged(_of(self.own_call.queries.visible, found), self.tokens, k)

    def best_scanned(self, method: Scan, k: int) -> Found:
        """The k best of those tokens that a scan has scored exactly."""
        devices = Communicator(self.shard.axis, self.tokens, self.local.most_to_all)
        seen = self.call.queries.visible
        found = self.local.best_scanned(self.own_call, seen, method, k, devices, self.interpret)
        return self._merged(_of(self.own_call.queries.visible, found), self.tokens, k)

    def kept_blocks(self, method: Hisa | BlockSparse) -> Array:
        """[T, block_topk] int32, ascending, then -1: the forced blocks, which all devices know, and the best others."""
        m, n_first, n_last = method.block_topk, method.keep_first, method.keep_last
        eligible, stripes = -(-self.call.queries.visible // method.block_size), self._blocks(method.block_size)
        keeps_all = eligible <= m
        # A query that keeps all its blocks needs no scores of them.
        own_eligible, own_m = jnp.where(keeps_all, 0, stripes.before(eligible)), min(m, self._n_blocks(method))
        best = self.local.best_blocks(self.own_call, own_eligible, own_m, method.block_size, self.interpret)
        sort_keys, ids = _of(own_eligible, best)
        places, eligible = stripes.place(ids), eligible[:, None]
        is_forced = (places < n_first) | (places >= eligible - n_last)
        parts = [
            jnp.broadcast_to(jnp.arange(n_first, dtype=jnp.int32), (ids.shape[0], n_first)),
            eligible - n_last + jnp.arange(n_last, dtype=jnp.int32),
        ]
        if m > n_first + n_last:
            others = jnp.where(is_forced, topk.INVISIBLE, sort_keys), ids
            parts.insert(1, self._merged(others, stripes, m - n_first - n_last)[1])
        first = stages.first_positions(eligible[:, 0], m)
        return jnp.where(keeps_all[:, None], first, jnp.concatenate(parts, axis=1))

    def best_in_blocks(self, blocks: Array, k: int, block_size: int) -> Found:
        """The k best visible tokens of some blocks of the sequence, [T, m] ids."""
        stripes, n_blocks = self._blocks(block_size), self.call.max_keys // block_size
        # Those of this device first, ascending.
        is_own = (blocks >= 0) & stripes.owns(blocks)
        own = jnp.sort(jnp.where(is_own, stripes.own(blocks), n_blocks), axis=1)[:, :n_blocks]
        own = jnp.where(own < n_blocks, own, -1)
        most = min(k, own.shape[1] * block_size)
        found = self.local.best_in_blocks(self.own_call, own, most, block_size, self.interpret)
        return self._merged(_of(jnp.sum(own >= 0, axis=1), found), self.tokens, k)

    def _blocks(self, block_size: int) -> Stripes:
        return self.tokens._replace(size=self.tokens.size // block_size)

    def _n_blocks(self, method: Hisa | BlockSparse) -> int:
        """Of a sequence on this device, at most."""
        return self.call.max_keys // method.block_size

    def _merged(self, found: Found, stripes: Stripes, k: int) -> Found:
        """The k best of what all devices have found, at positions in the sequence, in units of `stripes`."""
        sort_keys, places, (axis, n) = found[0], stripes.place(found[1]), (self.shard.axis, self.shard.n_devices)
        rows = Rows.of(places.shape[0], axis, n, sort_keys.nbytes + places.nbytes, self.local.most_to_all)
        sort_keys, places = rows.gather(sort_keys, topk.INVISIBLE), rows.gather(places, -1)
        one_stripe_each = self.shard.stripe * n >= self.shard.max_keys

        def merge(sort_keys: Array, positions: Array, k: int) -> Found:
            positions, sort_keys = self.local.merge(sort_keys, positions, k, interpret=self.interpret)
            return jnp.where(positions >= 0, sort_keys, topk.INVISIBLE), positions

        best = merge(sort_keys, places, k) if one_stripe_each else merge_of_any_order(merge, sort_keys, places, k)
        return rows.spread(best[0]), rows.spread(best[1])


def merge_of_any_order(merge: Merge, sort_keys: Array, positions: Array, k: int) -> Found:
    """The k best of each row, [T, W] int32 each, whose positions do not ascend, since devices take turns.

    Args:
        merge: as `Local.merge`; the first columns win its ties, where the lowest positions have to.

    Sorting what was chosen puts it in order. All candidates are sorted only where a row's cut goes through a tie.
    """
    best, chosen = merge(sort_keys, positions, k)
    cut = jnp.min(best, axis=1, keepdims=True)
    n_tied, n_chosen = (jnp.sum(x == cut, axis=1) for x in (sort_keys, best))
    is_tied = jnp.any((cut[:, 0] > topk.INVISIBLE) & (n_tied > n_chosen))
    return lax.cond(is_tied, lambda: merge(*_by_position(sort_keys, positions), k), lambda: _by_position(best, chosen))


def _by_position(sort_keys: Array, positions: Array) -> Found:
    """Rows in the order of their positions; -1 stays last."""
    last = np.iinfo(np.int32).max
    positions = jnp.where(positions >= 0, positions, last)
    positions, sort_keys = lax.sort((positions, sort_keys), dimension=1, num_keys=1)
    return sort_keys, jnp.where(positions < last, positions, -1)


def _of(n: Array, found: Found) -> Found:
    """What was found for queries that have a candidate, n [T] of them; for the others kernels may find anything."""
    sort_keys, ids = found
    is_real = (n > 0)[:, None] & (ids >= 0)
    return jnp.where(is_real, sort_keys, topk.INVISIBLE), jnp.where(is_real, ids, -1)
