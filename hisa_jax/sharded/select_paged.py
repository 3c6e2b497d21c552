"""Selection from pages on several devices: the pages of each request split, its queries split, or both.

Page p of the cache lies on device p // (n_pages / devices). The blocks of a request go round the devices, stripe by
stripe, so that requests of any length are balanced. Groups of such devices, each with requests and pages of its own,
do this at the same time, and nothing passes between them.
"""

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import PartitionSpec

from hisa_jax import dispatch
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
    operands: tuple[Array, Array, IndexCache, Array, Array, Array],
    method: Method,
    tiles: Tiles,
    *,
    return_scores: bool,
    return_blocks: bool,
) -> tuple[Selection, Array]:
    """`Implementation.select` of requests in pages, on a mesh, by the named implementation.

    Args:
        shard: how `axes.context` splits pages; None: every device has all.
        operands: q, w, cache, block_tables, cu_seqlens_q and lengths, as `select_paged` has them.

    Returns: the selection, the same on all devices of a group; [R] bool, whether no device lacks a page of a request.
    """
    implementation = dispatch.IMPLEMENTATIONS[name]
    q, w, *rest = operands
    T, n_groups, n_shares = q.shape[0], axes.size(axes.data), axes.size(axes.queries)
    own_T = T // n_groups  # queries of a group

    def one_device(
        q: Array, w: Array, cache: IndexCache, table: Array, offsets: Array, lengths: Array
    ) -> tuple[Selection, Array]:
        if shard is None:
            has_pages = has_all_pages(cache, table, lengths)
        else:
            table, has_pages = _own_table(cache, table, lengths, shard)
        lengths, offsets = jnp.where(has_pages, lengths, 0), ascending(offsets, own_T)
        if axes.queries is not None:
            offsets, lengths = _own_queries(offsets, lengths, q.shape[0], axes.queries)
        visible = last_visible(offsets, lengths, q.shape[0])
        call = Call(q=q, w=w, visible=visible, query_offsets=offsets, table=table, cache=cache)
        options = dict(return_scores=return_scores, return_blocks=return_blocks)
        if shard is None:
            selection = implementation.select(call, method, tiles, **options)
        else:
            assert implementation.select_shard is not None  # else it would have been declined
            selection = implementation.select_shard(call, method, tiles, shard, **options)
        if axes.queries is not None:
            selection = jax.tree.map(lambda x: lax.all_gather(x, axes.queries, axis=0, tiled=True)[:own_T], selection)
        return selection, has_pages

    def padded(x: Array) -> Array:
        """Each group's queries to a multiple of the devices that share them."""
        groups = jnp.asarray(x).reshape(n_groups, own_T, *x.shape[1:])
        groups = jnp.pad(groups, ((0, 0), (0, -own_T % n_shares), *((0, 0),) * (x.ndim - 1)))
        return groups.reshape(-1, *x.shape[1:])

    rows = PartitionSpec(tuple(axis for axis in (axes.data, axes.queries) if axis is not None) or None)
    of_requests = axes.requests
    specs = rows, rows, axes.pages, of_requests, of_requests, of_requests
    run = on_devices(one_device, axes.mesh, specs, of_requests)
    return run(*jax.tree.map(lax.stop_gradient, (padded(q), padded(w), *rest)))


def _own_table(cache: IndexCache, table: Array, lengths: Array, shard: Shard) -> tuple[Array, Array]:
    """This device's pages of each request, [R, P / n_devices], and [R] bool, whether no device lacks one."""
    pages = Stripes(shard.stripe // cache.page_size, shard.n_devices, lax.axis_index(shard.axis))
    own = own_pages(cache, pages.columns(table), shard.axis)
    holds = holds_tokens(cache, own, pages.place(jnp.arange(own.shape[1], dtype=jnp.int32)), lengths)
    is_lacking = lax.psum(~holds, shard.axis) > 0
    return own, ~is_lacking & (lengths <= table.shape[1] * cache.page_size)


def _own_queries(offsets: Array, lengths: Array, t: int, axis: str) -> tuple[Array, Array]:
    """Offsets in this device's t rows, [R + 1], and [R] lengths of which its queries are the last tokens."""
    first = lax.axis_index(axis) * t
    later = jnp.diff(jnp.maximum(offsets, first + t))  # queries of each request on later devices
    return jnp.clip(offsets - first, 0, t), lengths - later
