"""Keys in pages: where a paged cache has the rows of each request, and its block means or what they follow from."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array

from hisa_jax.layout import IndexCache

_MAX_ROWS = 2**31 - 1
# A request's blocks begin at a multiple of this: tiled copies of their means need 8, tiles of them 16.
TILED_BLOCKS = 16
_STATIC = {"static": True}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Pages:
    """Where each row of the requests is: row i of them all is row i % size of page table[i // size].

    Attributes:
        table: [n] int32, page of every `size` rows; any value where a request has none.
        size: rows of a page, a power of two; `n_pages`: pages there are.
    """

    table: Array
    size: int = dataclasses.field(metadata=_STATIC)
    n_pages: int = dataclasses.field(metadata=_STATIC)

    def __getitem__(self, i: Array) -> Array:
        """The page of each group of rows, one that there is whatever the table says."""
        return jnp.clip(self.table[jnp.minimum(i, self.table.shape[0] - 1)], 0, self.n_pages - 1)

    def rows(self, rows: Array) -> Array:
        """Where rows of all requests are in k."""
        return self[rows // self.size] * self.size + rows % self.size

    def of_blocks(self, blocks: Array, block_size: int) -> Array:
        """[T, m] blocks of all requests' rows -> [T, m * block_size / size] int32."""
        per_block = block_size // self.size
        first = (blocks * per_block)[:, :, None]
        return self[first + jnp.arange(per_block, dtype=jnp.int32)].reshape(blocks.shape[0], -1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class PageSums:
    """The block means of all requests, not yet taken.

    Attributes:
        sums: [n_pages, D] float32, the dequantised keys of the tokens in each page; `counts`: [n_pages] int32, of how
            many.
        pages: of all requests' rows; `per_block`: pages of a block.
    """

    sums: Array
    counts: Array
    pages: Pages
    per_block: int = dataclasses.field(metadata=_STATIC)

    @property
    def n_blocks(self) -> int:
        """Of all requests."""
        return self.pages.table.shape[0] // self.per_block


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class PageMeans:
    """The block means of all requests that pages keep.

    Attributes:
        means: [n_pages, parts, D] and `scales`: [n_pages] float32 or None, as `Stages.pool` gives them; of a block of
            several pages the last one has it.
        marks: [n_pages] int32, by which a reader knows that such a mean is of the pages before the last
            (xla/block_means.py); None where a block is a page.
        page_sums: of all requests; where marks say that a mean is of other pages, it is taken from these.
    """

    means: Array
    scales: Array | None
    marks: Array | None
    page_sums: PageSums

    @property
    def rows(self) -> Pages | None:
        """Where each block of all requests is among the means, as pages of one row; None for blocks of several."""
        return dataclasses.replace(self.page_sums.pages, size=1) if self.marks is None else None


def means_of(pages: Pages, block_size: int, cache: IndexCache) -> PageSums | PageMeans:
    """Where block means come from, given what each page of a cache keeps."""
    sums = PageSums(sums=cache.sums, counts=cache.counts, pages=pages, per_block=block_size // pages.size)
    if cache.means is None or block_size != (cache.block_size or pages.size):
        return sums
    return PageMeans(means=cache.means, scales=cache.mean_scales, marks=cache.marks, page_sums=sums)


def is_shared_by_few(R: int, T: int) -> bool:
    """Whether T queries of R requests are so few that each takes the block means of its request for itself.

    On an H200, one query a request of 128K in pages of half a block: means written first take 0.153 ms for 128 requests
    and 0.074 for 32, taken from sums where they are scored 0.147 and 0.067.
    """
    return 2 * R >= T


def why_not(R: int, S: int, block_size: int) -> str | None:
    """None, or why tables of R requests of up to S tokens cannot be taken: their rows are counted in 32 bits.

    Args:
        block_size: or the page size, where there are no blocks.
    """
    unit = TILED_BLOCKS * block_size
    rows = -(-S // unit) * unit
    return None if R * rows <= _MAX_ROWS else f"needs tables of at most {_MAX_ROWS} tokens, not {R} of {rows}"
