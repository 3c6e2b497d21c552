"""The cache of an indexer of the table: its keys in pages, and the rows that unfinished entries are made of."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

import hisa_jax as hj
from hisa_jax import checks
from hisa_jax.models.cache import Packing
from hisa_jax.models.indexers import pieces
from hisa_jax.models.indexers.pieces import Rows


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class IndexerCache:
    """B sequences.

    Attributes:
        pages: keys, an entry each; a key is written when its entry's last token arrives.
        tables: [B, P] int32, the pages of each sequence.
        lengths: [B] int32, tokens of each.
        rows: [B, n, ...] each, of the last n tokens, the last of them last: what their keys will be made of. Nothing
            where a key is of one token.
        room: tokens that may be taken back at a time, static.
    """

    pages: hj.IndexCache
    tables: Array
    lengths: Array
    rows: Rows
    room: int = dataclasses.field(default=0, metadata=dict(static=True))

    @classmethod
    def empty(
        cls, batch: int, capacity: int, row: dict[str, Any], n_rows: int, *, entry_size: int, page_size: int, D: int,
        dtype: Any, room: int,
    ) -> "IndexerCache":  # fmt: skip
        """As `Indexer.init_cache` has it; `row`: shape and dtype of a token's rows, [B, 1, ...] each."""
        for name, size in (("batch", batch), ("capacity", capacity), ("page_size", page_size)):
            checks.integer("Indexer.init_cache", name, size, 1)
        checks.integer("Indexer.init_cache", "room", room, 0)
        P = -(-capacity // (page_size * entry_size))
        return cls(
            pages=hj.init_cache(batch * P, page_size, D, dtype, entry_size=entry_size),
            tables=jnp.arange(batch * P, dtype=jnp.int32).reshape(batch, P),
            lengths=jnp.zeros((batch,), jnp.int32),
            rows={name: jnp.zeros((batch, n_rows, *x.shape[2:]), x.dtype) for name, x in row.items()},
            room=room,
        )

    def appended(
        self, new: Rows, local: Array, keys_of: Callable[[Rows, Array], Array], order: Packing, window: int
    ) -> tuple["IndexerCache", Array]:
        """With new tokens, and what would be their keys.

        Args:
            new: [B, T, ...] each.
            local: [B, T] int32, which of a sequence's new tokens each is, from 0; -1: padding.
            keys_of: (rows of windows [B, T, window, ...] each, which there are [B, T, window]) -> [B, T, D].
            order: packs the real tokens.
            window: tokens that a key is made of.

        Returns: the cache; [B, T, D], in the order of `new`: an entry's key stands at its last token.
        """
        T = local.shape[1]
        n_old = next((x.shape[1] for x in self.rows.values()), 0)
        ordered = pieces.in_order(new, local, T)
        old = self.rows or {name: x[:, :0] for name, x in ordered.items()}
        both = {name: jnp.concatenate([old[name], x], axis=1) for name, x in ordered.items()}
        # The window that ends at a token, in `both`; a sequence's first tokens have none before them.
        ends = n_old + jnp.maximum(local, 0)
        members = ends[:, :, None] - (window - 1) + jnp.arange(window, dtype=jnp.int32)[None, None, :]
        position = self.lengths[:, None, None] + members - n_old
        k = keys_of(pieces.at(both, members), (position >= 0) & (members >= 0))
        k = k.astype(self.pages.keys.dtype)
        pages = hj.append(self.pages, order.pack(k), self.tables, order.cu_seqlens, self.lengths)
        n_new = jnp.diff(order.cu_seqlens)
        kept = n_new[:, None] + jnp.arange(n_old, dtype=jnp.int32)[None, :]
        rows = {name: pieces.at(both[name], kept) for name in self.rows}
        return dataclasses.replace(self, pages=pages, lengths=self.lengths + n_new, rows=rows), k

    def truncate(self, lengths: Array) -> "IndexerCache":
        """With the last tokens of sequences taken away, of which `lengths` [B] int32 are left, at most `room` less."""
        room = max(self.room, 1)
        pages = hj.truncate(self.pages, self.tables, self.lengths, lengths, max_tokens=room)
        lost = self.lengths - lengths
        rows = {
            name: pieces.at(x, jnp.arange(x.shape[1], dtype=jnp.int32)[None, :] - lost[:, None])
            for name, x in self.rows.items()
        }
        return dataclasses.replace(self, pages=pages, lengths=lengths, rows=rows)
