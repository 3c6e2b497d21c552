"""A paged cache of index keys, and the latents of the sparse attention with them, as a functional pytree.

Besides its keys a page keeps their dequantised sum and their count, from which block means follow, and their mean in
the form that the kernels' block filter reads; if asked to, also a sketch of each key for the scan. All belong to the
physical page, so sharing, copying, evicting or reusing a page needs no other update. Every write works them out anew
from what the page then holds: writing the same tokens twice changes nothing, and rounding errors do not add up. A page
also knows which page of its sequence it is, so that a table that names it elsewhere is noticed.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh
from jax.typing import DTypeLike

from hisa_jax import checks, dispatch, dispatch_stage
from hisa_jax.index_cache import (
    IndexCache,
    block_size_of,
    check_cache,
    check_page_size,
    check_sketch,
    check_table,
)
from hisa_jax.latents import QuantizedLatents
from hisa_jax.latents import n_groups as groups_of_values
from hisa_jax.layout import ascending
from hisa_jax.methods import Sketch
from hisa_jax.quantize import QuantizedKeys
from hisa_jax.sharded import cache as on_mesh
from hisa_jax.sharded import meshes
from hisa_jax.sharded.meshes import Axes
from hisa_jax.xla import append as xla
from hisa_jax.xla.append import whole_entries
from hisa_jax.xla.means import mean_parts
from hisa_jax.xla.sketch import sizes as sketch_sizes


def init_cache(
    n_pages: int,
    page_size: int,
    D: int,
    dtype: DTypeLike = jnp.bfloat16,
    *,
    entry_size: int = 1,
    sketch: Sketch | None = None,
    latent_dim: int | None = None,
    latent_dtype: DTypeLike = jnp.bfloat16,
    latent_value_dim: int = 512,
    block_size: int | None = None,
) -> IndexCache:
    """Makes a cache of free pages.

    Args:
        n_pages: pages there are for all requests.
        page_size: keys of a page, a power of two up to 256; to be used with blocks of so many keys or a multiple.
        entry_size: tokens that a key stands for. A page then has page_size entries, so page_size * entry_size tokens.
        D: size of an index key; 0 for the latents of a layer that has no indexer of its own.
        dtype: of the keys: bfloat16, float32, or float8_e4m3fn or int8, which come with a scale a token.
        sketch: "int4": keep beside each key what `Scan(sketch="int4")` scans in place of it, so that it is read and not
            made: 18 bytes for each 32 numbers, the last of them filled up. None: keys alone.
        latent_dim: size of the attention's keys (576 in DeepSeek-V3.2), to keep them in the same pages; None: not here.
            Entries have pages of their own.
        latent_dtype: of those, bfloat16 or float32; or float8_e4m3fn: they are kept as `QuantizedLatents`.
        latent_value_dim: how many of their features are then in 8 bits.
        block_size: tokens of the blocks of `Hisa`, if they are several pages: kernels then read their means and add no
            sums, which for pages of 64 and blocks of 128 halves a decoding step of 128 requests. A speed matter only.

    Returns: `IndexCache`, every page with 0 tokens.
    Raises: TypeError: a dtype not listed above. ValueError: sizes that are not, another sketch.
    Source: pages and tables as in PagedAttention, arXiv 2309.06180.
    Example:
        >>> hj.init_cache(n_pages=4, page_size=16, D=128).keys.shape
        (4, 16, 128)
    """
    call = "init_cache"
    checks.integer(call, "page_size", page_size, 1)
    check_page_size(call, page_size)
    checks.integer(call, "n_pages", n_pages, 1)
    checks.integer(call, "D", D, 0)
    dtype = checks.one_dtype(call, "dtype", dtype, checks.KEY_DTYPES)
    check_sketch(call, sketch)
    checks.integer(call, "entry_size", entry_size, 1)
    if entry_size > 1 and latent_dim is not None:
        raise ValueError(
            f"{call}: latent_dim={latent_dim} with entry_size={entry_size}, wanted None: latents are of tokens, which "
            "a cache of their own keeps"
        )
    block_size = block_size_of(call, page_size, dtype.name, block_size)
    if latent_dim is not None:
        checks.integer(call, "latent_dim", latent_dim, 1)
        kinds = ("bfloat16", "float32", "float8_e4m3fn")
        latent_dtype = checks.one_dtype(call, "latent_dtype", latent_dtype, kinds)
    latents = (
        None if latent_dim is None else _no_latents((n_pages, page_size), latent_dim, latent_dtype, latent_value_dim)
    )
    sums = jnp.zeros((n_pages, D), jnp.float32)
    means, mean_scales = mean_parts(sums, dtype) or (None, None)
    n_bytes, n_groups = sketch_sizes(D)
    return IndexCache(
        keys=jnp.zeros((n_pages, page_size, D), dtype),
        scales=jnp.ones((n_pages, page_size), jnp.float32) if dtype.itemsize == 1 else None,
        sums=sums,
        counts=jnp.zeros((n_pages,), jnp.int32),
        places=jnp.full((n_pages,), -1, jnp.int32),
        means=means,
        mean_scales=mean_scales,
        codes=None if sketch is None else jnp.zeros((n_pages, page_size, n_bytes), jnp.uint8),
        code_scales=None if sketch is None else jnp.zeros((n_pages, page_size, n_groups), jnp.bfloat16),
        latents=latents,
        entry_size=int(entry_size),
        marks=None if block_size is None else jnp.zeros((n_pages,), jnp.int32),
        block_size=block_size,
    )


def _no_latents(pages: tuple[int, int], latent_dim: int, dtype: DTypeLike, value_dim: int) -> Array | QuantizedLatents:
    if jnp.dtype(dtype).itemsize > 1:
        return jnp.zeros((*pages, latent_dim), dtype)
    call = "init_cache"
    checks.integer(call, "latent_value_dim", value_dim, 1)
    if value_dim > latent_dim:
        raise ValueError(f"{call}: latent_value_dim={value_dim}, wanted at most latent_dim={latent_dim}")
    return QuantizedLatents(
        values=jnp.zeros((*pages, value_dim), dtype),
        scales=jnp.ones((*pages, groups_of_values(call, value_dim, "latent_value_dim")), jnp.float32),
        rope=jnp.zeros((*pages, latent_dim - value_dim), jnp.bfloat16),
    )


def append(
    cache: IndexCache,
    k: Array | QuantizedKeys,
    block_tables: Array,
    cu_seqlens: Array,
    lengths: Array,
    *,
    latents: Array | QuantizedLatents | None = None,
    mesh: Mesh | None = None,
    context_axis: str | None = None,
    data_axis: str | None = None,
    implementation: str = "auto",
) -> IndexCache:
    """Appends new tokens to each request.

    What stood at their positions before is replaced, so tokens that were rejected need not be removed first. Tokens
    that have no page (their entry of the table lies outside of [0, n_pages)) are dropped. Under `jax.jit` give the
    cache's buffers to the result: `jax.jit(hj.append, donate_argnums=0)`.

    Args:
        cache: the pages of all requests.
        k: [T, D] new index keys of all requests, one request's after the other's, in the cache's dtype;
            `QuantizedKeys` for 8 bits. With an `entry_size` an entry is written when its last token arrives, from the
            row of that token; rows of other tokens are ignored.
        block_tables: [R, P] int32, the pages of each request in order. Pages written to must belong to one request.
        cu_seqlens: [R + 1] int32, where each request's new tokens begin in `k`, from 0, ascending.
        lengths: [R] int32, tokens of each request before.
        latents: [T, Dk], the new tokens' keys for `sparse_mla`, if the cache keeps them, in the form in which it does.
        mesh, context_axis: run it on a mesh whose axis splits the cache's pages, in order: each device writes the pages
            that it has, and nothing is exchanged. Any page may lie anywhere. None: on one device.
        data_axis: the mesh axis whose devices are groups of their own, alone or beside `context_axis`. Every array is
            then those of the groups, one after the other along its first axis in equal parts: tokens, requests, and
            pages, which a group's tables count from 0. Each group's `cu_seqlens` begin with a 0: there are R + groups.
        implementation: "auto", "triton" (one kernel, on NVIDIA GPUs) or "xla"; the same bits, but for the last of a
            partial page's mean.

    Returns: the cache with lengths + diff(cu_seqlens) tokens a request, its pages split as they were.
    Raises: TypeError, ValueError: arrays that do not fit the cache or each other; an implementation that cannot run; a
        mesh without the axis, pages that it does not split.
    Example:
        >>> cache, table = hj.init_cache(4, 16, D=8, dtype=jnp.float32), jnp.array([[2, 0]], jnp.int32)
        >>> cache = hj.append(cache, jnp.ones((20, 8)), table, jnp.array([0, 20]), jnp.array([0]))
        >>> cache.counts.tolist()
        [4, 0, 16, 0]
    """
    call = "append"
    arrays: Any = dict(
        cache=cache, block_tables=block_tables, k=k, cu_seqlens=cu_seqlens, lengths=lengths, latents=latents
    )
    over = dict(context_axis=context_axis, data_axis=data_axis)
    n_groups = _check_mesh(call, mesh, over, **arrays)
    R = check_append(call, **arrays, n_groups=n_groups)
    axes = _axes(call, mesh, over, cache, n_groups)
    (n_pages, size, D), T = cache.keys.shape, (k.values if isinstance(k, QuantizedKeys) else k).shape[0]
    n_own = n_pages if axes is None else n_pages // (n_groups * axes.n_devices)
    problem = dispatch_stage.AppendProblem(
        n_requests=R // n_groups, n_pages=n_own, page_size=size, D=D, dtype=cache.keys.dtype.name,
        latent_values=cache.latents.value_dim if isinstance(cache.latents, QuantizedLatents) else 0,
    )  # fmt: skip
    name = dispatch.choose(call, implementation, dispatch_stage.append_reasons(dispatch.Device.default(), problem))
    if 0 in (T, R, block_tables.shape[1]):
        return cache
    return _on(axes, functools.partial(_append, name), **arrays)


def truncate(
    cache: IndexCache,
    block_tables: Array,
    lengths: Array,
    new_lengths: Array,
    *,
    max_tokens: int,
    mesh: Mesh | None = None,
    context_axis: str | None = None,
    data_axis: str | None = None,
) -> IndexCache:
    """Removes the last tokens of requests, rejected speculative ones for instance.

    Args:
        cache, block_tables: as in `append`.
        lengths: [R] int32, tokens of each request before; `new_lengths`: [R] int32, after; not more.
        max_tokens: how many tokens a request loses at most; static.
        mesh, context_axis, data_axis: as for `append`.

    Returns: the cache, in whose pages sums, counts and means are of the remaining tokens.
    Raises: TypeError, ValueError: arrays that do not fit the cache or each other.
    Example:
        >>> cache, table = hj.init_cache(4, 16, D=8, dtype=jnp.float32), jnp.array([[2]], jnp.int32)
        >>> cache = hj.append(cache, jnp.ones((5, 8)), table, jnp.array([0, 5]), jnp.array([0]))
        >>> hj.truncate(cache, table, jnp.array([5]), jnp.array([3]), max_tokens=2).counts.tolist()
        [0, 0, 3, 0]
    """
    call = "truncate"
    arrays: Any = dict(cache=cache, block_tables=block_tables, lengths=lengths, new_lengths=new_lengths)
    over = dict(context_axis=context_axis, data_axis=data_axis)
    n_groups = _check_mesh(call, mesh, over, **arrays)
    check_truncation(call, **arrays, max_tokens=max_tokens)
    axes = _axes(call, mesh, over, cache, n_groups)
    if 0 in block_tables.shape:
        return cache
    r = cache.entry_size
    if r > 1:
        arrays |= dict(lengths=lengths // r, new_lengths=new_lengths // r)
        max_tokens = max_tokens // r + 1
    return _on(axes, functools.partial(_truncate, max_tokens), **arrays)


def copy_pages(
    cache: IndexCache,
    source: Array,
    target: Array,
    *,
    mesh: Mesh | None = None,
    context_axis: str | None = None,
    data_axis: str | None = None,
) -> IndexCache:
    """Copies whole pages, as before a write to a shared one.

    Args:
        cache: the pages of all requests.
        source: [n] int32, pages to copy.
        target: [n] int32, where to. A pair of which either lies outside of [0, n_pages) is no copy, so that n may be
            fixed.
        mesh, context_axis, data_axis: as for `append`; a page and its copy must then lie on one device.

    Returns: the cache with those pages.
    Raises: TypeError, ValueError: arrays that are not these.
    Example:
        >>> cache, table = hj.init_cache(4, 16, D=8, dtype=jnp.float32), jnp.array([[2]], jnp.int32)
        >>> cache = hj.append(cache, jnp.ones((5, 8)), table, jnp.array([0, 5]), jnp.array([0]))
        >>> hj.copy_pages(cache, source=jnp.array([2]), target=jnp.array([3])).counts.tolist()
        [0, 0, 5, 5]
    """
    call = "copy_pages"
    over = dict(context_axis=context_axis, data_axis=data_axis)
    n_groups = _check_mesh(call, mesh, over, cache=cache, source=source, target=target)
    check_copies(call, cache, source, target)
    axes = _axes(call, mesh, over, cache, n_groups)
    if axes is None:
        return xla.copy(cache, source, target)
    n_pages = cache.n_pages // n_groups
    n_own = n_pages // axes.n_devices
    is_copy = (target >= 0) & (target < n_pages)
    checks.value(
        ~is_copy | (source // n_own == target // n_own),
        f"{call}: target is {{target}} for source {{source}}, wanted pages of one device, {n_own} in a row",
        target=target,
        source=source,
    )
    return on_mesh.copy_own(axes, cache, source, target)


def _append(
    name: str,
    cache: IndexCache,
    block_tables: Array,
    k: Array | QuantizedKeys,
    cu_seqlens: Array,
    lengths: Array,
    latents: Array | QuantizedLatents | None,
) -> IndexCache:
    if cache.entry_size > 1:
        k, cu_seqlens, lengths = whole_entries(cache.entry_size, k, cu_seqlens, lengths)
    values, scales = (k.values, k.scales) if isinstance(k, QuantizedKeys) else (k, None)
    if name == "xla":
        offsets = ascending(cu_seqlens, values.shape[0])
        return xla.write(cache, values, scales, latents, block_tables, offsets, lengths)
    return dispatch_stage.appender(name)(cache, (values, scales, latents), block_tables, cu_seqlens, lengths)


def _truncate(
    max_tokens: int, cache: IndexCache, block_tables: Array, lengths: Array, new_lengths: Array
) -> IndexCache:
    most = max_tokens // cache.page_size + 2
    ends = jnp.maximum(lengths, new_lengths)
    return xla.recount(cache, block_tables, new_lengths, ends, new_lengths, len(lengths) * most, most)


def _check_mesh(call: str, mesh: Mesh | None, axes: dict[str, str | None], **arrays: Any) -> int:
    """Raises unless mesh, axes and arrays go together; returns how many groups of devices there are."""
    meshes.check_arrays(call, mesh, axes, **arrays)
    return meshes.groups(call, mesh, axes["data_axis"], **arrays)


def _axes(
    call: str, mesh: Mesh | None, axes: dict[str, str | None], cache: IndexCache, n_groups: int
) -> Axes | None:  # fmt: skip
    """What splits the cache's pages, None on one device; raises unless it does."""
    return None if mesh is None else meshes.page_axes(call, mesh, axes, cache, n_groups)


def _on(
    axes: Axes | None, write: Callable[..., IndexCache], cache: IndexCache, block_tables: Array, **arrays: Any
) -> IndexCache:
    """Runs a write on one device, or on each of a mesh with the pages that it has."""
    if axes is None:
        return write(cache, block_tables, *arrays.values())
    return on_mesh.write_own(write, axes, cache, block_tables, *arrays.values())


def check_append(
    call: str,
    cache: IndexCache,
    block_tables: Array,
    k: Array | QuantizedKeys,
    cu_seqlens: Array,
    lengths: Array,
    latents: Array | QuantizedLatents | None,
    n_groups: int = 1,
) -> int:
    """Raises unless the arguments of `append` fit each other; returns R."""
    R = check_table(call, cache, block_tables, lengths)
    values, scales = (k.values, k.scales) if isinstance(k, QuantizedKeys) else (k, None)
    checks.dtype(call, "k", values, (cache.keys.dtype.name,))
    checks.shape(call, "k", values, ("T", cache.keys.shape[2]), "its last axis must equal the cache's D")
    T = values.shape[0]
    if (scales is None) != (cache.scales is None):
        wanted = "QuantizedKeys" if scales is None else "an array"
        raise TypeError(f"{call}: k is {type(k).__name__}, wanted {wanted}, as the cache holds {cache.keys.dtype.name}")
    if scales is not None:
        checks.dtype(call, "k.scales", scales, ("float32",))
        checks.shape(call, "k.scales", scales, (T,), "one scale a key")
    if (latents is None) != (cache.latents is None):
        has = "None: the cache keeps none" if cache.latents is None else "an array: the cache keeps them"
        raise ValueError(f"{call}: latents is {'None' if latents is None else 'given'}, wanted {has}")
    if latents is not None and cache.latents is not None:
        _check_new_latents(call, cache.latents, latents, T)
    why = "a start for each request, and the end" + (" of each group" if n_groups > 1 else "")
    checks.offsets(call, "cu_seqlens", cu_seqlens, (R + n_groups,), T, why, n_groups)
    return R


def _check_new_latents(call: str, kept: Array | QuantizedLatents, new: Array | QuantizedLatents, T: int) -> None:
    """Raises unless new latents are of the form of those that a cache keeps."""
    is_quantized = isinstance(kept, QuantizedLatents)
    if is_quantized != isinstance(new, QuantizedLatents):
        wanted = "QuantizedLatents" if is_quantized else "an array"
        raise TypeError(f"{call}: latents is {type(new).__name__}, wanted {wanted}, as the cache holds them")
    names = ["latents.values", "latents.scales", "latents.rope"] if is_quantized else ["latents"]
    for name, x, pages in zip(names, jax.tree.leaves(new), jax.tree.leaves(kept), strict=True):
        checks.dtype(call, name, x, (pages.dtype.name,))
        checks.shape(call, name, x, (T, pages.shape[2]), "a row for each of k's")


def check_copies(call: str, cache: IndexCache, source: Array, target: Array) -> None:
    """Raises unless the arguments of `copy_pages` fit each other."""
    check_cache(call, cache)
    checks.int32(call, "source", source, ("n",))
    checks.int32(call, "target", target, source.shape, "a page for each of source's")


def check_truncation(
    call: str, cache: IndexCache, block_tables: Array, lengths: Array, new_lengths: Array, max_tokens: int
) -> int:
    """Raises unless the arguments of `truncate` fit each other; returns R."""
    R = check_table(call, cache, block_tables, lengths)
    checks.int32(call, "new_lengths", new_lengths, (R,), "one length a request")
    checks.integer(call, "max_tokens", max_tokens, 1)
    checks.value(
        (new_lengths >= 0) & (new_lengths <= lengths) & (lengths - new_lengths <= max_tokens),
        f"{call}: new_lengths is {{new}} where lengths is {{old}}, wanted 0 to {max_tokens} tokens less",
        new=new_lengths,
        old=lengths,
    )
    return R
