"""Writes to the pages of a cache, in XLA. Each works out anew what the pages that it touches say of themselves."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from hisa_jax.latents import QuantizedLatents
from hisa_jax.layout import IndexCache, Keys, ascending, sequence_of_rows
from hisa_jax.quantize import QuantizedKeys
from hisa_jax.xla import block_means
from hisa_jax.xla.means import mean, mean_parts, tree_sum
from hisa_jax.xla.sketch import pack


@jax.jit
def copy(cache: IndexCache, source: Array, target: Array) -> IndexCache:
    """`copy_pages`: [n], [n]; a pair of which either lies outside of the cache is no copy."""
    is_copy = (source >= 0) & (source < cache.n_pages) & (target >= 0)
    source, target = jnp.where(is_copy, source, 0), jnp.where(is_copy, target, cache.n_pages)
    return jax.tree.map(lambda leaf: leaf.at[target].set(leaf[source], mode="drop"), cache)


class NewKeys(NamedTuple):
    """New keys [T, D] of R requests: `cu_seqlens` [R + 1], where each one's begin; `lengths` [R], its keys before."""

    k: Array | QuantizedKeys
    cu_seqlens: Array
    lengths: Array


@functools.partial(jax.jit, static_argnums=0)
def whole_entries(entry_size: int, k: Array | QuantizedKeys, cu_seqlens: Array, lengths: Array) -> NewKeys:
    """The entries that new tokens complete: of tokens with a row of `k` each, and before them `lengths` [R] tokens."""
    T, R = k.shape[0], lengths.shape[0]
    offsets = ascending(cu_seqlens, T)
    before = lengths // entry_size
    n_new = (lengths + jnp.diff(offsets)) // entry_size - before
    starts = jnp.concatenate([jnp.zeros((1,), jnp.int32), jnp.cumsum(n_new, dtype=jnp.int32)])
    n = min(T, T // entry_size + R)
    r, _ = sequence_of_rows(starts, n)
    nth = before[r] + jnp.arange(n, dtype=jnp.int32) - starts[r]
    rows = jnp.clip(offsets[r] + (nth + 1) * entry_size - 1 - lengths[r], 0, T - 1)
    return NewKeys(jax.tree.map(lambda x: x[rows], k), starts, before)


@jax.jit
def write(
    cache: IndexCache,
    values: Array,
    scales: Array | None,
    latents: Array | QuantizedLatents | None,
    block_tables: Array,
    cu_seqlens: Array,
    lengths: Array,
) -> IndexCache:
    """`append`, in XLA: [T, D], [T], [T, E], [R, P], [R + 1] within 0 .. T, [R]."""
    (T, _), R, size = values.shape, lengths.shape[0], cache.page_size
    r, is_real = sequence_of_rows(cu_seqlens, T)
    position = lengths[r] + jnp.arange(T, dtype=jnp.int32) - cu_seqlens[r]
    page = jnp.where(is_real, _page_of(cache, block_tables, r, position // size), cache.n_pages)

    def put(pages: Array, new: Array) -> Array:
        return pages.at[page, position % size].set(new, mode="drop")

    if cache.codes is not None and cache.code_scales is not None:
        codes, code_scales = pack(values)
        cache = dataclasses.replace(
            cache, codes=put(cache.codes, codes), code_scales=put(cache.code_scales, code_scales)
        )
    cache = dataclasses.replace(
        cache,
        keys=put(cache.keys, values),
        scales=None if cache.scales is None or scales is None else put(cache.scales, scales),
        latents=None if latents is None else jax.tree.map(put, cache.latents, latents),
    )
    ends = lengths + jnp.diff(cu_seqlens)
    # Full pages of new tokens, and at most two partial ones a request.
    return recount(cache, block_tables, lengths, ends, ends, min(T, T // size + 2 * R), T // size + 2)


@functools.partial(jax.jit, static_argnums=(5, 6))
def recount(
    cache: IndexCache, block_tables: Array, first: Array, end: Array, lengths: Array, max_pages: int, most: int
) -> IndexCache:
    """Works out what pages say of themselves that hold positions first .. end - 1 [R] of requests of `lengths` [R].

    There are at most `max_pages` of them and `most` of a request: one whose lengths are bad takes none of the others'.
    """
    R, size = first.shape[0], cache.page_size
    n_pages = jnp.where(end > first, jnp.minimum((end - 1) // size - first // size + 1, most), 0)
    ends = jnp.cumsum(n_pages)
    i = jnp.arange(max_pages, dtype=jnp.int32)
    r = jnp.searchsorted(ends, i, side="right", method="compare_all").astype(jnp.int32)
    r = jnp.minimum(r, R - 1)
    page_index = first[r] // size + i - (ends - n_pages)[r]
    page = jnp.where(i < ends[-1], _page_of(cache, block_tables, r, page_index), cache.n_pages)
    counts = jnp.clip(lengths[r] - page_index * size, 0, size)
    content = jnp.minimum(page, cache.n_pages - 1)
    keys = Keys(cache.keys[content], None if cache.scales is None else cache.scales[content])
    sums = tree_sum(keys.dequantised(jnp.arange(size, dtype=jnp.int32)[None, :] < counts[:, None]))

    def put(leaf: Array, new: Array) -> Array:
        return leaf.at[page].set(new, mode="drop")

    cache = dataclasses.replace(
        cache, sums=put(cache.sums, sums), counts=put(cache.counts, counts), places=put(cache.places, page_index)
    )
    kept = mean(sums, counts)
    if cache.marks is not None and cache.block_size is not None:
        n_before = cache.block_size // size - 1
        earlier = page_index[:, None] + jnp.arange(-n_before, 0, dtype=jnp.int32)[None, :]
        pages = _page_of(cache, block_tables, r[:, None], earlier)
        marks = put(cache.marks, block_means.mark_of(sums, counts))
        before = block_means.before(pages, cache.sums, cache.counts, marks)
        kept, marks = block_means.kept(sums, counts, page_index % (n_before + 1) == n_before, before, size)
        cache = dataclasses.replace(cache, marks=put(cache.marks, marks))
    means, mean_scales = mean_parts(kept, cache.keys.dtype) or (None, None)
    return dataclasses.replace(
        cache,
        means=None if cache.means is None or means is None else put(cache.means, means),
        mean_scales=None if cache.mean_scales is None or mean_scales is None else put(cache.mean_scales, mean_scales),
    )


def _page_of(cache: IndexCache, block_tables: Array, r: Array, page_index: Array) -> Array:
    """Physical page of a request's page `page_index`, n_pages where there is none."""
    page = block_tables[r, jnp.clip(page_index, 0, block_tables.shape[1] - 1)]
    is_there = (page_index >= 0) & (page_index < block_tables.shape[1]) & (page >= 0) & (page < cache.n_pages)
    return jnp.where(is_there, page, cache.n_pages)
