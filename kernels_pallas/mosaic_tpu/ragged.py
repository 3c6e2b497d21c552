"""The operands of a call as the kernels take them: R sequences, each with its rows of queries and its blocks of keys.

A batch, a packed batch whose keys were moved so that sequences begin with a block, and requests in pages are one thing
to the stages. What is known when tracing, where the rows of a batch lie, stays in NumPy.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from hisa_jax.kernels_pallas.mosaic_tpu.config import GROUP, SUBLANES
from hisa_jax.kernels_pallas.sequences import Rows, whole_blocks

_CHUNK = 2048  # keys that are moved at a time
_MOST_QUERIES = 32  # of a tile


class Queries(NamedTuple):
    """Rows of queries; where a function says so also [B, T, ...] of a batch."""

    q: Array  # [T, H, D]
    w: Array  # [T, H] float32
    visible: Array  # [T] int32, candidates of each query, the first ones; 0 for padding

    def map(self, f: Callable[[Array], Array]) -> "Queries":
        return Queries(*(f(x) for x in self))


class Keys(NamedTuple):
    """Keys in pages; keys in one row are pages of a block each."""

    values: Array  # [N, page_size, D]
    scales: Array | None  # [N, page_size] float32


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ragged:
    """R sequences.

    Attributes:
        keys: of all sequences.
        query_starts: [R + 1] int32, ascending; rows after the last sequence are padding. NumPy: of a batch.
        lengths: [R] int32, tokens that some query of the sequence sees, or more.
        first_blocks: [R] int32, the block that each sequence begins with; None for sequences in pages.
        table: [R, P] int32, pages of each sequence, all of them in [0, N); None for blocks in a row.
        page_sums: [N, D] float32, the dequantised keys of each page added up; None: blocks are pooled.
        means: [R, n, D] float32, kept block means of a batch; None: blocks are pooled.
        block_size: tokens; max_keys: static bound on the tokens of a sequence.
    """

    keys: Keys
    query_starts: Rows
    lengths: Array
    first_blocks: Rows | None
    table: Array | None
    page_sums: Array | None = None
    means: Array | None = None
    block_size: int
    max_keys: int

    @property
    def R(self) -> int:
        return self.query_starts.shape[0] - 1

    @property
    def is_batch(self) -> bool:
        return isinstance(self.query_starts, np.ndarray)

    @property
    def per_block(self) -> int:
        """Pages of a block."""
        return self.block_size // self.keys.values.shape[1]

    @property
    def max_blocks(self) -> int:
        """Most blocks of a sequence that hold a token."""
        return -(-self.max_keys // self.block_size)

    @property
    def most_blocks(self) -> int:
        """Most blocks of a sequence that there is room for."""
        return self.keys.values.shape[0] // self.R if self.is_batch else self.max_blocks

    @property
    def n_queries(self) -> Rows:
        """[R] int32."""
        return self.query_starts[1:] - self.query_starts[:-1]

    @property
    def n_blocks(self) -> Rows:
        """[R] int32, of the keys; of a batch those that there is room for."""
        if self.is_batch:
            return np.full(self.R, self.most_blocks)
        return -(-self.lengths // self.block_size)

    def shared_by(self, T: int) -> int:
        """Of T rows of queries those that tiles are cut from: of one sequence of a batch, else all."""
        return T // self.R if self.is_batch else T

    def tile_t(self, T: int, most: int = _MOST_QUERIES) -> int:
        """Queries of a tile, where T rows are cut into large ones. Ragged tiles are windows of q, so they fit in it."""
        some = self.shared_by(T)
        return min(most, -(-some // SUBLANES) * SUBLANES if self.is_batch else some // SUBLANES * SUBLANES)

    def sequence_of(self, rows: Rows) -> Rows:
        """[n] int32 rows of queries -> the sequence of each."""
        if self.is_batch:
            return rows // max(int(self.query_starts[1]), 1)
        # The default search is a loop; R comparisons a row are one fused operation.
        r = jnp.searchsorted(self.query_starts[1:], rows, side="right", method="compare_all").astype(jnp.int32)
        return jnp.minimum(r, self.R - 1)

    def page_index(self, block_ids: Array, rows: Rows) -> Array:
        """[n, m] int32 blocks that queries at `rows` [n] keep -> [n, m * per_block] int32, where `keys` holds them."""
        r = self.sequence_of(rows)[:, None]
        if self.table is None:
            assert self.first_blocks is not None
            return jnp.asarray(self.first_blocks[r] + block_ids)
        logical = block_ids[..., None] * self.per_block + jnp.arange(self.per_block, dtype=jnp.int32)
        logical = jnp.clip(logical.reshape(block_ids.shape[0], -1), 0, self.table.shape[1] - 1)
        return self.table[r, logical]


def in_blocks(k: Array, k_scale: Array | None, block_size: int) -> Keys:
    """[B, S, D], [B, S] or None -> Keys of [B * n, block_size, D], n a multiple of GROUP."""
    k, k_scale = whole_blocks(k, k_scale, GROUP * block_size)
    blocks = k.reshape(-1, block_size, k.shape[2])
    return Keys(blocks, None if k_scale is None else k_scale.reshape(-1, block_size))


def of_batch(queries: Queries, keys: Keys, lengths: Array, means: Array | None = None) -> tuple[Queries, Ragged]:
    """Queries of [B, T, ...], Keys in blocks as `in_blocks` gives them, [B] tokens present; maybe [B, n, D] means."""
    B, T = queries.visible.shape
    rows = queries._replace(visible=jnp.minimum(queries.visible, lengths[:, None]))
    ragged = Ragged(
        keys=keys,
        query_starts=np.arange(B + 1, dtype=np.int32) * T,
        lengths=lengths,
        first_blocks=np.arange(B, dtype=np.int32) * (keys.values.shape[0] // B),
        table=None,
        means=means,
        block_size=keys.values.shape[1],
        max_keys=keys.values.shape[0] // B * keys.values.shape[1],
    )
    return rows.map(lambda x: x.reshape(B * T, *x.shape[2:])), ragged


def of_packed(queries: Queries, keys: Keys, cu_seqlens: tuple[Array, Array], block_size: int) -> tuple[Queries, Ragged]:
    """Queries of [T, ...], Keys of [N, D] and [N], [R + 1] int32 offsets of both -> rows, record.

    The keys are copied once, so that every sequence begins with a block.
    """
    cu_seqlens_q, cu_seqlens_k = cu_seqlens
    N, R = keys.values.shape[0], cu_seqlens_k.shape[0] - 1
    lengths = jnp.diff(cu_seqlens_k)
    n_blocks = -(-lengths // block_size)
    starts = jnp.cumsum(n_blocks) - n_blocks
    # Each sequence ends in at most one partial block; after the last there is a group that copies may run into.
    chunk = min(_CHUNK, -(-N // block_size) * block_size)
    rows = (N // block_size + R + GROUP) * block_size + chunk
    n_chunks = -(-lengths // chunk)
    ends = jnp.cumsum(n_chunks)

    def moved(x: Array) -> Array:
        x = jnp.pad(x, ((0, chunk), *((0, 0),) * (x.ndim - 1)))

        def one_chunk(i: Array, out: Array) -> Array:
            r = jnp.searchsorted(ends, i, side="right", method="compare_all")
            at = (i - (ends - n_chunks)[r]) * chunk
            part = lax.dynamic_slice_in_dim(x, cu_seqlens_k[r] + at, chunk)
            # What a sequence writes past its end, the next one overwrites.
            return lax.dynamic_update_slice_in_dim(out, part, starts[r] * block_size + at, axis=0)

        out = lax.fori_loop(0, ends[-1], one_chunk, jnp.zeros((rows, *x.shape[1:]), x.dtype))
        return out[: rows // block_size * block_size].reshape(-1, block_size, *x.shape[1:])

    ragged = Ragged(
        keys=Keys(moved(keys.values), None if keys.scales is None else moved(keys.scales)),
        query_starts=cu_seqlens_q,
        lengths=lengths,
        first_blocks=starts,
        table=None,
        block_size=block_size,
        max_keys=N,
    )
    return _at_least_eight(queries), ragged


def of_pages(
    queries: Queries, keys: Keys, block_tables: Array, cu_seqlens_q: Array, block_size: int, page_sums: Array | None
) -> tuple[Queries, Ragged]:
    """Queries of [T, ...], Keys, [R, P] and [R + 1] int32, [N, D] float32 -> rows, record; nothing is moved."""
    n_pages, page_size, _ = keys.values.shape
    T, P = queries.visible.shape[0], block_tables.shape[1]
    table = jnp.clip(block_tables, 0, n_pages - 1)
    # The last query of a sequence sees the most.
    last = queries.visible[jnp.clip(cu_seqlens_q[1:] - 1, 0, T - 1)]
    ragged = Ragged(
        keys=keys,
        query_starts=cu_seqlens_q,
        lengths=jnp.where(jnp.diff(cu_seqlens_q) > 0, last, 0),
        first_blocks=None,
        table=jnp.pad(table, ((0, 0), (0, -P % (block_size // page_size)))),
        page_sums=page_sums,
        block_size=block_size,
        max_keys=P * page_size,
    )
    return _at_least_eight(queries), ragged


def _at_least_eight(queries: Queries) -> Queries:
    """Padded to eight rows: no tile is smaller."""
    missing = max(SUBLANES - queries.q.shape[0], 0)
    return queries.map(lambda x: jnp.pad(x, ((0, missing), *((0, 0),) * (x.ndim - 1))))
