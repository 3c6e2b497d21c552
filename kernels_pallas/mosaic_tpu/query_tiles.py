"""Tiles of queries, each of one sequence: which rows are in them, and where the keys of their sequences lie.

A batch is cut into the tiles of each sequence one after the other, which is known when tracing. Of other sequences the
lengths are known only at run time, so the grid has at most one idle step a sequence.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from hisa_jax.kernels_pallas.mosaic_tpu.ragged import Ragged
from hisa_jax.kernels_pallas.sequences import Rows

_STATIC = {"static": True}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchTiles:
    """Tiles of a batch of [B, T] queries, whose sequences have `n_blocks` blocks of keys each, one after the other."""

    B: int = dataclasses.field(metadata=_STATIC)
    T: int = dataclasses.field(metadata=_STATIC)
    multiple: int = dataclasses.field(metadata=_STATIC)  # queries that each sequence is padded to
    n_blocks: int = dataclasses.field(metadata=_STATIC)

    def gather(self, x: Array) -> Array:
        """[B * T, ...] -> [B, whole tiles, ...], padded with zeros."""
        x = x.reshape(self.B, self.T, *x.shape[1:])
        return jnp.pad(x, ((0, 0), (0, -self.T % self.multiple), *((0, 0),) * (x.ndim - 2)))

    def scatter(self, x: Array) -> Array:
        """[B, whole tiles, ...] -> [B * T, ...]."""
        return x[:, : self.T].reshape(self.B * self.T, *x.shape[2:])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class RaggedTiles:
    """Tiles of queries that are windows of q.

    Attributes:
        first: [tiles] int32, row of each tile's first query.
        sequence: [tiles] int32, -1 for no tile.
        row_of_slot: [tiles * tile_t] int32, the row at each slot of the tiles, T where there is none.
        slot_of_row: [T] int32, the slot of each row that is in a tile.
        first_blocks: [R] int32, first block of each sequence; None for sequences in pages.
        n_pages: [R] int32, pages of each sequence that hold a token; table: [R, P] int32, those pages. None for blocks
            in a row.
        per_block: pages of a block.
    """

    first: Array
    sequence: Array
    row_of_slot: Array
    slot_of_row: Array
    first_blocks: Array | None
    n_pages: Array | None
    table: Array | None
    per_block: int = dataclasses.field(metadata=_STATIC)

    def gather(self, x: Array) -> Array:
        """[T, ...] -> [1, tiles * tile_t, ...], zeros where there is no row."""
        return x.at[self.row_of_slot].get(mode="fill", fill_value=0)[None]

    def scatter(self, x: Array) -> Array:
        """[1, tiles * tile_t, ...] -> [T, ...], anything in rows that are in no tile."""
        return x[0][self.slot_of_row]

    def cut(self, tile_t: int) -> "RaggedTiles":
        """The same slots in tiles of `tile_t`, a divisor of what they have; without a query they are of no sequence."""
        n = len(self.row_of_slot) // tile_t // len(self.first)
        has_query = jnp.any(self.row_of_slot.reshape(-1, tile_t) < len(self.slot_of_row), axis=1)
        return dataclasses.replace(
            self,
            first=(self.first[:, None] + tile_t * jnp.arange(n, dtype=jnp.int32)).reshape(-1),
            sequence=jnp.where(has_query, jnp.repeat(self.sequence, n), -1),
        )


Tiles = BatchTiles | RaggedTiles


def split(ragged: Ragged, T: int, wanted: Rows, least: int, tile_t: int, n_cores: int) -> Tiles:
    """Tiles of the queries of the sequences that are `wanted` [R]; of a batch of all.

    Args:
        T: rows of queries, of ragged sequences at least tile_t; least: queries that a wanted sequence has at least.
        tile_t: queries of a tile; n_cores: that share the tiles.
    """
    if ragged.is_batch:
        return BatchTiles(B=ragged.R, T=T // ragged.R, multiple=tile_t * n_cores, n_blocks=ragged.most_blocks)
    starts, R = ragged.query_starts[:-1], ragged.R
    n_tiles = -(-jnp.where(wanted, ragged.n_queries, 0) // tile_t)
    ends = jnp.cumsum(n_tiles)
    before = ends - n_tiles
    # Each of those sequences ends in at most one partial tile.
    per_core = max(-(-(T // tile_t + min(R, T // least)) // n_cores), 1)
    used = -(-ends[-1] // n_cores)  # of a core's tiles
    step = jnp.arange(per_core * n_cores, dtype=jnp.int32)
    tile = step // per_core * used + step % per_core
    is_tile = (step % per_core < used) & (tile < ends[-1])
    # Where there is no tile, the last one's queries again: nothing is copied.
    tile = jnp.minimum(tile, ends[-1] - 1)
    r = jnp.minimum(jnp.searchsorted(ends, tile, side="right", method="compare_all").astype(jnp.int32), R - 1)
    own = starts[r] + (tile - before[r]) * tile_t
    first = jnp.clip(own, 0, T - tile_t)  # the last tiles are moved back to end with the queries
    row = first[:, None] + jnp.arange(tile_t, dtype=jnp.int32)
    is_row = is_tile[:, None] & (row >= own[:, None]) & (row < ragged.query_starts[r + 1][:, None])
    every = jnp.arange(T, dtype=jnp.int32)
    r_of = ragged.sequence_of(every)
    tile_of = before[r_of] + (every - starts[r_of]) // tile_t
    used = jnp.maximum(used, 1)
    step_of = jnp.clip(tile_of // used * per_core + tile_of % used, 0, step.shape[0] - 1)
    is_paged = ragged.table is not None
    return RaggedTiles(
        first=first,
        sequence=jnp.where(is_tile, r, -1),
        row_of_slot=jnp.where(is_row, row, T).reshape(-1),
        slot_of_row=step_of * tile_t + jnp.clip(every - first[step_of], 0, tile_t - 1),
        first_blocks=None if is_paged else jnp.asarray(ragged.first_blocks),
        n_pages=-(-ragged.lengths // ragged.keys.values.shape[1]) if is_paged else None,
        table=ragged.table,
        per_block=ragged.per_block,
    )


def of_sequences(ragged: Ragged, n_tokens: Array) -> RaggedTiles:
    """A tile for each sequence in pages that has one of its `n_tokens` [R]; without queries."""
    every, none = jnp.arange(ragged.R, dtype=jnp.int32), jnp.zeros((0,), jnp.int32)
    return RaggedTiles(
        first=jnp.zeros_like(every),
        sequence=jnp.where(n_tokens > 0, every, -1),
        row_of_slot=none,
        slot_of_row=none,
        first_blocks=None,
        n_pages=-(-n_tokens // ragged.keys.values.shape[1]),
        table=ragged.table,
        per_block=ragged.per_block,
    )


Found = tuple[Array, ...]  # [T, k] int32 each: the chosen, and maybe their sort keys


def few_rows(is_few: Array, most: int, is_batch: bool = False) -> tuple[Rows, Rows]:
    """The rows [T] that are marked, `most` at most: [n] int32, then T; and [T] int32, which of those each is.

    Of a batch all rows, in NumPy.
    """
    T = is_few.shape[0]
    if is_batch:
        return (np.arange(T, dtype=np.int32),) * 2
    if most >= T:
        every = jnp.arange(T, dtype=jnp.int32)
        return jnp.where(is_few, every, T), every
    nth = jnp.cumsum(is_few) - 1
    rows = jnp.nonzero(is_few, size=most, fill_value=T)[0].astype(jnp.int32)
    return rows, jnp.clip(nth, 0, most - 1)


def take[Tree](tree: Tree, rows: Rows) -> Tree:
    """Of arrays [T, ...] the rows [n], zeros where a row is T. Where those are all, only of [T] numbers."""

    def of(x: Array) -> Array:
        if isinstance(rows, np.ndarray):
            return x
        if len(rows) != len(x):
            return x.at[rows].get(mode="fill", fill_value=0)
        return jnp.where(rows < len(x), x, 0) if x.ndim == 1 else x

    return jax.tree.map(of, tree)


def put(found: Found, slot_of_row: Rows) -> Found:
    """What the rows that were taken have found, [n, ...], for all rows: [T, ...]."""
    return found if isinstance(slot_of_row, np.ndarray) else tuple(x[slot_of_row] for x in found)


def nothing_like(f: Callable[[], Found]) -> Callable[[], Found]:
    """A function that returns zeros of the shapes that f returns: the other branch of a `lax.cond`."""
    return lambda: tuple(jnp.zeros(x.shape, x.dtype) for x in jax.eval_shape(f))


def where_rows(is_first: Array, first: Found, second: Found) -> Found:
    """Of the marked rows [T] what `first` has, of the others what `second` has."""
    return tuple(jnp.where(is_first[:, None], x, y) for x, y in zip(first, second, strict=True))
