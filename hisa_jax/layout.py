"""Where queries and keys lie: the records that every implementation reads.

Call        the queries and keys of R sequences: a batch, packed one after the other, or in the pages of a cache
Keys        index keys and their scales, row by row; `Sketched` ones, in 4 bits
Sequence    the keys of one sequence, for the stages: `Contiguous` rows, or `Paged`
IndexCache  pages of keys, and what each page knows of itself (index_cache.py)
"""

import dataclasses
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import DTypeLike

from hisa_jax.candidates import CandidateBlocks
from hisa_jax.index_cache import IndexCache
from hisa_jax.xla import sketch
from hisa_jax.xla.means import mean, tree_sum
from hisa_jax.xla.rounding import widened

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
        """At least `size` keys, zeros after the real ones."""
        missing = max(size - self.values.shape[0], 0)
        if not missing:
            return self
        scales = None if self.scales is None else jnp.pad(self.scales, (0, missing))
        return Keys(jnp.pad(self.values, ((0, missing), (0, 0))), scales)

    def dequantised(self, present: Array) -> Array:
        """[..., s, D] float32, zeros where no key is present, as `present` [..., s] bool says."""
        values = widened(self.values)
        if self.scales is not None:
            values = values * self.scales[..., None]
        # A select, not a product with 0: absent rows may hold NaN.
        return jnp.where(present[..., None], values, 0)


class BlockLists(NamedTuple):
    """What each query of an attention attends to: whole blocks, of which at most one is open. Tokens are blocks of one.

    Attributes:
        ids: [B, T, L, K] int32, blocks that exist and of which some token is visible, in any order, or -1; L is the
            groups of heads, or 1: one list for all.
        last: [B, T, 2] int32, a block's id and how many of its first tokens count; of all others all tokens do.
    """

    ids: Array
    last: Array


class Sketched(NamedTuple):
    """Index keys in 4 bits, as pages keep them (xla/sketch.py).

    Attributes:
        codes: [N, bytes] uint8; `code_scales`: [N, groups] bfloat16; `scales`: of tokens, [N] float32 or None.
        D, dtype: of the keys.
    """

    codes: Array
    code_scales: Array
    scales: Array | None
    D: int
    dtype: DTypeLike

    def rows(self, rows: Array) -> Keys:
        """What is left of the keys at `rows` (any shape of int32), clipped to [0, N)."""
        rows = jnp.clip(rows, 0, self.codes.shape[0] - 1)
        values = sketch.unpack(self.codes[rows], self.code_scales[rows], self.D, self.dtype)
        return Keys(values, None if self.scales is None else self.scales[rows])


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
        sketch: rows of all pages of the sketch that they keep, which may take the place of `keys`; None: none.
    """

    keys: Keys | Sketched
    pages: Array
    page_size: int
    sketch: Sketched | None = None

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


class Queries(NamedTuple):
    """Queries in rows, of one sequence or of several.

    Attributes: `q` [t, H, D]; `w` [t, H] float32; `visible` [t] int32, how many keys of its sequence each one sees.
    """

    q: Array
    w: Array
    visible: Array


class Limits(NamedTuple):
    """What limits the choice of queries in rows, beside what they see; None: nothing does.

    Attributes: `candidates`: the blocks [t, m] to choose from, ascending, then -1; `budget`: [t] int32, how many keys.
    """

    candidates: CandidateBlocks | None
    budget: Array | None


NO_LIMITS = Limits(None, None)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Call:
    """The queries and keys of R sequences, as the caller has them: a batch, packed, or keys in pages.

    `queries`, `keys`, `query_starts` and `key_starts` say the same of all three forms: rows of R sequences.

    Attributes:
        q: [B, T, H, D], or [T, H, D] for packed queries, one sequence's after the other's.
        w: [B, T, H] or [T, H] float32 head weights.
        visible: [B, T] or [T] int32, how many tokens of its sequence a query sees; 0 for padding.
        k: Keys of [B, S, D], or packed [N, D]; None for keys in pages.
        lengths: [R] int32, tokens present in each sequence; None for keys in pages: `visible` tells.
        query_offsets: [R + 1] int32, ascending, first query of each sequence, and the end; None for a batch.
        key_offsets: [R + 1] int32, the same of packed keys; else None.
        table: [R, P] int32, pages of each sequence in order, for keys in pages; else None.
        cache: those pages; else None.
        candidates: blocks [B, T, m] or [T, m] to choose from, ascending, then -1; None: whatever a query sees.
        budget: [B, T] or [T] int32, how many keys a query chooses at most; None: topk.
    """

    q: Array
    w: Array
    visible: Array
    k: Keys | None = None
    lengths: Array | None = None
    query_offsets: Array | None = None
    key_offsets: Array | None = None
    table: Array | None = None
    cache: IndexCache | None = None
    candidates: CandidateBlocks | None = None
    budget: Array | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The leading axes of results: (B, T), or (T,)."""
        return self.visible.shape

    @property
    def n_sequences(self) -> int:
        return self.shape[0] if self.query_offsets is None else self.query_offsets.shape[0] - 1

    @property
    def max_keys(self) -> int:
        """Static bound on the keys of a sequence."""
        if self.k is not None:
            return self.k.values.shape[-2]
        assert self.table is not None and self.cache is not None
        return self.table.shape[1] * self.cache.page_size

    @property
    def queries(self) -> Queries:
        """All queries in rows."""
        H, D = self.q.shape[-2:]
        return Queries(self.q.reshape(-1, H, D), self.w.reshape(-1, H), self.visible.reshape(-1))

    @property
    def limits(self) -> Limits:
        """Those of all queries in rows."""
        n = len(self.shape)
        listed, budget = self.candidates, self.budget
        if listed is not None:
            listed = dataclasses.replace(listed, ids=listed.ids.reshape(-1, *listed.ids.shape[n:]))
        return Limits(listed, None if budget is None else budget.reshape(-1))

    @property
    def keys(self) -> Keys:
        """All keys in rows: of all sequences, or of all pages."""
        if self.k is None:
            assert self.cache is not None
            values, scales = self.cache.keys, self.cache.scales
        else:
            values, scales = self.k
        return Keys(values.reshape(-1, values.shape[-1]), None if scales is None else scales.reshape(-1))

    @property
    def query_starts(self) -> Array | np.ndarray:
        """[R + 1] int32: `query_offsets`; of a batch in NumPy, so that it costs no operation to find its rows."""
        if self.query_offsets is not None:
            return self.query_offsets
        B, T = self.shape
        return np.arange(B + 1, dtype=np.int32) * np.int32(T)

    @property
    def key_starts(self) -> Array | np.ndarray:
        """[R] int32: the row of each sequence's first key, where keys are not in pages; of a batch in NumPy."""
        if self.key_offsets is not None:
            return self.key_offsets[:-1]
        return np.arange(self.n_sequences, dtype=np.int32) * np.int32(self.max_keys)

    def sequence(self, r: Array) -> "Sequence":
        """The keys of sequence r."""
        if self.table is not None and self.cache is not None:
            return Paged(self.keys, self.table[r], self.cache.page_size, self.sketch)
        return Contiguous(self.keys, jnp.asarray(self.key_starts)[r], self.max_keys)

    @property
    def sketch(self) -> Sketched | None:
        """Rows of all pages of the sketch that they keep."""
        cache = self.cache
        if cache is None or cache.codes is None or cache.code_scales is None:
            return None
        codes, code_scales = (x.reshape(-1, x.shape[-1]) for x in (cache.codes, cache.code_scales))
        return Sketched(codes, code_scales, self.keys.scales, cache.keys.shape[-1], cache.keys.dtype)

    def unflatten[Tree](self, results: Tree) -> Tree:
        """Leaves with a row a query -> leaves of [*shape, ...]."""
        return jax.tree.map(lambda leaf: leaf.reshape(*self.shape, *leaf.shape[1:]), results)


def sequence_of_rows(offsets: Array, T: int) -> tuple[Array, Array]:
    """[R + 1] ascending offsets -> [T] int32, the sequence of each row, 0 to R - 1; [T] bool, whether it has one."""
    R = offsets.shape[0] - 1
    # By comparing, since a binary search is a loop of tiny kernels on a GPU.
    r = jnp.searchsorted(offsets, jnp.arange(T, dtype=jnp.int32), side="right", method="compare_all")
    r = r.astype(jnp.int32) - 1
    return jnp.clip(r, 0, R - 1), (r >= 0) & (r < R)


def ascending(offsets: Array, end: int) -> Array:
    """[R + 1] int32 of any values -> ascending within 0 .. end: bad offsets make sequences empty, nothing more."""
    return lax.cummax(jnp.clip(offsets, 0, end))


def last_visible(offsets: Array, lengths: Array, T: int) -> Array:
    """[T] int32: tokens that each query sees if sequences have `lengths` [R] and their queries are the last of them."""
    r, is_real = sequence_of_rows(offsets, T)
    positions = jnp.where(is_real, lengths[r] - (offsets[r + 1] - jnp.arange(T, dtype=jnp.int32)), -1)
    return visible_tokens(positions, lengths[r])


def visible_tokens(positions: Array, lengths: Array) -> Array:
    """How many tokens each query sees: min(position + 1, length), 0 for padding, without overflow."""
    return jnp.maximum(jnp.minimum(positions, lengths - 1) + 1, 0)
