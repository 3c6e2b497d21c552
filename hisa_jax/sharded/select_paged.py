"""Selection from pages on several devices: the pages of each request split, its queries split, or both.

Page p of the cache lies on device p // (n_pages / devices). The blocks of a request go round the devices, stripe by
stripe, so that requests of any length are balanced.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import PartitionSpec

from hisa_jax import dispatch
from hisa_jax.candidates import CandidateBlocks
from hisa_jax.index_cache import IndexCache, holds_tokens
from hisa_jax.layout import Call
from hisa_jax.methods import Method
from hisa_jax.selection import Selection
from hisa_jax.sharded.cache import own_pages
from hisa_jax.sharded.meshes import Axes, on_devices
from hisa_jax.sharded.stripes import Shard, Stripes
from hisa_jax.xla.select import Tiles


def select_pages(
    name: str,
    axes: Axes,
    shard: Shard | None,
    call: Call,
    method: Method,
    tiles: Tiles,
    *,
    return_scores: bool,
    return_blocks: bool,
) -> Selection:
    """`Implementation.select` of requests in pages, on a mesh, by the named implementation.

    Args:
        shard: how `axes.context` splits pages; None: every device has all.
        call: all queries and pages; of a request that lacks a page queries see nothing.

    Returns: the selection, the same on all devices.
    """
    implementation = dispatch.IMPLEMENTATIONS[name]
    T, n_shares = call.q.shape[0], axes.size(axes.queries)

    def one_device(rows: _Rows, cache: IndexCache, table: Array, offsets: Array) -> Selection:
        t = rows.q.shape[0]
        if shard is not None:
            table = _own_table(cache, table, shard)
        if axes.queries is not None:
            offsets = jnp.clip(offsets - lax.axis_index(axes.queries) * t, 0, t)
        own = Call(**rows._asdict(), query_offsets=offsets, table=table, cache=cache)
        options = dict(return_scores=return_scores, return_blocks=return_blocks)
        if shard is None:
            selection = implementation.select(own, method, tiles, **options)
        else:
            assert implementation.select_shard is not None  # else it would have been declined
            selection = implementation.select_shard(own, method, tiles, shard, **options)
        if axes.queries is not None:
            selection = jax.tree.map(lambda x: lax.all_gather(x, axes.queries, axis=0, tiled=True), selection)
        return selection

    # Padding sees nothing.
    padded = _Rows(call.q, call.w, call.visible, call.candidates, call.budget)
    padded = jax.tree.map(lambda x: jnp.pad(x, ((0, -T % n_shares), *((0, 0),) * (x.ndim - 1))), padded)
    rows, split, whole = PartitionSpec(axes.queries), PartitionSpec(axes.context), PartitionSpec()
    run = on_devices(one_device, axes.mesh, (rows, split, whole, whole), whole)
    selection = run(padded, call.cache, call.table, call.query_offsets)
    return jax.tree.map(lambda x: x[:T], selection)


class _Rows(NamedTuple):
    """What a `Call` has a row a query of."""

    q: Array
    w: Array
    visible: Array
    candidates: CandidateBlocks | None
    budget: Array | None


def has_pages(axes: Axes, shard: Shard, cache: IndexCache, table: Array, lengths: Array) -> Array:
    """[R] bool, the same on all devices: whether none of them lacks a page of a request of `lengths` [R] keys."""

    def one_device(cache: IndexCache, table: Array, lengths: Array) -> Array:
        own, pages = _own_table(cache, table, shard), _own_pages(cache, shard)
        holds = holds_tokens(cache, own, pages.place(jnp.arange(own.shape[1], dtype=jnp.int32)), lengths)
        return ~(lax.psum(~holds, shard.axis) > 0) & (lengths <= table.shape[1] * cache.page_size)

    split, whole = PartitionSpec(axes.context), PartitionSpec()
    return on_devices(one_device, axes.mesh, (split, whole, whole), whole)(
        *jax.tree.map(lax.stop_gradient, (cache, table, lengths))
    )


def _own_pages(cache: IndexCache, shard: Shard) -> Stripes:
    return Stripes(shard.stripe // cache.page_size, shard.n_devices, lax.axis_index(shard.axis))


def _own_table(cache: IndexCache, table: Array, shard: Shard) -> Array:
    """This device's pages of each request, [R, P / n_devices]."""
    return own_pages(cache, _own_pages(cache, shard).columns(table), shard.axis)
