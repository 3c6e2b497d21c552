"""Pages of index keys: the record, made of pages that are written already, and what must hold of it and its tables."""

import dataclasses
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from hisa_jax import checks
from hisa_jax.latents import QuantizedLatents, check_latents
from hisa_jax.methods import Sketch
from hisa_jax.quantize import QuantizedKeys
from hisa_jax.xla import sketch as sketches
from hisa_jax.xla.describe import describe
from hisa_jax.xla.means import n_parts_of

MAX_PAGE_SIZE = MAX_BLOCK_SIZE = 256


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
            whose blocks are pages: one bfloat16, or two e4m3; None for other dtypes, which they do not take. With a
            `block_size`, a page that ends a whole block has the block's mean here.
        mean_scales: [n_pages] float32, of the two e4m3; else None.
        codes: [n_pages, page_size, bytes] uint8, the keys in 4 bits a number, for scans that read them so, 16 bytes for
            each 32 numbers (xla/sketch.py); None: no sketch is kept.
        code_scales: [n_pages, page_size, groups] bfloat16, of each 32 numbers; else None.
        latents: [n_pages, page_size, Dk], the keys of `sparse_mla` of the same tokens, bfloat16, float32 or
            `QuantizedLatents`; None if kept elsewhere.
        marks: [n_pages] int32, by which a reader knows that such a mean is of the pages that its table names
            (xla/block_means.py); None without a `block_size`.
        block_size: static, tokens of the blocks of several pages whose means are kept; None: of pages alone.
        entry_size: tokens that a key stands for, static. Above 1 read "entry" for "token" above: a page has page_size
            entries.
    """

    keys: Array
    scales: Array | None
    sums: Array
    counts: Array
    places: Array
    means: Array | None
    mean_scales: Array | None
    codes: Array | None
    code_scales: Array | None
    latents: Array | QuantizedLatents | None
    marks: Array | None = None
    block_size: int | None = dataclasses.field(default=None, metadata={"static": True})
    entry_size: int = dataclasses.field(default=1, metadata=dict(static=True))

    @classmethod
    def from_pages(
        cls,
        k: Array | QuantizedKeys,
        block_tables: Array,
        lengths: Array,
        *,
        entry_size: int = 1,
        sketch: Sketch | None = None,
        latents: Array | QuantizedLatents | None = None,
        block_size: int | None = None,
    ) -> "IndexCache":
        """A cache of pages that are written already, by a server for instance; `append` keeps it up from then on.

        What each page says of itself follows from the tables. The keys are read once, and not copied: on the device
        the cache has the same array. Inside of a jitted step it is one pass over all pages, which methods with blocks
        alone need.

        Args:
            k: [n_pages, page_size, D], all pages, bfloat16 or float32; `QuantizedKeys` of this shape for 8 bits.
            block_tables: [R, P] int32, the pages of each request in order. Entries past its last token are ignored.
            lengths: [R] int32, tokens of each request. Pages that none of them needs are free.
            entry_size, sketch: as for `init_cache`.
            latents: [n_pages, page_size, Dk] bfloat16, float32 or `QuantizedLatents`, the keys of `sparse_mla`, if the
                pages hold them.
            block_size: as for `init_cache`.

        Raises: TypeError: arrays of another dtype, int64 tables for instance. ValueError: arrays of another shape, flat
            tables for instance; outside of jit also a token without a page, and a page that is named for two places of
            sequences. Under jit a request with such a page selects nothing, and `checked` says so.
        Example:
            >>> table, k = jnp.array([[2, 0]], jnp.int32), jnp.ones((4, 16, 8))
            >>> cache = hj.IndexCache.from_pages(k, table, jnp.array([20]))
            >>> cache.counts.tolist(), cache.places.tolist()
            ([4, 0, 16, 0], [1, -1, 0, -1])
        """
        call = "IndexCache.from_pages"
        values, scales = (k.values, k.scales) if isinstance(k, QuantizedKeys) else (k, None)
        quantised, others = ("float8_e4m3fn", "int8"), ("bfloat16", "float32")
        checks.dtype(call, "k", values, others if scales is None else quantised)
        checks.shape(call, "k", values, ("n_pages", "page_size", "D"))
        n, size, _ = values.shape
        check_page_size(call, size)
        if scales is not None:
            checks.dtype(call, "k.scales", scales, ("float32",))
            checks.shape(call, "k.scales", scales, (n, size), "one scale a key")
        check_sketch(call, sketch)
        block_size = block_size_of(call, size, values.dtype.name, block_size)
        if latents is not None:
            check_latents(call, "latents", latents, (n, size), "pages as k has them")
        checks.int32(call, "block_tables", block_tables, ("R", "P"), "a flat table is block_tables.reshape(R, -1)")
        R, P = block_tables.shape
        checks.int32(call, "lengths", lengths, (R,), f"one length a request (block_tables is [{R}, {P}])")
        values, scales, table, lengths = jax.tree.map(jnp.asarray, (values, scales, block_tables, lengths))
        checks.integer(call, "entry_size", entry_size, 1)
        n_keys = lengths // entry_size
        codes, code_scales = (None, None) if sketch is None else sketches.pack(values)
        cache = cls(
            keys=values,
            scales=scales,
            codes=codes,
            code_scales=code_scales,
            latents=latents,
            block_size=block_size,
            entry_size=int(entry_size),
            **describe(values, scales, table, n_keys, block_size)._asdict(),
        )
        is_good = (lengths >= 0) & has_all_pages(cache, table, n_keys)
        wanted = (
            f"wanted for each of its tokens, up to {P * cache.page_tokens}, one from 0 to {n - 1} that no table names "
            "for another place of a sequence"
        )
        if isinstance(is_good, jax.core.Tracer):
            checks.value(is_good, f"{call}: block_tables lacks pages of requests {{bad}}, {wanted}", bad=~is_good)
        elif not np.all(is_good):
            bad = np.flatnonzero(~np.asarray(is_good)).tolist()
            raise ValueError(f"{call}: block_tables lacks pages of requests {bad[:8]}, {wanted}")
        return cache

    @property
    def n_pages(self) -> int:
        return self.keys.shape[0]

    @property
    def page_size(self) -> int:
        """Keys of a page."""
        return self.keys.shape[1]

    @property
    def page_tokens(self) -> int:
        """Tokens of a page."""
        return self.page_size * self.entry_size


def has_all_pages(cache: IndexCache, block_tables: Array, lengths: Array) -> Array:
    """[R] bool: whether each of `lengths` [R] keys of a request has a page that was written for its place."""
    P = block_tables.shape[1]
    holds = holds_tokens(cache, block_tables, jnp.arange(P, dtype=jnp.int32), lengths)
    return holds & (lengths <= P * cache.page_size)


def holds_tokens(cache: IndexCache, pages: Array, page_indices: Array, lengths: Array) -> Array:
    """[R, P], [P], [R] -> [R] bool: whether pages hold the tokens that belong to these page indices of requests."""
    n_needed = jnp.clip(lengths[:, None] - page_indices[None, :] * cache.page_size, 0, cache.page_size)
    is_page = (pages >= 0) & (pages < cache.n_pages)
    page = jnp.where(is_page, pages, 0)
    holds = is_page & (cache.places[page] == page_indices[None, :]) & (cache.counts[page] >= n_needed)
    return jnp.all(holds | (n_needed == 0), axis=1)


def check_page_size(call: str, page_size: int) -> None:
    """Raises ValueError unless pages may have so many tokens."""
    if page_size < 1 or page_size > MAX_PAGE_SIZE or page_size & (page_size - 1):
        raise ValueError(f"{call}: page_size={page_size}, wanted a power of two up to {MAX_PAGE_SIZE}")


def is_block_size(block_size: int) -> bool:
    """Whether pages can keep means of blocks of so many tokens."""
    return 0 < block_size <= MAX_BLOCK_SIZE and block_size & (block_size - 1) == 0


def block_size_of(call: str, page_size: int, dtype: str, block_size: int | None) -> int | None:
    """The blocks of several pages whose means a cache keeps, None for none; raises ValueError for sizes that are none.

    Keys that no kernel takes with means of its own form have none either.
    """
    if block_size is None:
        return None
    checks.integer(call, "block_size", block_size, page_size)
    if not is_block_size(block_size):
        raise ValueError(
            f"{call}: block_size={block_size}, wanted a power of two from the page's {page_size} to {MAX_BLOCK_SIZE}"
        )
    return block_size if block_size > page_size and n_parts_of(dtype) is not None else None


def check_sketch(call: str, sketch: Sketch | None) -> None:
    """Raises ValueError unless there is such a sketch, or none is wanted."""
    if sketch is not None and not (isinstance(sketch, str) and sketch in get_args(Sketch)):
        raise ValueError(f"{call}: sketch={sketch!r}, wanted None or one of {', '.join(get_args(Sketch))}")


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
        "marks": ("int32", (n,)),
        "codes": ("uint8", (n, size, sketches.sizes(D)[0])),
        "code_scales": ("bfloat16", (n, size, sketches.sizes(D)[1])),
    }
    no_sketch = cache.codes is None and cache.code_scales is None
    always = ("sums", "counts", "places") if no_sketch else ("sums", "counts", "places", "codes", "code_scales")
    if block_size_of(call, size, dtype, cache.block_size) is not None:
        always = (*always, "means", "marks")
    for name, (wanted, shape) in parts.items():
        part = getattr(cache, name)
        if part is not None or name in always:
            checks.dtype(call, f"cache.{name}", part, (wanted,))
            checks.shape(call, f"cache.{name}", part, shape, f"of {n} pages of {size} tokens, as cache.keys has them")
    checks.integer(call, "cache.entry_size", cache.entry_size, 1)
    if cache.latents is not None:
        check_latents(call, "cache.latents", cache.latents, (n, size), "pages as cache.keys has them")


def check_table(call: str, cache: IndexCache, block_tables: Array, lengths: Array) -> int:
    """Raises unless a cache's tables [R, P] and [R] int32 fit each other; returns R."""
    check_cache(call, cache)
    checks.int32(call, "block_tables", block_tables, ("R", "P"))
    R, P = block_tables.shape
    checks.int32(call, "lengths", lengths, (R,), f"one length a request (block_tables is [{R}, {P}])")
    checks.value(
        (lengths >= 0) & (lengths <= P * cache.page_tokens + cache.entry_size - 1),
        f"{call}: lengths is {{lengths}}, wanted 0 to {P * cache.page_tokens + cache.entry_size - 1}, the tokens that "
        f"{P} pages hold",
        lengths=lengths,
    )
    return R
