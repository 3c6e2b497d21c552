"""Sparse attention where latents, or their pages, are split over a mesh axis, the queries on all devices.

Each device attends to the selected tokens that it has. What they exchange is a sum of value_dim numbers a query and
head, weighted by the devices' logsumexps. Other axes may split heads, and requests with their pages. Of many queries of
latents in one piece each device gets all of these, and attends for its share of the queries: `gathered.py`.

A device looks at the entries of a list that are its own, brought together: as many of them as an equal share and a
quarter more, and as many again where a list has more, until all are seen. So it reads latents and multiplies in
proportion to what it has, and no distribution of the selected tokens is wrong.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import PartitionSpec

from hisa_jax.latents import QuantizedLatents
from hisa_jax.layout import IndexCache
from hisa_jax.sharded import gathered, meshes
from hisa_jax.sharded.cache import own_pages
from hisa_jax.sharded.meshes import Axes

Attend = Callable[..., tuple[Array, Array]]

_TILE = 128  # entries: whole tiles of every kernel
_MANY_BYTES = 32 * 2**20  # of a device's values in float32: from there on bytes count, not how often they are sent


def attend_batch(
    attend: Attend, axes: Axes, is_gathered: bool, q: Array, kv: Array | QuantizedLatents, indices: Array
) -> tuple[Array, Array]:
    """`attend` on a mesh: q and indices on all devices of the context axis, kv split. Differentiable.

    Args:
        is_gathered: each device gets all of kv, and takes a share of the queries.
    """
    context, T = axes.context, q.shape[1]
    assert context is not None
    rows, split = PartitionSpec(axes.data), PartitionSpec(axes.data, context)
    mesh = meshes.automatic(axes.mesh)
    over_mesh = functools.partial(jax.shard_map, mesh=mesh, out_specs=rows, check_vma=False)

    def of_a_share(q: Array, kv: Array | QuantizedLatents, indices: Array) -> tuple[Array, Array]:
        found = attend(q, jax.tree.map(lambda x: gathered.whole(x, context, 1), kv), indices)
        out, lse = (gathered.whole(x, context, 1)[:, :T] for x in found)
        return out, lse

    if is_gathered:
        q, indices = gathered.shares((q, indices), axes.n_devices)
        return jax.jit(over_mesh(of_a_share, in_specs=(split,) * 3))(q, kv, indices)

    def one_device(q: Array, kv: Array | QuantizedLatents, indices: Array) -> tuple[Array, Array]:
        S = kv.shape[1]
        first = lax.axis_index(context) * S
        own = jnp.where((indices >= first) & (indices < first + S), indices - first, -1)
        return merge(*attend(q, kv, own), context)

    return jax.jit(over_mesh(one_device, in_specs=(rows, split, rows)))(q, kv, indices)


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


def part_of(K: int, n_devices: int) -> int | None:
    """Of lists of K the entries that one of so many devices attends to at a time; None: all."""
    part = -(-5 * K // (4 * n_devices * _TILE)) * _TILE
    return part if part < K else None


def attend_in_parts(
    attend: Attend, part: int, q: Array, kv: Array | QuantizedLatents, indices: Array
) -> tuple[Array, Array]:
    """`attend` of (q, kv, indices) to the entries [B, T, K] that are real, so many of each list at a time.

    As many times as the longest list needs; a device whose lists are empty does it once, to nothing.
    """
    last, K = np.iinfo(np.int32).max, indices.shape[2]
    is_real = (indices >= 0) & (indices < kv.shape[1])
    most = jnp.max(jnp.sum(is_real, axis=2, dtype=jnp.int32))
    # Brought together by a sort, which is the fastest way on a TPU, and keeps what is listed twice.
    listed = jnp.pad(jnp.where(is_real, indices, last), ((0, 0), (0, 0), (0, -K % part)), constant_values=last)
    listed = jnp.sort(listed, axis=2)
    listed = jnp.where(listed < last, listed, -1)
    first = attend(q, kv, listed[:, :, :part])

    def others(out: Array, lse: Array) -> tuple[Array, Array]:
        def add(i: Array, so_far: tuple[Array, Array]) -> tuple[Array, Array]:
            nth = lax.dynamic_slice_in_dim(listed, i * part, part, axis=2)
            return _of_both(so_far, attend(q, kv, nth))

        total, lse = lax.fori_loop(1, (most + part - 1) // part, add, (out.astype(jnp.float32), lse))
        return total.astype(out.dtype), lse

    return lax.cond(most > part, others, lambda *found: found, *first)


def _of_both(some: tuple[Array, Array], others: tuple[Array, Array]) -> tuple[Array, Array]:
    """Attention to two sets of tokens from that to each, values [B, T, N, V] and logsumexps [B, T, N] float32."""
    highest = jnp.maximum(some[1], others[1])
    finite = jnp.where(jnp.isneginf(highest), 0, highest)
    weights = [jnp.exp(lse - finite) for _, lse in (some, others)]
    total = weights[0] + weights[1]
    values = sum(out * weight[..., None] for (out, _), weight in zip((some, others), weights, strict=True))
    return values / jnp.where(total > 0, total, 1)[..., None], highest + jnp.log(total)


def merge(out: Array, lse: Array, axis: str) -> tuple[Array, Array]:
    """Attention to all tokens from that to each device's own, [B, T, N, V] and [B, T, N] float32; inside shard_map."""
    if 4 * out.size >= _MANY_BYTES:
        return _merge_in_shares(out, lse, axis)
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


def _merge_in_shares(out: Array, lse: Array, axis: str) -> tuple[Array, Array]:
    """`merge` of many queries: each device merges an equal share of them, in float32, and all get its results.

    What is sent is in `out`'s dtype both times, half of the bytes of a sum in float32 where that is bfloat16.
    """
    n, shape = lax.axis_size(axis), lse.shape
    missing = -(shape[0] * shape[1]) % n

    def of_own_queries(x: Array) -> Array:
        """[B, T, ...] on each device -> [n, B * T / n, ...], what all have of this device's queries."""
        rows = x.reshape(-1, *x.shape[2:])
        rows = jnp.pad(rows, ((0, missing), *((0, 0) for _ in rows.shape[1:])))
        return lax.all_to_all(rows.reshape(n, -1, *rows.shape[1:]), axis, split_axis=0, concat_axis=0, tiled=True)

    def to_all(x: Array) -> Array:
        rows = lax.all_gather(x, axis, axis=0, tiled=True)
        return rows[: shape[0] * shape[1]].reshape(*shape[:2], *x.shape[1:])

    out, lse = of_own_queries(out), of_own_queries(lse)
    highest = jnp.max(lax.stop_gradient(lse), axis=0, keepdims=True)
    weight = jnp.exp(lse - jnp.where(jnp.isneginf(highest), 0, highest))
    total = jnp.sum(weight, axis=0)
    values = jnp.sum(out.astype(jnp.float32) * weight[..., None], axis=0)
    merged = values / jnp.where(total > 0, total, 1)[..., None]
    return to_all(merged.astype(out.dtype)), to_all(highest[0] + jnp.log(total))
