"""Sparse attention where latents, or their pages, are split over a mesh axis, the queries on all devices.

Each device attends to the selected tokens that it has. What they exchange is a sum of value_dim floats a query and
head, weighted by the devices' logsumexps, never latents. Other axes may split heads, and requests with their pages.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import PartitionSpec

from hisa_jax.layout import IndexCache
from hisa_jax.sharded import meshes
from hisa_jax.sharded.cache import own_pages
from hisa_jax.sharded.meshes import Axes

Attend = Callable[..., tuple[Array, Array]]


def attend_batch(attend: Attend, axes: Axes, q: Array, kv: Array, indices: Array) -> tuple[Array, Array]:
    """`attend` on a mesh: q and indices on all devices of the context axis, kv split. Differentiable."""
    context = axes.context
    assert context is not None

    def one_device(q: Array, kv: Array, indices: Array) -> tuple[Array, Array]:
        S = kv.shape[1]
        first = lax.axis_index(context) * S
        own = jnp.where((indices >= first) & (indices < first + S), indices - first, -1)
        return merge(*attend(q, kv, own), context)

    rows, split = PartitionSpec(axes.data), PartitionSpec(axes.data, context)
    mesh = meshes.automatic(axes.mesh)
    run = jax.shard_map(one_device, mesh=mesh, in_specs=(rows, split, rows), out_specs=rows, check_vma=False)
    return jax.jit(run)(q, kv, indices)


def attend_pages(
    attend: Attend, axes: Axes, q: Array, cache: IndexCache, table: Array, *arrays: Array
) -> tuple[Array, Array]:
    """`attend` of (q, cache, table, *arrays) where each device has pages of the cache, and a table of those alone."""

    def one_device(q: Array, cache: IndexCache, table: Array, *arrays: Array) -> tuple[Array, Array]:
        found = attend(q, cache, own_pages(cache, table, axes.context), *arrays)
        return found if axes.context is None else merge(*found, axes.context)

    rows = PartitionSpec(axes.data, axes.heads)
    specs = (rows, axes.pages, axes.requests, *(axes.requests for _ in arrays))
    return meshes.on_devices(one_device, axes.mesh, specs, rows)(q, cache, table, *arrays)


def merge(out: Array, lse: Array, axis: str) -> tuple[Array, Array]:
    """Attention to all tokens from that to each device's own, [B, T, N, V] and [B, T, N] float32; inside shard_map."""
    # What is subtracted from every logsumexp changes no result, so no gradient goes through it.
    highest = lax.pmax(lax.stop_gradient(lse), axis)
    # Where no device has a token every logsumexp is -inf: 0 stands for it, so that the weights are 0 and not NaN.
    weight = jnp.exp(lse - jnp.where(jnp.isneginf(highest), 0, highest))
    # One reduction: the weights are appended to the values.
    parts = jnp.concatenate([out.astype(jnp.float32) * weight[..., None], weight[..., None]], axis=-1)
    total = lax.psum(parts, axis)
    values, weights = total[..., :-1], total[..., -1]
    merged = values / jnp.where(weights > 0, weights, 1)[..., None]
    return merged.astype(out.dtype), highest + jnp.log(weights)
