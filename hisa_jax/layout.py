"""Index keys, and how the stages read those of one sequence: from contiguous rows, or from pages."""

from typing import NamedTuple, Protocol

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

_E4M3_MAX = 448.0

# Widths of key tiles are multiples of this one. XLA's CPU matmul gives a product the same bits at every such width,
# which is what makes chunked prefill, decode and the flat indexer agree bit for bit.
LANES = 128


class Keys(NamedTuple):
    """Index keys of all sequences, one after the other.

    Attributes: `values` [N, D]; `scales` [N] float32, or None where every scale is 1.
    """

    values: Array
    scales: Array | None

    def rows(self, rows: Array) -> "Keys":
        """The keys at `rows` (any shape of int32), clipped to [0, N)."""
        rows = jnp.clip(rows, 0, self.values.shape[0] - 1)
        return Keys(self.values[rows], None if self.scales is None else self.scales[rows])

    def slice(self, first: Array, size: int) -> "Keys":
        """`size` keys from `first` on; both must fit."""
        scales = None if self.scales is None else lax.dynamic_slice(self.scales, (first,), (size,))
        return Keys(lax.dynamic_slice_in_dim(self.values, first, size), scales)

    def padded(self, size: int) -> "Keys":
        """At least `size` keys, zeros behind the real ones."""
        missing = max(size - self.values.shape[0], 0)
        if not missing:
            return self
        scales = None if self.scales is None else jnp.pad(self.scales, (0, missing))
        return Keys(jnp.pad(self.values, ((0, missing), (0, 0))), scales)


class Sequence(Protocol):
    """The keys of one sequence."""

    @property
    def max_keys(self) -> int:
        """Static bound on how many it has."""
        ...

    def rows(self, positions: Array) -> Keys:
        """The keys at positions, any shape of int32; those outside of the sequence are anything, never read outside."""
        ...

    def tile(self, start: Array, size: int) -> tuple[Keys, Array]:
        """`size` keys that hold those from `start` on, as far as there are, and the position of each, [size] int32."""
        ...


class Contiguous(NamedTuple):
    """A sequence in consecutive rows of the keys of all sequences: `start`, the row of its first key."""

    keys: Keys
    start: Array
    max_keys: int

    def rows(self, positions: Array) -> Keys:
        return self.keys.rows(self.start + positions)

    def tile(self, start: Array, size: int) -> tuple[Keys, Array]:
        keys = self.keys.padded(size)
        # The last tile is moved back to end with the keys; what it sees again has positions before `start`.
        first = jnp.clip(self.start + start, 0, keys.values.shape[0] - size)
        return keys.slice(first, size), first - self.start + jnp.arange(size, dtype=jnp.int32)


class Paged(NamedTuple):
    """A sequence in pages.

    Attributes:
        keys: rows of all pages, page 0 first.
        pages: [P] int32, where each page of the sequence is; only those that hold its tokens need be real.
        page_size: rows of a page.
    """

    keys: Keys
    pages: Array
    page_size: int

    @property
    def max_keys(self) -> int:
        return self.pages.shape[0] * self.page_size

    def rows(self, positions: Array) -> Keys:
        page = self.pages[jnp.clip(positions // self.page_size, 0, self.pages.shape[0] - 1)]
        return self.keys.rows(page * self.page_size + positions % self.page_size)

    def tile(self, start: Array, size: int) -> tuple[Keys, Array]:
        positions = start + jnp.arange(size, dtype=jnp.int32)
        return self.rows(positions), positions


class PagedMeans(NamedTuple):
    """The block means of a sequence in pages, from the sum and the count that each page keeps.

    Attributes:
        sums: [n_pages, D] float32, sum of each page's dequantised keys; `counts`: [n_pages] int32, of how many.
        pages: [P] int32, as in `Paged`.
        per_block: pages of a block.
    """

    sums: Array
    counts: Array
    pages: Array
    per_block: int

    @property
    def max_keys(self) -> int:
        return -(-self.pages.shape[0] // self.per_block)

    def rows(self, positions: Array) -> Keys:
        within = lax.broadcasted_iota(jnp.int32, (*positions.shape, self.per_block), positions.ndim)
        of_block = positions[..., None] * self.per_block + within
        is_there = of_block < self.pages.shape[0]
        page = self.pages[jnp.clip(of_block, 0, self.pages.shape[0] - 1)]
        page = jnp.where(is_there, jnp.clip(page, 0, self.sums.shape[0] - 1), 0)
        sums = jnp.where(is_there[..., None], self.sums[page], 0)
        counts = jnp.sum(jnp.where(is_there, self.counts[page], 0), axis=-1, dtype=jnp.int32)
        return Keys(mean(tree_sum(sums), counts), None)

    def tile(self, start: Array, size: int) -> tuple[Keys, Array]:
        positions = start + jnp.arange(size, dtype=jnp.int32)
        return self.rows(positions), positions


def present_values(keys: Keys, present: Array) -> Array:
    """Keys of [..., s, D] and [..., s] bool -> [..., s, D] float32, dequantised, zeros where no key is present."""
    values = keys.values.astype(jnp.float32)
    if keys.scales is not None:
        values = values * keys.scales[..., None]
    # A select, not a product with 0: absent rows may hold NaN.
    return jnp.where(present[..., None], values, 0)


def tree_sum(values: Array) -> Array:
    """[..., n, D] -> [..., D]: sums by pairs of neighbours, of pairs, and so on.

    Whoever sums aligned runs of 2**j neighbours first and then those sums gets the same bits: pages and blocks agree.
    """
    n = values.shape[-2]
    size = 1 << max(n - 1, 0).bit_length()
    values = jnp.pad(values, ((0, 0),) * (values.ndim - 2) + ((0, size - n), (0, 0)))
    while values.shape[-2] > 1:
        # Additions, not reductions: XLA makes one of reductions of reductions, in its own order.
        values = values[..., 0::2, :] + values[..., 1::2, :]
    return values[..., 0, :]


def mean(total: Array, counts: Array) -> Array:
    """[..., D] float32, [...] int32 -> [..., D]; zeros for no token."""
    return total / jnp.maximum(counts, 1).astype(jnp.float32)[..., None]


def mean_parts(means: Array, dtype: DTypeLike) -> tuple[Array, Array | None] | None:
    """[..., D] float32 means in the numbers that the kernels' block filter multiplies for keys of a dtype, or None.

    Returns: [..., parts, D], each part holding what those before left, and of two e4m3 parts the scale [...] float32.
        The same bits as the `pool` stage of the GPU kernels (triton/pool_body.py) makes: the scale is a power of two,
        and the rounding to e4m3 is spelled out, so that nothing is left to a compiler.
    """
    if jnp.dtype(dtype) == jnp.bfloat16:
        return means[..., None, :].astype(dtype), None
    if jnp.dtype(dtype) != jnp.float8_e4m3fn:
        return None
    magnitude = jnp.where(jnp.isnan(means), 0.0, jnp.abs(means))
    largest = jnp.maximum(jnp.max(magnitude, axis=-1, initial=0.0), 1e-30)
    # The least power of two that brings 1.75 * 2**e, of whose form 448 is, into range.
    exponent = ((lax.bitcast_convert_type(largest, jnp.int32) + 0x1FFFFF) >> 23) - 8
    scale, inverse = (lax.bitcast_convert_type(x << 23, jnp.float32) for x in (exponent, 254 - exponent))
    rest = jnp.clip(means * inverse[..., None], -_E4M3_MAX, _E4M3_MAX)
    parts = []
    for _ in range(2):
        bits = lax.bitcast_convert_type(rest, jnp.int32)
        rounded = lax.bitcast_convert_type((bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000, jnp.float32)
        parts.append(jnp.where(jnp.isnan(rest), rest, rounded).astype(dtype))
        rest = rest - parts[-1].astype(jnp.float32)
    return jnp.stack(parts, axis=-2), scale
