"""The operands of a call as the kernels take them: R sequences, each with its rows of queries and its blocks of keys.

A batch, a packed batch whose keys were moved so that sequences begin with a block, and requests in pages are one thing
to the stages. What is known when tracing, where the rows of a batch lie, stays in NumPy.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from hisa_jax.kernels_pallas.mosaic_tpu.config import GROUP, SUBLANES
from hisa_jax.kernels_pallas.sequences import Rows, whole_blocks
from hisa_jax.layout import Call, Keys, Queries

_CHUNK = 2048  # keys that are moved at a time
_MOST_QUERIES = 32  # of a tile


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ragged:
    """R sequences.

    Attributes:
        keys: of all sequences, in pages: [N, page_size, D] and [N, page_size]. Keys in a row are pages of a block each.
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
            return rows // max(self.query_starts[1].item(), 1)
        # The default search is a loop; R comparisons a row are one fused operation.
        r = jnp.searchsorted(self.query_starts[1:], rows, side="right", method="compare_all").astype(jnp.int32)
        return jnp.minimum(r, self.R - 1)

    def of_rows(self, x: Rows, T: int) -> Array:
        """[R] of sequences -> [T], of the sequence of each row of queries."""
        return jnp.asarray(x)[self.sequence_of(jnp.arange(T, dtype=jnp.int32))]

    def page_index(self, block_ids: Array, rows: Rows) -> Array:
        """[n, m] int32 blocks that queries at `rows` [n] keep -> [n, m * per_block] int32, where `keys` holds them."""
        r = self.sequence_of(rows)[:, None]
        if self.table is None:
            assert self.first_blocks is not None
            return jnp.asarray(self.first_blocks[r] + block_ids)
        logical = block_ids[..., None] * self.per_block + jnp.arange(self.per_block, dtype=jnp.int32)
        logical = jnp.clip(logical.reshape(block_ids.shape[0], -1), 0, self.table.shape[1] - 1)
        return self.table[r, logical]


def of_call(call: Call, block_size: int, means: Array | None = None) -> tuple[Queries, Ragged]:
    """The rows of queries of a call, eight at least if they are not of a batch, and its sequences.

    Args:
        means: [B, n, D] float32, kept means of a batch.
    """
    if call.table is not None:
        return _at_least_eight(call.queries), _paged(call, block_size)
    if call.key_offsets is not None:
        return _at_least_eight(call.queries), _packed(call, block_size)
    assert call.k is not None
    (B, T), keys = call.shape, in_blocks(*call.k, block_size)
    n_tokens = jnp.full((B,), call.max_keys, jnp.int32) if call.lengths is None else call.lengths
    n_tokens = jnp.clip(n_tokens, 0, call.max_keys)
    n_blocks = keys.values.shape[0] // B
    batch = Ragged(
        keys=keys,
        query_starts=call.query_starts,
        lengths=n_tokens,
        first_blocks=np.arange(B, dtype=np.int32) * n_blocks,
        table=None,
        means=means,
        block_size=block_size,
        max_keys=n_blocks * block_size,
    )
    seen = jnp.minimum(call.visible, n_tokens[:, None]).reshape(B * T)
    return call.queries._replace(visible=seen), batch


def in_blocks(k: Array, k_scale: Array | None, block_size: int) -> Keys:
    """[B, S, D], [B, S] or None -> Keys of [B * n, block_size, D], n a multiple of GROUP."""
    k, k_scale = whole_blocks(k, k_scale, GROUP * block_size)
    blocks = k.reshape(-1, block_size, k.shape[2])
    return Keys(blocks, None if k_scale is None else k_scale.reshape(-1, block_size))


def _packed(call: Call, block_size: int) -> Ragged:
    """Keys are copied once, so that every sequence begins with a block."""
    assert call.query_offsets is not None and call.key_offsets is not None
    keys, offsets = call.keys, call.key_offsets
    N, R = keys.values.shape[0], call.n_sequences
    lengths = jnp.diff(offsets)
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
            part = lax.dynamic_slice_in_dim(x, offsets[r] + at, chunk)
            # What a sequence writes past its end, the next one overwrites.
            return lax.dynamic_update_slice_in_dim(out, part, starts[r] * block_size + at, axis=0)

        out = lax.fori_loop(0, ends[-1], one_chunk, jnp.zeros((rows, *x.shape[1:]), x.dtype))
        return out[: rows // block_size * block_size].reshape(-1, block_size, *x.shape[1:])

    return Ragged(
        keys=Keys(moved(keys.values), None if keys.scales is None else moved(keys.scales)),
        query_starts=call.query_offsets,
        lengths=lengths,
        first_blocks=starts,
        table=None,
        block_size=block_size,
        max_keys=N,
    )


def _paged(call: Call, block_size: int) -> Ragged:
    """Nothing is moved."""
    assert call.table is not None and call.cache is not None and call.query_offsets is not None
    cache, starts, (T,) = call.cache, call.query_offsets, call.shape
    per_block = block_size // cache.page_size
    table = jnp.clip(call.table, 0, cache.n_pages - 1)
    # The last query of a sequence sees the most.
    last = call.visible[jnp.clip(starts[1:] - 1, 0, T - 1)]
    return Ragged(
        keys=Keys(cache.keys, cache.scales),
        query_starts=starts,
        lengths=jnp.where(jnp.diff(starts) > 0, last, 0),
        first_blocks=None,
        table=jnp.pad(table, ((0, 0), (0, -table.shape[1] % per_block))),
        page_sums=cache.sums,
        block_size=block_size,
        max_keys=call.max_keys,
    )


def _at_least_eight(queries: Queries) -> Queries:
    """Padded to eight rows: no tile is smaller."""
    missing = max(SUBLANES - queries.q.shape[0], 0)
    return jax.tree.map(lambda x: jnp.pad(x, ((0, missing), *((0, 0),) * (x.ndim - 1))), queries)
