"""Ragged sequences: where their keys lie, and tiles of their queries.

A packed batch, whose keys were moved so that sequences begin with a block, and requests in pages are one thing to the
kernels: R sequences, each with its rows of queries, and blocks that are found in a row or through a table.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array, lax


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["first", "sequence", "rows", "places", "keys", "table"],
    meta_fields=["per_block"],
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class RaggedTiles:
    """Tiles of queries, each of one sequence, and where that one's keys lie.

    Attributes:
        first: [tiles] int32, row of each tile's first query.
        sequence: [tiles] int32, -1 for no tile.
        rows: [tiles * tile_t] int32, the row at each place of the tiles, T where there is none.
        places: [T] int32, where the tiles have each row that is in one.
        keys: [R] int32, first block of each sequence, or how many pages it has.
        table: [R, P] int32, those pages; None: blocks in a row.
        per_block: pages of a block.
    """

    first: Array
    sequence: Array
    rows: Array
    places: Array
    keys: Array
    table: Array | None
    per_block: int

    @classmethod
    def of_sequences(cls, n_tokens: Array, table: Array, page_size: int, per_block: int) -> "RaggedTiles":
        """A tile for each of R sequences that have a token; without queries."""
        every, none = jnp.arange(n_tokens.shape[0], dtype=jnp.int32), jnp.zeros((0,), jnp.int32)
        return cls(
            first=jnp.zeros_like(every),
            sequence=jnp.where(n_tokens > 0, every, -1),
            rows=none,
            places=none,
            keys=-(-n_tokens // page_size),
            table=table,
            per_block=per_block,
        )

    def gather(self, x: Array) -> Array:
        """[T, ...] -> [1, tiles * tile_t, ...], zeros where there is no row."""
        return x.at[self.rows].get(mode="fill", fill_value=0)[None]

    def scatter(self, x: Array) -> Array:
        """[1, tiles * tile_t, ...] -> [T, ...], anything in rows that are in no tile."""
        return x[0][self.places]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ragged:
    """R sequences.

    Attributes:
        k: [1, n, block_size, D], or pages [N, page_size, D]; k_scale: [1, n, block_size] or [N, page_size], or None.
        query_starts: [R + 1] int32, ascending; the rows behind the last are nobody's.
        lengths: [R] int32, tokens that some query of the sequence sees, or more.
        keys: [R] int32, the block that each sequence begins with, or None: those in pages.
        table: [R, P] int32, pages of each sequence, all of them in [0, N); None: blocks in a row.
        block_size: tokens; max_keys: static bound on the tokens of a sequence.
    """

    k: Array
    k_scale: Array | None
    query_starts: Array
    lengths: Array
    keys: Array | None
    table: Array | None
    block_size: int
    max_keys: int

    @property
    def per_block(self) -> int:
        return 1 if self.table is None else self.block_size // self.k.shape[1]

    @property
    def max_blocks(self) -> int:
        return -(-self.max_keys // self.block_size)

    @property
    def n_queries(self) -> Array:
        """[R] int32."""
        return jnp.diff(self.query_starts)

    def sequence_of(self, rows: Array) -> Array:
        """[n] int32 rows of queries -> the sequence of each."""
        r = jnp.searchsorted(self.query_starts[1:], rows, side="right", method="compare_all").astype(jnp.int32)
        return jnp.minimum(r, self.lengths.shape[0] - 1)

    def places(self, block_ids: Array, rows: Array) -> Array:
        """[n, m] int32 blocks that queries at `rows` [n] keep -> [n, m * per_block] int32, where k holds them."""
        r = self.sequence_of(rows)[:, None]
        if self.table is None:
            assert self.keys is not None
            return self.keys[r] + block_ids
        pages = block_ids[..., None] * self.per_block + jnp.arange(self.per_block, dtype=jnp.int32)
        pages = jnp.clip(pages.reshape(block_ids.shape[0], -1), 0, self.table.shape[1] - 1)
        return self.table[r, pages]

    def tiles(self, T: int, wanted: Array, least: int, tile_t: int, n_cores: int) -> RaggedTiles:
        """Tiles of the queries of the sequences that are `wanted` [R].

        Args:
            T: rows of queries, at least tile_t; least: queries that a wanted sequence has at least.
        """
        starts, R = self.query_starts[:-1], self.lengths.shape[0]
        n_tiles = -(-jnp.where(wanted, self.n_queries, 0) // tile_t)
        ends = jnp.cumsum(n_tiles)
        before = ends - n_tiles
        # Each of those sequences ends in at most one partial tile.
        per_core = max(-(-(T // tile_t + min(R, T // least)) // n_cores), 1)
        used = -(-ends[-1] // n_cores)  # of a core's tiles
        slot = jnp.arange(per_core * n_cores, dtype=jnp.int32)
        tile = slot // per_core * used + slot % per_core
        is_tile = (slot % per_core < used) & (tile < ends[-1])
        # Where there is no tile, the last one's queries again: nothing is copied.
        tile = jnp.minimum(tile, ends[-1] - 1)
        r = jnp.minimum(jnp.searchsorted(ends, tile, side="right", method="compare_all").astype(jnp.int32), R - 1)
        own = starts[r] + (tile - before[r]) * tile_t
        first = jnp.clip(own, 0, T - tile_t)  # the last tiles are moved back to end with the queries
        row = first[:, None] + jnp.arange(tile_t, dtype=jnp.int32)
        is_row = is_tile[:, None] & (row >= own[:, None]) & (row < self.query_starts[r + 1][:, None])
        every = jnp.arange(T, dtype=jnp.int32)
        r_of = self.sequence_of(every)
        tile_of = before[r_of] + (every - starts[r_of]) // tile_t
        used = jnp.maximum(used, 1)
        slot_of = jnp.clip(tile_of // used * per_core + tile_of % used, 0, slot.shape[0] - 1)
        return RaggedTiles(
            first=first,
            sequence=jnp.where(is_tile, r, -1),
            rows=jnp.where(is_row, row, T).reshape(-1),
            places=slot_of * tile_t + jnp.clip(every - first[slot_of], 0, tile_t - 1),
            keys=-(-self.lengths // self.k.shape[1]) if self.keys is None else self.keys,
            table=self.table,
            per_block=self.per_block,
        )


def few_rows(is_few: Array, most: int) -> tuple[Array, Array]:
    """The rows [T] that are marked, `most` at most: [n] int32, T behind them; and [T] int32, where each of them is."""
    T = is_few.shape[0]
    if most >= T:
        every = jnp.arange(T, dtype=jnp.int32)
        return jnp.where(is_few, every, T), every
    nth = jnp.cumsum(is_few) - 1
    rows = jnp.nonzero(is_few, size=most, fill_value=T)[0].astype(jnp.int32)
    return rows, jnp.clip(nth, 0, most - 1)


def either(wanted: Array, is_first: Array, first: Callable[[], Array], second: Callable[[], Array]) -> Array:
    """[T, n] int32: of the marked rows [T] what `first` gives, of the others what `second` gives.

    Neither is called where it has no row that is `wanted`; the other rows get anything.
    """
    shape = jax.eval_shape(first).shape

    def nothing() -> Array:
        return jnp.zeros(shape, jnp.int32)

    of_first = lax.cond(jnp.any(wanted & is_first), first, nothing)
    return jnp.where(is_first[:, None], of_first, lax.cond(jnp.any(wanted & ~is_first), second, nothing))
