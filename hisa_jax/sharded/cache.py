"""A cache whose pages lie on several devices, each of which writes its own.

Page p lies on device p // (n_pages / devices). A device sees in the tables the pages that it has, and to the functions
of one device the others are lacking. Nothing is exchanged: the new tokens and the tables are on all devices. Where a
mesh has several groups of such devices, each group has tokens, tables and pages of its own, which it counts from 0.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from hisa_jax.layout import IndexCache
from hisa_jax.sharded import meshes
from hisa_jax.sharded.meshes import Axes
from hisa_jax.xla import append as xla


def write_own(
    write: Callable[..., IndexCache], axes: Axes, cache: IndexCache, block_tables: Array, *arrays: Any
) -> IndexCache:
    """`write` of (cache, block_tables, *arrays) on each device, with its pages and a table of those alone."""

    def one_device(cache: IndexCache, block_tables: Array, *arrays: Any) -> IndexCache:
        return write(cache, own_pages(cache, block_tables, axes.context), *arrays)

    return _on_each(one_device, axes, cache, block_tables, *arrays)


def copy_own(axes: Axes, cache: IndexCache, source: Array, target: Array) -> IndexCache:
    """`copy_pages` on each device; a pair of two devices is no copy."""

    def one_device(cache: IndexCache, source: Array, target: Array) -> IndexCache:
        source, target = (own_pages(cache, pages, axes.context) for pages in (source, target))
        return xla.copy(cache, source, target)

    return _on_each(one_device, axes, cache, source, target)


def own_pages(cache: IndexCache, pages: Array, axis: str | None) -> Array:
    """Pages of all devices of a group -> their ids in this device's part of the cache, -1 for others'; inside
    `jax.shard_map`. Without an axis a group is one device."""
    own = pages if axis is None else pages - lax.axis_index(axis) * cache.n_pages
    return jnp.where((own >= 0) & (own < cache.n_pages), own, -1)


def _on_each(one_device: Callable[..., IndexCache], axes: Axes, cache: IndexCache, *arrays: Any) -> IndexCache:
    specs = (axes.pages, *(axes.requests for _ in arrays))
    return meshes.on_devices(one_device, axes.mesh, specs, axes.pages)(cache, *arrays)
