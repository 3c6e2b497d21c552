"""A paged cache of index keys, and the latents of the sparse attention beside them, as a functional pytree.

Beside its keys a page keeps their dequantised sum and their count, from which block means follow, and their mean in the
form that the kernels' block filter reads. All belong to the
physical page, so whoever shares, copies, evicts or reuses a page has nothing else to keep in step. Every write works
them out anew from what the page then holds: writing the same tokens twice changes nothing, and no rounding adds up.
A page also knows its place in its sequence, so that a table which names it elsewhere is found out.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from hisa_jax import checks
from hisa_jax.layout import Keys, mean, mean_parts, present_values, tree_sum

_MAX_PAGE_SIZE = 256


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class IndexCache:
    """Pages of index keys.

    Attributes:
        keys: [n_pages, page_size, D], bfloat16, float32, float8_e4m3fn or int8.
        scales: [n_pages, page_size] float32, one a token; None where every scale is 1.
        sums: [n_pages, D] float32, sum of the dequantised keys of the tokens in each page.
        counts: [n_pages] int32, of how many tokens.
        places: [n_pages] int32, which page of its sequence each is, from 0; the same for all that share it. -1: none.
        means: [n_pages, parts, D], the mean of each page in numbers of the keys' dtype that add up to it, for kernels
            whose blocks are pages: one bfloat16, or two e4m3; None for other dtypes, which they do not take.
        mean_scales: [n_pages] float32, of the two e4m3; else None.
        latents: [n_pages, page_size, Dk], the keys of `sparse_mla` of the same tokens; None if kept elsewhere.
    """

    keys: Array
    scales: Array | None
    sums: Array
    counts: Array
    places: Array
    means: Array | None
    mean_scales: Array | None
    latents: Array | None

    @property
    def n_pages(self) -> int:
        return self.keys.shape[0]

    @property
    def page_size(self) -> int:
        return self.keys.shape[1]


def init_cache(
    n_pages: int,
    page_size: int,
    D: int,
    dtype: DTypeLike = jnp.bfloat16,
    *,
    latent_dim: int | None = None,
    latent_dtype: DTypeLike = jnp.bfloat16,
) -> IndexCache:
    """An empty cache.

    Args:
        n_pages: pages there are for all requests.
        page_size: tokens of a page, a power of two up to 256; to be used with blocks of so many tokens or a multiple.
        D: size of an index key; 0 for the latents of a layer that has no indexer of its own.
        dtype: of the keys: bfloat16, float32, or float8_e4m3fn or int8, which come with a scale a token.
        latent_dim: size of the attention's keys (576 in DeepSeek-V3.2), to keep them in the same pages; None: not here.
        latent_dtype: of those, bfloat16 or float32.

    Raises: TypeError: a dtype not listed above. ValueError: sizes that are not.
    """
    call = "init_cache"
    checks.integer(call, "page_size", page_size, 1)
    if page_size > _MAX_PAGE_SIZE or page_size & (page_size - 1):
        raise ValueError(f"{call}: page_size={page_size}, wanted a power of two up to {_MAX_PAGE_SIZE}")
    checks.integer(call, "n_pages", n_pages, 1)
    checks.integer(call, "D", D, 0)
    dtype = checks.one_dtype(call, "dtype", dtype, checks.KEY_DTYPES)
    if latent_dim is not None:
        checks.integer(call, "latent_dim", latent_dim, 1)
        latent_dtype = checks.one_dtype(call, "latent_dtype", latent_dtype, ("bfloat16", "float32"))
    latents = None if latent_dim is None else jnp.zeros((n_pages, page_size, latent_dim), latent_dtype)
    sums = jnp.zeros((n_pages, D), jnp.float32)
    means, mean_scales = mean_parts(sums, dtype) or (None, None)
    return IndexCache(
        keys=jnp.zeros((n_pages, page_size, D), dtype),
        scales=jnp.ones((n_pages, page_size), jnp.float32) if dtype.itemsize == 1 else None,
        sums=sums,
        counts=jnp.zeros((n_pages,), jnp.int32),
        places=jnp.full((n_pages,), -1, jnp.int32),
        means=means,
        mean_scales=mean_scales,
        latents=latents,
    )


def truncate(
    cache: IndexCache, block_tables: Array, lengths: Array, new_lengths: Array, *, max_tokens: int
) -> IndexCache:
    """Removes the last tokens of requests, rejected speculative ones for instance.

    Args:
        cache, block_tables: as in `append`.
        lengths: [R] int32, tokens of each request before; `new_lengths`: [R] int32, after; not more.
        max_tokens: how many tokens a request loses at most; static.

    Returns: the cache, in whose pages sums, counts and means are of the remaining tokens.
    Raises: TypeError, ValueError: arrays that do not fit the cache or each other.
    """
    call = "truncate"
    checks.unsplit(call, cache=cache, block_tables=block_tables, lengths=lengths, new_lengths=new_lengths)
    R = check_truncation(call, cache, block_tables, lengths, new_lengths, max_tokens)
    if 0 in block_tables.shape:
        return cache
    most = max_tokens // cache.page_size + 2
    ends = jnp.maximum(lengths, new_lengths)
    return _recount(cache, block_tables, new_lengths, ends, new_lengths, R * most, most)


def copy_pages(cache: IndexCache, source: Array, target: Array) -> IndexCache:
    """Copies whole pages, as before a write to a shared one.

    Args:
        cache: the pages of all requests.
        source: [n] int32, pages to copy.
        target: [n] int32, where to. A pair of which either lies outside of [0, n_pages) is no copy, so that n may be
            fixed.

    Returns: the cache with those pages.
    Raises: TypeError, ValueError: arrays that are not these.
    """
    checks.unsplit("copy_pages", cache=cache, source=source, target=target)
    check_copies("copy_pages", cache, source, target)
    return _copy(cache, source, target)


@jax.jit
def _copy(cache: IndexCache, source: Array, target: Array) -> IndexCache:
    is_copy = (source >= 0) & (source < cache.n_pages) & (target >= 0)
    source, target = jnp.where(is_copy, source, 0), jnp.where(is_copy, target, cache.n_pages)
    return jax.tree.map(lambda leaf: leaf.at[target].set(leaf[source], mode="drop"), cache)


def check_cache(call: str, cache: IndexCache) -> None:
    """Raises unless `cache` is one whose parts fit each other, as `init_cache` makes it."""
    checks.instance(call, "cache", cache, IndexCache, "an IndexCache")
    checks.dtype(call, "cache.keys", cache.keys, checks.KEY_DTYPES)
    checks.shape(call, "cache.keys", cache.keys, ("n_pages", "page_size", "D"))
    (n, size, D), dtype = cache.keys.shape, cache.keys.dtype.name
    parts: dict[str, tuple[str, tuple[int | str, ...]]] = {
        "sums": ("float32", (n, D)),
        "counts": ("int32", (n,)),
        "places": ("int32", (n,)),
        "scales": ("float32", (n, size)),
        "means": (dtype, (n, "parts", D)),
        "mean_scales": ("float32", (n,)),
    }
    for name, (wanted, shape) in parts.items():
        part = getattr(cache, name)
        if part is not None or name in ("sums", "counts", "places"):
            checks.dtype(call, f"cache.{name}", part, (wanted,))
            checks.shape(call, f"cache.{name}", part, shape, f"of {n} pages of {size} tokens, as cache.keys has them")
    if cache.latents is not None:
        checks.dtype(call, "cache.latents", cache.latents, ("bfloat16", "float32"))
        checks.shape(call, "cache.latents", cache.latents, (n, size, "Dk"), "pages as cache.keys has them")


def check_copies(call: str, cache: IndexCache, source: Array, target: Array) -> None:
    """Raises unless the arguments of `copy_pages` fit each other."""
    check_cache(call, cache)
    checks.int32(call, "source", source, ("n",))
    checks.int32(call, "target", target, source.shape, "a page for each of source's")


def check_table(call: str, cache: IndexCache, block_tables: Array, lengths: Array) -> int:
    """Raises unless a cache's tables [R, P] and [R] int32 fit each other; returns R."""
    check_cache(call, cache)
    checks.int32(call, "block_tables", block_tables, ("R", "P"))
    R, P = block_tables.shape
    checks.int32(call, "lengths", lengths, (R,), f"one length a request (block_tables is [{R}, {P}])")
    checks.value(
        (lengths >= 0) & (lengths <= P * cache.page_size),
        f"{call}: lengths is {{lengths}}, wanted 0 to {P * cache.page_size}, the tokens that {P} pages hold",
        lengths=lengths,
    )
    return R


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


@jax.jit
def write(
    cache: IndexCache,
    values: Array,
    scales: Array | None,
    latents: Array | None,
    block_tables: Array,
    cu_seqlens: Array,
    lengths: Array,
) -> IndexCache:
    """`append`, in XLA: [T, D], [T], [T, E], [R, P], [R + 1] within 0 .. T, [R]."""
    (T, _), R, size = values.shape, lengths.shape[0], cache.page_size
    rows = jnp.arange(T, dtype=jnp.int32)
    # Not a search, which on a GPU is a loop of tiny kernels.
    r = jnp.searchsorted(cu_seqlens, rows, side="right", method="compare_all").astype(jnp.int32) - 1
    is_real = (r >= 0) & (r < R)
    r = jnp.clip(r, 0, R - 1)
    position = lengths[r] + rows - cu_seqlens[r]
    page = jnp.where(is_real, _page_of(cache, block_tables, r, position // size), cache.n_pages)

    def put(pages: Array, new: Array) -> Array:
        return pages.at[page, position % size].set(new, mode="drop")

    cache = dataclasses.replace(
        cache,
        keys=put(cache.keys, values),
        scales=None if cache.scales is None or scales is None else put(cache.scales, scales),
        latents=None if cache.latents is None or latents is None else put(cache.latents, latents),
    )
    ends = lengths + jnp.diff(cu_seqlens)
    # Full pages of new tokens, and at most two partial ones a request.
    return _recount(cache, block_tables, lengths, ends, ends, min(T, T // size + 2 * R), T // size + 2)


@functools.partial(jax.jit, static_argnums=(5, 6))
def _recount(
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
    nth = first[r] // size + i - (ends - n_pages)[r]
    page = jnp.where(i < ends[-1], _page_of(cache, block_tables, r, nth), cache.n_pages)
    counts = jnp.clip(lengths[r] - nth * size, 0, size)
    content = jnp.minimum(page, cache.n_pages - 1)
    keys = Keys(cache.keys[content], None if cache.scales is None else cache.scales[content])
    sums = tree_sum(present_values(keys, jnp.arange(size, dtype=jnp.int32)[None, :] < counts[:, None]))
    means, mean_scales = mean_parts(mean(sums, counts), cache.keys.dtype) or (None, None)

    def put(leaf: Array, new: Array) -> Array:
        return leaf.at[page].set(new, mode="drop")

    return dataclasses.replace(
        cache,
        sums=put(cache.sums, sums),
        counts=put(cache.counts, counts),
        places=put(cache.places, nth),
        means=None if cache.means is None or means is None else put(cache.means, means),
        mean_scales=None if cache.mean_scales is None or mean_scales is None else put(cache.mean_scales, mean_scales),
    )


def _page_of(cache: IndexCache, block_tables: Array, r: Array, nth: Array) -> Array:
    """Physical page of the nth page of request r, n_pages where there is none."""
    page = block_tables[r, jnp.clip(nth, 0, block_tables.shape[1] - 1)]
    is_there = (nth >= 0) & (nth < block_tables.shape[1]) & (page >= 0) & (page < cache.n_pages)
    return jnp.where(is_there, page, cache.n_pages)
