"""The public calls in the forms that are fuzzed, each a function of plain arrays.

A reproduction prints the source of the form that it needs, so a form uses numpy, jax, hisa_jax and its arguments alone.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import hisa_jax as hj


def keys_of(k, scales):
    return k if scales is None else hj.QuantizedKeys(k, scales)


def over(devices):
    """On which mesh; nothing for one device."""
    if devices == 1:
        return {}
    mesh = jax.make_mesh((devices,), ("context",), devices=jax.devices()[:devices])
    return dict(mesh=mesh, context_axis="context")


@functools.partial(jax.jit, static_argnames=("method", "implementation", "devices"))
def select(q, k, scales, w, positions, lengths, *, method, implementation, devices=1):
    """A batch: [R, T, H, D], [R, S, D], [R, S] or None, [R, T, H], [R, T], [R]."""
    options = dict(query_positions=positions, lengths=lengths, implementation=implementation)
    options |= dict(return_scores=True, return_blocks=method.has_blocks)
    return hj.select(q, keys_of(k, scales), w, method, **options, **over(devices))


@functools.partial(jax.jit, static_argnames=("method", "implementation", "block_size"))
def select_limited(q, k, scales, w, positions, lengths, budget, ids, *, method, implementation, block_size):
    """As `select`, with budgets [R, T] and lists [R, T, m] or None, of blocks of `block_size`; w may be None."""
    options = dict(query_positions=positions, lengths=lengths, budget=budget, implementation=implementation)
    options |= dict(return_scores=True, return_blocks=method.has_blocks)
    listed = None if ids is None else hj.CandidateBlocks(ids, block_size)
    return hj.select(q, keys_of(k, scales), w, method, candidates=listed, **options)


@functools.partial(jax.jit, static_argnames=("method", "implementation", "block_size"))
def select_limited_packed(
    q, k, scales, w, cu_seqlens_q, cu_seqlens_k, lengths, budget, ids, *, method, implementation, block_size
):
    """As `select_packed`, of so many tokens [R], with budgets [T] and lists [T, m] or None; w may be None."""
    options = dict(lengths=lengths, budget=budget, implementation=implementation)
    options |= dict(return_scores=True, return_blocks=method.has_blocks)
    listed = None if ids is None else hj.CandidateBlocks(ids, block_size)
    return hj.select_packed(q, keys_of(k, scales), w, cu_seqlens_q, cu_seqlens_k, method, candidates=listed, **options)


@functools.partial(jax.jit, static_argnames=("n_pages", "page_size", "method", "implementation", "block_size"))
def select_limited_paged(
    q,
    w,
    table,
    cu_seqlens_q,
    lengths,
    keys,
    first,
    budget,
    ids,
    *,
    n_pages,
    page_size,
    method,
    implementation,
    block_size,
):
    """From pages of entries: keys ([N, D], scales [N] or None), packed, whose rows tokens bring when they are the last
    of an entry; `first` [R] tokens are appended by themselves. The rest as `select_limited_packed`.
    """
    k, scales = keys
    r, n_rows = method.entry_size, k.shape[0] * method.entry_size + q.shape[0] * method.entry_size
    cache = hj.init_cache(n_pages, page_size, k.shape[1], k.dtype, entry_size=r)
    # Rows of the packed keys: of each sequence its whole entries.
    starts = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(lengths // r, dtype=jnp.int32)])

    def tokens(begin, end):
        """Those of each request, packed, and their offsets."""
        offsets = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(end - begin, dtype=jnp.int32)])
        row = jnp.arange(n_rows, dtype=jnp.int32)
        request = jnp.clip(jnp.searchsorted(offsets, row, side="right") - 1, 0, len(lengths) - 1)
        entry = starts[request] + (begin[request] + row - offsets[request]) // r
        entry = jnp.clip(entry, 0, k.shape[0] - 1)
        return keys_of(k[entry], None if scales is None else scales[entry]), offsets

    for begin, end in ((jnp.zeros_like(first), first), (first, lengths)):
        new, offsets = tokens(begin, end)
        cache = hj.append(cache, new, table, offsets, begin)
    options = dict(budget=budget, implementation=implementation, return_scores=True, return_blocks=method.has_blocks)
    listed = None if ids is None else hj.CandidateBlocks(ids, block_size)
    return hj.select_paged(q, w, cache, table, cu_seqlens_q, lengths, method, candidates=listed, **options)


@functools.partial(jax.jit, static_argnames=("method", "implementation"))
def select_packed(q, k, scales, w, cu_seqlens_q, cu_seqlens_k, *, method, implementation):
    """A packed batch: [T, H, D], [N, D], [N] or None, [T, H], [R + 1], [R + 1]."""
    options = dict(implementation=implementation, return_scores=True, return_blocks=method.has_blocks)
    return hj.select_packed(q, keys_of(k, scales), w, cu_seqlens_q, cu_seqlens_k, method, **options)


@functools.partial(jax.jit, static_argnames=("n_pages", "page_size", "devices"))
def written(tables, new, rest, first, junk, second, source, target, is_stale, stale, *, n_pages, page_size, devices=1):
    """A used cache: tokens appended, some of them rejected, more appended, pages copied, all else overwritten.

    `new`, `rest`: keys [N, D] and scales or None, packed, of both appends. first, junk, second: [R] tokens that the
    first append writes to stay, that it writes to be rejected, that the second one writes. tables: [2, R, P], before
    and after the copies. is_stale: [n_pages, page_size] rows that no request has and that get the value `stale`.
    """
    on = over(devices)

    def offsets(sizes):
        return jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(sizes, dtype=jnp.int32)])

    cache = hj.init_cache(n_pages, page_size, new[0].shape[1], new[0].dtype, sketch="int4")
    cache = hj.append(cache, keys_of(*new), tables[0], offsets(first + junk), jnp.zeros_like(first), **on)
    cache = hj.truncate(cache, tables[0], first + junk, first, max_tokens=new[0].shape[0], **on)
    cache = hj.append(cache, keys_of(*rest), tables[0], offsets(second), first, **on)
    cache = hj.copy_pages(cache, source, target, **on)
    gone = jnp.all(is_stale, axis=1)

    def overwritten(leaf, where, value=stale):
        where = where.reshape(where.shape + (1,) * (leaf.ndim - where.ndim))
        return jnp.where(where, value.astype(leaf.dtype), leaf)

    return dataclasses.replace(
        cache,
        keys=overwritten(cache.keys, is_stale),
        scales=None if cache.scales is None else overwritten(cache.scales, is_stale),
        sums=overwritten(cache.sums, gone),
        means=None if cache.means is None else overwritten(cache.means, gone),
        mean_scales=None if cache.mean_scales is None else overwritten(cache.mean_scales, gone),
        codes=overwritten(cache.codes, is_stale, jnp.int32(255)),
        code_scales=overwritten(cache.code_scales, is_stale),
    )


@functools.partial(jax.jit, static_argnames=("method", "implementation", "devices"))
def select_from(cache, q, w, table, cu_seqlens_q, lengths, *, method, implementation, devices=1):
    """From the pages of `written`."""
    options = dict(implementation=implementation, return_scores=True, return_blocks=method.has_blocks)
    return hj.select_paged(q, w, cache, table, cu_seqlens_q, lengths, method, **options, **over(devices))


def select_paged(q, w, tables, cu_seqlens_q, lengths, *life, n_pages, page_size, method, implementation, devices=1):
    """From pages: [T, H, D], [T, H], [2, R, P], [R + 1], [R], then what `written` needs."""
    cache = written(tables, *life, n_pages=n_pages, page_size=page_size, devices=devices)
    options = dict(method=method, implementation=implementation, devices=devices)
    return select_from(cache, q, w, tables[1], cu_seqlens_q, lengths, **options)


@functools.partial(jax.jit, static_argnames=("scale", "value_dim", "implementation"))
def sparse_mla(q, kv, indices, sink, *, scale, value_dim, implementation):
    """[R, T, N, Dk], [R, S, Dk], [R, T, K], [N]."""
    options = dict(scale=scale, value_dim=value_dim, return_lse=True, implementation=implementation)
    return hj.sparse_mla(q, kv, indices, sink=sink, **options)


@functools.partial(jax.jit, static_argnames=("scale", "value_dim", "implementation"))
def sparse_mla_paged(q, latents, indices, sink, tables, cu_seqlens_q, *, scale, value_dim, implementation):
    """[T, N, Dk], [n_pages, page_size, Dk], [T, K], [N], [R, P], [R + 1]."""
    options = dict(scale=scale, value_dim=value_dim, return_lse=True, implementation=implementation)
    n_pages, page_size, latent_dim = latents.shape
    empty = hj.init_cache(n_pages, page_size, 0, latent_dim=latent_dim, latent_dtype=latents.dtype)
    cache = dataclasses.replace(empty, latents=latents)
    return hj.sparse_mla_paged(q, cache, indices, tables, cu_seqlens_q, sink=sink, **options)


FORMS: dict[str, Callable[..., Any]] = {
    "select": select,
    "select_limited": select_limited,
    "select_limited_packed": select_limited_packed,
    "select_limited_paged": select_limited_paged,
    "select_packed": select_packed,
    "select_paged": select_paged,
    "sparse_mla": sparse_mla,
    "sparse_mla_paged": sparse_mla_paged,
}
