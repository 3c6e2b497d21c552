"""Many queries of keys that are split over devices: each device gets all keys, and a share of the queries.

    few queries    each device scores its own keys for all queries; candidates are exchanged, and merged
    many           each device gets all keys, and takes a share of the queries; results are gathered

A key is some hundred bytes, whatever the number of queries. What is exchanged of each query is a list of `topk` tokens,
or a value for each head. So of many queries keys are fewer bytes, and nothing is merged.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import PartitionSpec

from hisa_jax import dispatch
from hisa_jax.index_cache import IndexCache
from hisa_jax.layout import Call
from hisa_jax.methods import BlockSparse, Hisa, Method
from hisa_jax.selection import Selection
from hisa_jax.sharded import meshes
from hisa_jax.sharded.cache import own_pages
from hisa_jax.sharded.meshes import Axes
from hisa_jax.sharded.stripes import Shard, Stripes
from hisa_jax.xla.select import Tiles

# Candidates that are exchanged have to be merged, too, which takes about as long: 0.29 and 0.31 ms for 4096 queries of
# HISA over 1M tokens on two H200.
_MERGED = 2
_CANDIDATE_BYTES = 12  # a score and an id to the device that merges them, an id back


def of_keys(n_bytes: int, q: Array, method: Method) -> bool:
    """Whether to gather keys of so many bytes, to select for queries [..., H, D]."""
    n_lists = math.prod(q.shape[:-2]) * (q.shape[-2] if method.per_head else 1)
    n_listed = method.topk + (method.block_topk if isinstance(method, Hisa | BlockSparse) else 0)
    return 0 < n_bytes <= _MERGED * _CANDIDATE_BYTES * n_lists * n_listed


def of_latents(n_bytes: int, out_bytes: int) -> bool:
    """Whether to gather latents of so many bytes to attend to them, of outputs of so many bytes.

    Gathered, results of shares of the queries go to all devices. Else each device's part of every result goes to the
    device that adds the parts up, and the sums go to all.
    """
    return 0 < n_bytes <= out_bytes


def nbytes(tree: object) -> int:
    """Of all arrays in a tree, traced ones and descriptions of arrays too."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def whole(x: Array, axis: str, dim: int) -> Array:
    """An array that devices have equal parts of, on all of them; inside `jax.shard_map`."""
    if x.dtype.itemsize > 1:
        return lax.all_gather(x, axis, axis=dim, tiled=True)
    gathered = lax.all_gather(lax.bitcast_convert_type(x, jnp.uint8), axis, axis=dim, tiled=True)
    return lax.bitcast_convert_type(gathered, x.dtype)


def select_batch(
    name: str, axes: Axes, call: Call, method: Method, tiles: Tiles, *, return_scores: bool, return_blocks: bool
) -> Selection:
    """`sharded.select.select_batch` of many queries."""
    assert axes.context is not None
    context, select, (B, T) = axes.context, dispatch.IMPLEMENTATIONS[name].select, call.shape
    if call.budget is not None:
        call = dataclasses.replace(call, budget=jnp.broadcast_to(call.budget, (B, T)))

    def one_device(call: Call) -> Selection:
        call = dataclasses.replace(call, k=jax.tree.map(lambda x: whole(x, context, 1), call.k))
        found = select(call, method, tiles, return_scores=return_scores, return_blocks=return_blocks)
        return jax.tree.map(lambda x: whole(x, context, 1)[:, :T], found)

    of_queries: Any = dict(
        q=call.q, w=call.w, visible=call.visible, candidates=call.candidates, budget=call.budget
    )  # fmt: skip
    of_queries = {name: shares(x, axes.n_devices) for name, x in of_queries.items()}
    rows, split = PartitionSpec(axes.data), PartitionSpec(axes.data, context)
    specs = Call(k=split, lengths=rows, **jax.tree.map(lambda _: split, of_queries))  # type: ignore[arg-type]
    run = meshes.on_devices(one_device, axes.mesh, (specs,), rows)
    return run(dataclasses.replace(call, **of_queries))


def shares[Tree](tree: Tree, n_devices: int) -> Tree:
    """Arrays [B, T, ...] with zeros after T, which are queries that see nothing: to equal shares."""
    return jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, -x.shape[1] % n_devices), *((0, 0),) * (x.ndim - 2))), tree)


def pages_of_all(cache: IndexCache, table: Array, axes: Axes, shard: Shard) -> tuple[IndexCache, Array]:
    """All pages of the requests on every device of their group, and a table of these copies.

    Args:
        table: [R, P] int32, of requests whose pages `axes.context` splits by the stripes of `shard`.

    Returns: the pages of the first device of a group, request after request, then the next one's; [R, P] int32, -1
        where a request has no page on the device whose turn it is.
    """

    def one_device(cache: IndexCache, table: Array) -> tuple[IndexCache, Array]:
        stripes = Stripes(shard.stripe // cache.page_size, shard.n_devices, lax.axis_index(shard.axis))
        own = own_pages(cache, stripes.columns(table), shard.axis)
        (R, n_own), rows = own.shape, own.reshape(-1)
        copies = jax.tree.map(lambda x: whole(x[jnp.maximum(rows, 0)], shard.axis, 0), cache)
        request, place = (jnp.arange(n, dtype=jnp.int32) for n in table.shape)
        request, place = request[:, None], place[None, :]
        at = (place // stripes.size % shard.n_devices * R + request) * n_own + stripes.own(place)
        return copies, jnp.where(whole(rows, shard.axis, 0)[at] >= 0, at, -1)

    specs = axes.pages, axes.requests
    return meshes.on_devices(one_device, axes.mesh, specs, axes.requests)(cache, table)
