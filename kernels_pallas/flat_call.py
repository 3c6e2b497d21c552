"""A call as kernels take it: flat arrays in which every sequence begins with a whole block of keys."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from hisa_jax.kernels_pallas.operands import Operands
from hisa_jax.kernels_pallas.pages import TILED_BLOCKS, Pages, why_not
from hisa_jax.kernels_pallas.sequences import Sequences, whole_blocks
from hisa_jax.layout import Call, Sketched


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlatCall:
    """The operands of the stages.

    Attributes:
        q: [T, H, D]; w: [T, H] float32; visible: [T] int32, tokens of its sequence that a query sees.
        k: [S, D]; k_scale: [S] float32, or None where every scale is 1.
        sequences: whose rows of queries and keys these are.
        pages: where the keys of those rows are in k; None: in these rows.
        sketch: what is scanned in place of k, row by row; None: k.
    """

    q: Array
    w: Array
    visible: Array
    k: Array
    k_scale: Array | None
    sequences: Sequences
    pages: Pages | None = None
    sketch: Sketched | None = None

    @property
    def operands(self) -> Operands:
        return Operands(self.q, self.w, self.k, self.k_scale, self.pages)

    def first_blocks(self, block_size: int) -> Array:
        """[T] int32: which block of all rows is the first of each query's sequence."""
        return self.sequences.blocks(block_size).key_start_of_queries(self.q.shape[0])

    def map_queries(self, f: "Callable[..., tuple[Array, ...]]", size: int, *rows: Array) -> tuple[Array, ...]:
        """f over `size` queries at a time, which bounds the memory of what f makes of a query.

        Args:
            f: of some queries, as a call, and their rows of `rows`.
        """
        T, sequences = self.q.shape[0], self.sequences
        n = -(-T // size)
        if n <= 1:
            return f(self, *rows)

        def chunks(x: Array) -> Array:
            return jnp.pad(x, ((0, n * size - T),) + ((0, 0),) * (x.ndim - 1)).reshape(n, size, *x.shape[1:])

        def one(some: tuple[Array, ...]) -> tuple[Array, ...]:
            first, q, w, visible, *rows = some
            own = sequences.from_query(first, size)
            return f(dataclasses.replace(self, q=q, w=w, visible=visible, sequences=own), *rows)

        firsts = jnp.arange(n, dtype=jnp.int32) * size
        out = lax.map(one, (firsts, *map(chunks, (self.q, self.w, self.visible, *rows))))
        return jax.tree.map(lambda x: x.reshape(n * size, *x.shape[2:])[:T], out)


def flatten(call: Call, align: int) -> FlatCall:
    """Keys in rows, where every sequence begins at a multiple of `align` rows.

    A batch is padded to whole blocks. Packed keys are moved: one copy of N rows, and up to `align` more a sequence.
    Of pages nothing is copied: the sequences speak of rows of the requests, which `pages` maps to those of the pages.
    """
    if call.table is not None:
        return _in_pages(call, align)
    q, w, visible = call.queries
    k, k_scale = call.keys
    if call.query_offsets is None:
        assert call.k is not None
        k, k_scale = whole_blocks(*call.k, align)
        (B, rows, D), S = k.shape, call.max_keys
        k, k_scale = k.reshape(B * rows, D), None if k_scale is None else k_scale.reshape(B * rows)
        sequences = Sequences(
            query_starts=call.query_starts,
            key_starts=np.arange(B, dtype=np.int32) * rows,
            lengths=np.full((B,), S, np.int32) if call.lengths is None else call.lengths,
            max_keys=S,
        )
    else:
        assert call.lengths is not None
        N = k.shape[0]
        packed = Sequences(query_starts=call.query_starts, key_starts=call.key_starts, lengths=call.lengths, max_keys=N)
        moved, sequences = packed.aligned(N, align)
        k, k_scale = k[moved], None if k_scale is None else k_scale[moved]
    return FlatCall(q=q, w=w, visible=visible, k=k, k_scale=k_scale, sequences=sequences)


def _in_pages(call: Call, align: int) -> FlatCall:
    cache, table = call.cache, call.table
    assert cache is not None and table is not None
    (R, P), size = table.shape, cache.page_size
    if reason := why_not(R, P * size, align):
        raise ValueError(f"block_tables is [{R}, {P}] with pages of {size}: {reason}")
    table = jnp.pad(table, ((0, 0), (0, -P % (TILED_BLOCKS * align // size))))
    (q, w, visible), (k, k_scale) = call.queries, call.keys
    sequences = Sequences(
        query_starts=call.query_starts,
        key_starts=np.arange(R, dtype=np.int32) * (table.shape[1] * size),
        lengths=np.full((R,), P * size, np.int32),
        max_keys=P * size,
    )
    pages = Pages(table=table.reshape(-1), size=size, n_pages=cache.n_pages)
    return FlatCall(q=q, w=w, visible=visible, k=k, k_scale=k_scale, sequences=sequences, pages=pages)
