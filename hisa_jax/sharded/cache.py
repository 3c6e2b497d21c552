"""A cache whose pages lie on several devices: `append`, `truncate` and `copy_pages` where each writes its own.

Arrays are those of `cache.py`, the pages split over a mesh axis: page p lies on device p // (n_pages / devices). A
device sees in the tables the pages that it has, and to the functions of `cache.py` the others are lacking. Nothing is
exchanged: the new tokens and the tables are on all devices.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import Mesh, PartitionSpec

from hisa_jax import cache as on_one_device
from hisa_jax import checks
from hisa_jax.append import append, check_append
from hisa_jax.cache import IndexCache
from hisa_jax.quantize import QuantizedKeys
from hisa_jax.sharded import meshes

PAGES = "the cache's n_pages"


def append_sharded(
    cache: IndexCache,
    k: Array | QuantizedKeys,
    block_tables: Array,
    cu_seqlens: Array,
    lengths: Array,
    *,
    mesh: Mesh,
    context_axis: str,
    latents: Array | None = None,
) -> IndexCache:
    """`append` to a cache whose pages are split over a mesh axis; each device writes the tokens whose pages it has.

    Args:
        cache, k, block_tables, cu_seqlens, lengths, latents: as for `append`; any page may lie anywhere.
        mesh: where it runs.
        context_axis: the mesh axis that splits the cache's pages, in order.

    Returns: what `append` returns, bit for bit, its pages split likewise.
    Raises: as `append`; ValueError: a mesh without the axis, pages that it does not split.
    Example:
        >>> mesh, table = jax.make_mesh((1,), ("context",)), jnp.array([[2, 0]], jnp.int32)
        >>> cache, arrays = hj.init_cache(4, 16, D=8), (jnp.ones((20, 8), jnp.bfloat16), table, jnp.array([0, 20]))
        >>> hj.append_sharded(cache, *arrays, jnp.array([0]), mesh=mesh, context_axis="context").counts.tolist()
        [4, 0, 16, 0]
    """
    call = "append_sharded"
    check_append(call, cache, k, block_tables, cu_seqlens, lengths, latents)

    def one_device(
        cache: IndexCache, block_tables: Array, k: Any, cu_seqlens: Array, lengths: Array, latents: Array | None
    ) -> IndexCache:
        own = own_ids(cache, block_tables, context_axis)
        return append(cache, k, own, cu_seqlens, lengths, latents=latents)

    return _on_each(call, one_device, mesh, context_axis, cache, block_tables, k, cu_seqlens, lengths, latents)


def truncate_sharded(
    cache: IndexCache,
    block_tables: Array,
    lengths: Array,
    new_lengths: Array,
    *,
    max_tokens: int,
    mesh: Mesh,
    context_axis: str,
) -> IndexCache:
    """`truncate` where the cache's pages are split over a mesh axis; each device works on the pages that it has.

    Args:
        cache, block_tables, lengths, new_lengths, max_tokens: as for `truncate`; any page may lie anywhere.
        mesh, context_axis: as for `append_sharded`.

    Returns: what `truncate` returns, bit for bit, its pages split likewise.
    Raises: as `truncate` and `append_sharded`.
    """
    call = "truncate_sharded"
    on_one_device.check_truncation(call, cache, block_tables, lengths, new_lengths, max_tokens)

    def one_device(cache: IndexCache, block_tables: Array, lengths: Array, new_lengths: Array) -> IndexCache:
        own = own_ids(cache, block_tables, context_axis)
        return on_one_device.truncate(cache, own, lengths, new_lengths, max_tokens=max_tokens)

    return _on_each(call, one_device, mesh, context_axis, cache, block_tables, lengths, new_lengths)


def copy_pages_sharded(cache: IndexCache, source: Array, target: Array, *, mesh: Mesh, context_axis: str) -> IndexCache:
    """`copy_pages` where the cache's pages are split over a mesh axis; a page and its copy lie on one device.

    Args:
        cache, source, target: as for `copy_pages`; a pair of two devices is no copy.
        mesh, context_axis: as for `append_sharded`.

    Returns: what `copy_pages` returns, its pages split likewise.
    Raises: as `copy_pages` and `append_sharded`.
    """
    call = "copy_pages_sharded"
    on_one_device.check_copies(call, cache, source, target)
    n_devices = meshes.check_axis(call, "context_axis", mesh, context_axis, cache.n_pages, PAGES)
    n_own, is_copy = cache.n_pages // n_devices, (target >= 0) & (target < cache.n_pages)
    checks.value(
        ~is_copy | (source // n_own == target // n_own),
        f"{call}: target is {{target}} for source {{source}}, wanted pages of one device, {n_own} in a row",
        target=target,
        source=source,
    )

    def one_device(cache: IndexCache, source: Array, target: Array) -> IndexCache:
        source, target = (own_ids(cache, pages, context_axis) for pages in (source, target))
        return on_one_device.copy_pages(cache, source, jnp.where(source >= 0, target, -1))

    return _on_each(call, one_device, mesh, context_axis, cache, source, target)


def own_ids(cache: IndexCache, pages: Array, axis: str) -> Array:
    """Pages of all devices -> their ids in this device's part of the cache, -1 for others'; inside `jax.shard_map`."""
    own = pages - lax.axis_index(axis) * cache.n_pages
    return jnp.where((own >= 0) & (own < cache.n_pages), own, -1)


def _on_each(
    call: str, one_device: Callable[..., IndexCache], mesh: Mesh, axis: str, cache: IndexCache, *arrays: Any
) -> IndexCache:
    """Runs `one_device` with its part of the cache and the arrays, which are on all."""
    meshes.check_axis(call, "context_axis", mesh, axis, cache.n_pages, PAGES)
    split, all_of_it = PartitionSpec(axis), PartitionSpec()
    run = meshes.on_devices(one_device, mesh, (split, *(all_of_it for _ in arrays)), split)
    return run(cache, *arrays)
