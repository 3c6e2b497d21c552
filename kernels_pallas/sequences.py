"""Where each sequence has its rows in the flat arrays that kernels take: [T, H, D] queries, [S, D] keys.

What is known when tracing stays in NumPy, so that a batch costs no kernel to find its rows.
"""

import dataclasses
from types import ModuleType

import jax.numpy as jnp
import numpy as np
from jax import Array

Rows = Array | np.ndarray


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sequences:
    """R sequences in flat arrays.

    Attributes:
        query_starts: [R + 1] int32, ascending, first row of each sequence's queries; rows after the last are padding.
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

    @property
    def is_one(self) -> bool:
        """Whether it is known when tracing that there is one sequence, whose keys begin with the first row."""
        return isinstance(self.key_starts, np.ndarray) and self.key_starts.tolist() == [0]

    @property
    def apart(self) -> int | None:
        """Rows from one sequence's first key to the next one's, if it is known when tracing that all are equal."""
        if not isinstance(self.key_starts, np.ndarray) or np.any(np.diff(self.key_starts, n=2)):
            return None
        first, *others = self.key_starts.tolist()
        return others[0] - first if others else 0

    def blocks(self, block_size: int) -> "Sequences":
        """The same sequences with blocks for tokens; they begin with a block."""
        return dataclasses.replace(
            self,
            key_starts=self.key_starts // block_size,
            lengths=-(-self.lengths // block_size),
            max_keys=-(-self.max_keys // block_size),
        )

    def from_query(self, first: Array, size: int) -> "Sequences":
        """The same of `size` queries from `first` on. All are those of one sequence if that alone is there."""
        if isinstance(self.query_starts, np.ndarray) and len(self.lengths) == 1:
            return dataclasses.replace(self, query_starts=np.array([0, size], np.int32))
        return Sequences(
            query_starts=jnp.clip(jnp.asarray(self.query_starts) - first, 0, size),
            key_starts=jnp.asarray(self.key_starts),
            lengths=jnp.asarray(self.lengths),
            max_keys=self.max_keys,
        )

    def aligned(self, S: int, align: int, step: int = 1) -> "tuple[Rows | None, Sequences]":
        """Moves keys so that every sequence begins at a multiple of `align` rows, and S is one.

        Args:
            step: of each sequence only every so many keys are taken.

        Returns: which row of [S, D] belongs in each row, None if all are there already; the sequences as they then are.
        """
        is_aligned = isinstance(self.key_starts, np.ndarray) and not np.any(self.key_starts % align)
        if is_aligned and S % align == 0 and step == 1:
            return None, self
        xp, R = self._np, len(self.key_starts)
        n_groups = -(-(self.lengths if xp is jnp else np.full((R,), self.max_keys, np.int32)) // (align * step))
        ends = xp.cumsum(n_groups)
        # Each sequence ends in at most one partial group, so this many hold all.
        group = xp.arange(int(ends[-1]) if xp is np else S // (align * step) + R, dtype=np.int32)
        r = xp.minimum(_count_up_to(ends, group), R - 1)
        first = xp.asarray(self.key_starts)[r] + (group - xp.asarray(ends - n_groups)[r]) * (align * step)
        rows = xp.clip(first[:, None] + step * xp.arange(align, dtype=np.int32), 0, S - 1).reshape(-1)
        taken = dataclasses.replace(
            self,
            key_starts=((ends - n_groups) * align).astype(np.int32),
            lengths=-(-self.lengths // step),
            max_keys=-(-self.max_keys // step),
        )
        return rows, taken

    def key_start_of_queries(self, T: int) -> Array:
        """[T] int32: the first key of each query's sequence."""
        xp = self._np
        r = xp.minimum(self.of_queries(T), len(self.key_starts) - 1)
        if self.apart is not None:
            # As those of requests in pages: arithmetic goes into other kernels, a look-up does not.
            return jnp.asarray(int(self.key_starts[0]) + r * self.apart, jnp.int32)
        return jnp.asarray(xp.asarray(self.key_starts)[r], jnp.int32)

    def of_queries(self, T: int) -> Rows:
        """[T] int32: which sequence each query is of; of padding, how many there are."""
        return _count_up_to(self.query_starts[1:], self._np.arange(T, dtype=np.int32))

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
        xp, (r, first_query, n) = self._np, self._tiles(T, tile_t)
        rows = first_query[:, None] + xp.arange(tile_t, dtype=np.int32)
        most = jnp.max(jnp.where(rows < (first_query + n)[:, None], limit[xp.clip(rows, 0, T - 1)], 0), axis=1)
        columns = first_query, n, xp.asarray(self.key_starts)[r], -(-most // multiple) * multiple
        return jnp.stack([jnp.asarray(x, jnp.int32) for x in columns], axis=1)

    def rows_of_tiles(self, T: int, tile_t: int) -> tuple[Rows, Rows]:
        """What tiles of queries hold: [n_tiles * tile_t] int32, T for none; and where each query is: [T] int32."""
        xp, (_, first, n) = self._np, self._tiles(T, tile_t)
        place = xp.arange(tile_t, dtype=np.int32)
        queries = xp.where(place < n[:, None], first[:, None] + place, T).reshape(-1).astype(np.int32)
        places = xp.arange(len(queries), dtype=np.int32)
        if not isinstance(queries, np.ndarray):
            return queries, jnp.zeros((T + 1,), jnp.int32).at[queries].set(places)[:T]
        where = np.zeros((T + 1,), np.int32)
        where[queries] = places
        return queries, where[:T]

    def _tiles(self, T: int, tile_t: int) -> tuple[Rows, Rows, Rows]:
        """Of each tile its sequence, its first query and how many it has: [n_tiles] int32 each."""
        xp, R = self._np, len(self.key_starts)
        n_tiles = -(-xp.diff(self.query_starts) // tile_t)
        ends = xp.cumsum(n_tiles)
        # Each sequence ends in at most one partial tile, and none has a tile without a query.
        tile = xp.arange(int(ends[-1]) if xp is np else min(T // tile_t + R, T), dtype=np.int32)
        r = xp.minimum(_count_up_to(ends, tile), R - 1)
        first = self.query_starts[r] + (tile - (ends - n_tiles)[r]) * tile_t
        return r, first, xp.clip(self.query_starts[r + 1] - first, 0, tile_t)


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
