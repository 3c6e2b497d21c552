"""Selection from pages on several devices: the pages of each request split, its queries split, or both.

Page p of the cache lies on device p // (n_pages / devices). The blocks of a request go round the devices, stripe by
stripe, so that requests of any length are balanced. Groups of such devices, each with requests and pages of its own,
do this at the same time, and nothing passes between them.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import PartitionSpec

from hisa_jax import dispatch
from hisa_jax.candidates import CandidateBlocks
from hisa_jax.index_cache import IndexCache, has_all_pages, holds_tokens
from hisa_jax.layout import Call, ascending, last_visible
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

    Returns: the selection, the same on all devices of a group.
    """
    implementation = dispatch.IMPLEMENTATIONS[name]
    n_groups, n_shares = axes.size(axes.data), axes.size(axes.queries)
    own_T = call.q.shape[0] // n_groups  # queries of a group

    def one_device(rows: _Rows, cache: IndexCache, table: Array, offsets: Array) -> Selection:
        t, offsets = rows.q.shape[0], ascending(offsets, own_T)
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
            selection = jax.tree.map(lambda x: lax.all_gather(x, axes.queries, axis=0, tiled=True)[:own_T], selection)
        return selection

    def padded(x: Array) -> Array:
        """Each group's queries to a multiple of the devices that share them; padding sees nothing."""
        groups = x.reshape(n_groups, own_T, *x.shape[1:])
        groups = jnp.pad(groups, ((0, 0), (0, -own_T % n_shares), *((0, 0),) * (x.ndim - 1)))
        return groups.reshape(-1, *x.shape[1:])

    of_queries = _Rows(call.q, call.w, call.visible, call.candidates, call.budget)
    rows = PartitionSpec(tuple(axis for axis in (axes.data, axes.queries) if axis is not None) or None)
    specs = rows, axes.pages, axes.requests, axes.requests
    run = on_devices(one_device, axes.mesh, specs, axes.requests)
    return run(jax.tree.map(padded, of_queries), call.cache, call.table, call.query_offsets)


class _Rows(NamedTuple):
    """What a `Call` has a row a query of."""

    q: Array
    w: Array
    visible: Array
    candidates: CandidateBlocks | None
    budget: Array | None


def seen_tokens(
    axes: Axes, shard: Shard | None, cache: IndexCache, table: Array, offsets: Array, lengths: Array, T: int
) -> tuple[Array, Array]:
    """Which requests have all their pages, and the tokens that each query sees, none of a request that has not.

    `offsets` and `lengths` count tokens, as `select_paged` has them. Returns [R] bool and [T] int32, the same on all
    devices of a group.
    """
    own_T = T // axes.size(axes.data)

    def one_device(cache: IndexCache, table: Array, offsets: Array, lengths: Array) -> tuple[Array, Array]:
        n_keys = lengths // cache.entry_size
        if shard is None:
            has_pages = has_all_pages(cache, table, n_keys)
        else:
            own, pages = _own_table(cache, table, shard), _own_pages(cache, shard)
            holds = holds_tokens(cache, own, pages.place(jnp.arange(own.shape[1], dtype=jnp.int32)), n_keys)
            has_pages = ~(lax.psum(~holds, shard.axis) > 0) & (n_keys <= table.shape[1] * cache.page_size)
        return has_pages, last_visible(ascending(offsets, own_T), jnp.where(has_pages, lengths, 0), own_T)

    specs = axes.pages, axes.requests, axes.requests, axes.requests
    run = on_devices(one_device, axes.mesh, specs, axes.requests)
    return run(*jax.tree.map(lax.stop_gradient, (cache, table, offsets, lengths)))


def _own_pages(cache: IndexCache, shard: Shard) -> Stripes:
    return Stripes(shard.stripe // cache.page_size, shard.n_devices, lax.axis_index(shard.axis))


def _own_table(cache: IndexCache, table: Array, shard: Shard) -> Array:
    """This device's pages of each request, [R, P / n_devices]."""
    return own_pages(cache, _own_pages(cache, shard).columns(table), shard.axis)
