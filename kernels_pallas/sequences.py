"""Where the rows of a batch lie in the flat arrays that kernels take: [T, H, D] queries, [S, D] keys.

Batches and packed batches are one thing to the kernels: R sequences, each with its rows of queries and its rows of
keys. What is known when tracing stays in NumPy, so that a batch costs no kernel to find its rows.
"""

import dataclasses
from collections.abc import Callable
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

Rows = Array | np.ndarray


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sequences:
    """R sequences in flat arrays.

    Attributes:
        query_starts: [R + 1] int32, ascending, first row of each sequence's queries; rows behind the last are nobody's.
        key_starts: [R] int32, ascending, row of each sequence's first key.
        lengths: [R] int32, tokens present in each sequence.
        max_keys: static bound on the rows of keys of one sequence.
    """

    query_starts: Rows
    key_starts: Rows
    lengths: Rows
    max_keys: int

    @property
    def _np(self) -> ModuleType:
        """What works out the rows: NumPy, when tracing, or JAX, when running."""
        return np if isinstance(self.query_starts, np.ndarray) else jnp

    def blocks(self, block_size: int) -> "Sequences":
        """The same sequences with blocks for tokens; they begin with a block."""
        return dataclasses.replace(
            self,
            key_starts=self.key_starts // block_size,
            lengths=-(-self.lengths // block_size),
            max_keys=-(-self.max_keys // block_size),
        )

    def aligned(self, S: int, align: int) -> "tuple[Rows | None, Sequences]":
        """Moves keys so that every sequence begins at a multiple of `align` rows, and S is one.

        Returns: which row of [S, D] belongs in each row, None if all are there already; the sequences as they then are.
        """
        if isinstance(self.key_starts, np.ndarray) and not np.any(self.key_starts % align) and S % align == 0:
            return None, self
        xp, R = self._np, len(self.key_starts)
        n_groups = -(-(self.lengths if xp is jnp else np.full((R,), self.max_keys, np.int32)) // align)
        ends = xp.cumsum(n_groups)
        # Each sequence ends in at most one partial group, so this many hold all.
        group = xp.arange(int(ends[-1]) if xp is np else S // align + R, dtype=np.int32)
        r = xp.minimum(_count_up_to(ends, group), R - 1)
        first = self.key_starts[r] + (group - (ends - n_groups)[r]) * align
        rows = xp.clip(first[:, None] + xp.arange(align, dtype=np.int32), 0, S - 1).reshape(-1)
        return rows, dataclasses.replace(self, key_starts=((ends - n_groups) * align).astype(np.int32))

    def key_start_of_queries(self, T: int) -> Array:
        """[T] int32: the first key of each query's sequence."""
        xp = self._np
        r = _count_up_to(self.query_starts[1:], xp.arange(T, dtype=np.int32))
        return jnp.asarray(xp.asarray(self.key_starts)[xp.minimum(r, len(self.key_starts) - 1)], jnp.int32)

    def tokens_in_blocks(self, S: int, block_size: int) -> Rows:
        """[S // block_size] int32: tokens present in each block of rows; sequences begin with a block."""
        xp = self._np
        first = xp.arange(S // block_size, dtype=np.int32) * block_size
        r = xp.maximum(_count_up_to(self.key_starts, first) - 1, 0)
        return (self.lengths[r] - (first - self.key_starts[r])).clip(0, block_size).astype(np.int32)

    def query_tiles(self, T: int, tile_t: int, limit: Array, multiple: int = 1) -> Array:
        """[n_tiles, 4] int32: first query, how many, first key row, most candidates any of them has.

        Args:
            tile_t: queries of a tile, all of one sequence.
            limit: [T] int32, candidates of each query.
            multiple: what the last column is rounded up to.
        """
        if tile_t == 1:
            most = -(-limit // multiple) * multiple
            first = jnp.arange(T, dtype=jnp.int32)
            return jnp.stack([first, jnp.ones_like(first), self.key_start_of_queries(T), most], axis=1)
        xp, R = self._np, len(self.key_starts)
        n_tiles = -(-xp.diff(self.query_starts) // tile_t)
        ends = xp.cumsum(n_tiles)
        # Each sequence ends in at most one partial tile.
        tile = xp.arange(int(ends[-1]) if xp is np else T // tile_t + R, dtype=np.int32)
        r = xp.minimum(_count_up_to(ends, tile), R - 1)
        first = self.query_starts[r] + (tile - (ends - n_tiles)[r]) * tile_t
        n = xp.clip(self.query_starts[r + 1] - first, 0, tile_t)
        rows = first[:, None] + xp.arange(tile_t, dtype=np.int32)
        most = jnp.max(jnp.where(rows < (first + n)[:, None], limit[xp.clip(rows, 0, T - 1)], 0), axis=1)
        most = -(-most // multiple) * multiple
        return jnp.stack([jnp.asarray(x, jnp.int32) for x in (first, n, xp.asarray(self.key_starts)[r], most)], axis=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlatCall:
    """The operands of one call in flat arrays: `q` [T, H, D], `k` [S, D], `k_scale` [S] or None, `w` [T, H],
    `visible` [T] int32, and what to give the results' rows, `shape`, in place of [T]."""

    q: Array
    k: Array
    k_scale: Array | None
    w: Array
    visible: Array
    sequences: Sequences
    shape: tuple[int, ...]

    def map_queries(self, f: "Callable[[FlatCall], tuple[Array, ...]]", size: int) -> tuple[Array, ...]:
        """f over `size` queries at a time, which bounds the memory of what f makes of a query."""
        T = self.q.shape[0]
        if size >= T:
            return f(self)
        n = -(-T // size)

        def threshold(x: Array) -> Array:
            return jnp.pad(x, ((0, n * size - T),) + ((0, 0),) * (x.ndim - 1)).reshape(n, size, *x.shape[1:])

        def one(rows: tuple[Array, ...]) -> tuple[Array, ...]:
            first, q, w, visible = rows
            sequences = Sequences(
                query_starts=jnp.clip(jnp.asarray(self.sequences.query_starts) - first, 0, size),
                key_starts=jnp.asarray(self.sequences.key_starts),
                lengths=jnp.asarray(self.sequences.lengths),
                max_keys=self.sequences.max_keys,
            )
            return f(dataclasses.replace(self, q=q, w=w, visible=visible, sequences=sequences))

        firsts = jnp.arange(n, dtype=jnp.int32) * size
        out = lax.map(one, (firsts, threshold(self.q), threshold(self.w), threshold(self.visible)))
        return jax.tree.map(lambda x: x.reshape(n * size, *x.shape[2:])[:T], out)

    def unflatten(self, *results: Array) -> tuple[Array, ...]:
        """[T, ...] each -> [B, T, ...] for a batch."""
        return tuple(x.reshape(*self.shape, *x.shape[1:]) for x in results)


def _count_up_to(ascending: Rows, x: Rows) -> Rows:
    """[R], [n] -> [n] int32: how many are not above x."""
    if isinstance(ascending, np.ndarray) and isinstance(x, np.ndarray):
        return np.searchsorted(ascending, x, side="right").astype(np.int32)
    # A search would be a loop of tiny kernels on a GPU.
    return jnp.searchsorted(ascending, x, side="right", method="compare_all").astype(jnp.int32)


def whole_blocks(k: Array, k_scale: Array | None, block_size: int) -> tuple[Array, Array | None]:
    """Pads [B, S, D] and [B, S] with zeros to a multiple of `block_size` tokens."""
    if missing := -k.shape[1] % block_size:
        k = jnp.pad(k, ((0, 0), (0, missing), (0, 0)))
        k_scale = None if k_scale is None else jnp.pad(k_scale, ((0, 0), (0, missing)))
    return k, k_scale


def flatten_batch(
    q: Array, k: Array, k_scale: Array | None, w: Array, visible: Array, lengths: Array | None, align: int
) -> FlatCall:
    """[B, T, H, D], [B, S, D], [B, S], [B, T, H], [B, T], [B] or None (all S): keys padded to `align` rows each."""
    (B, T, H, D), S = q.shape, k.shape[1]
    k, k_scale = whole_blocks(k, k_scale, align)
    rows = k.shape[1]
    return FlatCall(
        q=q.reshape(B * T, H, D),
        k=k.reshape(B * rows, D),
        k_scale=None if k_scale is None else k_scale.reshape(B * rows),
        w=w.reshape(B * T, H),
        visible=visible.reshape(B * T),
        sequences=Sequences(
            query_starts=np.arange(B + 1, dtype=np.int32) * T,
            key_starts=np.arange(B, dtype=np.int32) * rows,
            lengths=np.full((B,), S, np.int32) if lengths is None else lengths,
            max_keys=S,
        ),
        shape=(B, T),
    )


def flatten_packed(
    q: Array,
    k: Array,
    k_scale: Array | None,
    w: Array,
    visible: Array,
    cu_seqlens_q: Array,
    cu_seqlens_k: Array,
    align: int,
) -> FlatCall:
    """[T, H, D], [N, D], [N], [T, H], [T], [R + 1], [R + 1]: keys moved so that sequences begin at `align` rows.

    One copy of the keys, N rows and up to `align` more a sequence; nothing is padded to the longest sequence.
    """
    N = k.shape[0]
    packed = Sequences(
        query_starts=cu_seqlens_q, key_starts=cu_seqlens_k[:-1], lengths=jnp.diff(cu_seqlens_k), max_keys=N
    )
    rows, sequences = packed.aligned(N, align)
    return FlatCall(
        q=q,
        k=k[rows],
        k_scale=None if k_scale is None else k_scale[rows],
        w=w,
        visible=visible,
        sequences=sequences,
        shape=q.shape[:1],
    )
