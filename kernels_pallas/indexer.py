"""The indexers put together from a backend's stages: the same for every backend."""

import dataclasses
from collections.abc import Callable
from typing import Protocol

import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from hisa_jax.kernels_pallas.bits import in_32_bits
from hisa_jax.kernels_pallas.pages import PageMeans, Pages, PageSums, flatten_paged, means_of
from hisa_jax.kernels_pallas.sequences import FlatCall, Rows, Sequences, flatten_batch, flatten_packed
from hisa_jax.kernels_pallas.types import Interpret

Means = tuple[Array, Array | None]  # [n, parts, D] in the keys' dtype and [n] float32 scale: what `pool` returns


class Stages(Protocol):
    """What a backend brings, over flat arrays: [T, H, D] queries, [T, H] weights, [S, D] keys, [S] scales."""

    def pool(
        self, k: Array, k_scale: Array | None, counts: Rows, *, block_size: int, interpret: Interpret = False
    ) -> Means:
        """Mean key of each block over the `counts` [S // block_size] tokens present in it."""
        ...

    def pool_pages(self, page_sums: PageSums, dtype: DTypeLike, *, interpret: Interpret = False) -> Means:
        """Mean key of each block from its pages' sums, as `pool` gives them for keys of `dtype`."""
        ...

    def block_filter(
        self,
        q: Array,
        w: Array,
        means: Means | PageSums | PageMeans,
        eligible: Array,
        sequences: Sequences,
        *,
        block_topk: int,
        keep_first: int,
        keep_last: int,
        interpret: Interpret = False,
    ) -> Array:
        """The best of the first `eligible` [T] blocks: [T, block_topk] int32 ids, ascending, then -1.

        `sequences` have blocks for keys. A query with no eligible block gets nothing, or anything.
        """
        ...

    def refine(
        self,
        q: Array,
        w: Array,
        k: Array,
        k_scale: Array | None,
        block_ids: Array,
        visible: Array,
        first_block: Array,
        pages: Pages | None = None,
        *,
        topk: int,
        block_size: int,
        interpret: Interpret = False,
    ) -> tuple[Array, Array]:
        """The best tokens of the kept blocks: [T, topk] int32, ascending, then -1; [T] count.

        Args:
            block_ids: [T, m] int32, in the sequence, which begins with block `first_block` [T] of all rows.
            pages: where those rows are in k, if not one behind the other.
        """
        ...

    def flat(
        self,
        q: Array,
        w: Array,
        k: Array,
        k_scale: Array | None,
        visible: Array,
        sequences: Sequences,
        pages: Pages | None = None,
        *,
        topk: int,
        interpret: Interpret = False,
    ) -> tuple[Array, Array]:
        """The best of all visible tokens, as `refine`."""
        ...


@dataclasses.dataclass(frozen=True)
class Indexer:
    """Whole indexers of one backend.

    The arguments that all have in common, for a batch, or for a packed batch where `cu_seqlens` is given:

        q: [B, T, H, D] or packed [T, H, D]; k: [B, S, D] or [N, D]; of one dtype that the backend takes.
        k_scale: [B, S] or [N] float32, or None where every scale is 1.
        w: [B, T, H] or [T, H] float32 of any sign.
        visible: [B, T] or [T] int32, how many tokens of its sequence a query sees; 0 for padding.
        lengths: [B] int32, tokens present in each sequence of a batch; None: S. Unused for a packed batch.
        cu_seqlens: [R + 1] int32 offsets of each sequence's queries, and of its keys.
        interpret: see types.py.

    And for requests in pages:

        q, w, visible: packed; k: [n_pages, page_size, D]; k_scale: [n_pages, page_size] or None.
        block_tables: [R, P] int32, the pages of each request in order; any value where it has none.
        cu_seqlens_q: [R + 1] int32 offsets of each request's queries.
        page_sums: [n_pages, D] float32, the dequantised keys of the tokens in each page; `page_counts`: [n_pages]
            int32, of how many. A block is one page or several whole ones.
        page_means: [n_pages, parts, D] and [n_pages], each page's mean as `Stages.pool` gives it.
    """

    stages: Stages

    @in_32_bits
    def select_hisa(
        self,
        q: Array,
        k: Array,
        k_scale: Array | None,
        w: Array,
        visible: Array,
        *,
        topk: int,
        block_size: int,
        block_topk: int,
        keep_first: int = 1,
        keep_last: int = 1,
        lengths: Array | None = None,
        cu_seqlens: tuple[Array, Array] | None = None,
        means: Means | None = None,
        interpret: Interpret = False,
    ) -> tuple[Array, Array, Array]:
        """The hierarchical indexer.

        Args:
            means: kept block means of a batch (see `Stages.pool`); pooled here if None.

        Returns: [B, T, topk] int32 positions, ascending, then -1; [B, T] int32 count; [B, T, block_topk] block ids,
            ascending, then -1.
        """
        call = _flatten(q, k, k_scale, w, visible, lengths, cu_seqlens, block_size)
        filtered = self._filter(call, block_size, block_topk, keep_first, keep_last, means, interpret)
        return self._hisa(call, filtered, None, topk, block_size, interpret)

    @in_32_bits
    def select_hisa_paged(
        self,
        q: Array,
        k: Array,
        k_scale: Array | None,
        w: Array,
        visible: Array,
        *,
        topk: int,
        block_size: int,
        block_topk: int,
        keep_first: int = 1,
        keep_last: int = 1,
        block_tables: Array,
        cu_seqlens_q: Array,
        page_sums: Array,
        page_counts: Array,
        page_means: Means,
        interpret: Interpret = False,
    ) -> tuple[Array, Array, Array]:
        """The hierarchical indexer over pages: [T, topk], [T], [T, block_topk], as `select_hisa`."""
        call, pages = flatten_paged(q, k, k_scale, w, visible, block_tables, cu_seqlens_q, block_size)
        means = means_of(pages, block_size, page_sums, page_counts, *page_means)
        filtered = self._filter(call, block_size, block_topk, keep_first, keep_last, means, interpret)
        return self._hisa(call, filtered, pages, topk, block_size, interpret)

    @in_32_bits
    def select_blocks(
        self,
        q: Array,
        k: Array,
        k_scale: Array | None,
        w: Array,
        visible: Array,
        *,
        block_size: int,
        block_topk: int,
        keep_first: int = 1,
        keep_last: int = 1,
        lengths: Array | None = None,
        cu_seqlens: tuple[Array, Array] | None = None,
        interpret: Interpret = False,
    ) -> Array:
        """The block filter alone: [B, T, block_topk] int32 block ids, ascending, then -1."""
        call = _flatten(q, k, k_scale, w, visible, lengths, cu_seqlens, block_size)
        filtered = self._filter(call, block_size, block_topk, keep_first, keep_last, None, interpret)
        return call.unflatten(*call.map_queries(lambda call: (filtered(call),), _QUERIES))[0]

    @in_32_bits
    def select_blocks_paged(
        self,
        q: Array,
        k: Array,
        k_scale: Array | None,
        w: Array,
        visible: Array,
        *,
        block_size: int,
        block_topk: int,
        keep_first: int = 1,
        keep_last: int = 1,
        block_tables: Array,
        cu_seqlens_q: Array,
        page_sums: Array,
        page_counts: Array,
        page_means: Means,
        interpret: Interpret = False,
    ) -> Array:
        """The block filter alone over pages: [T, block_topk]."""
        call, pages = flatten_paged(q, k, k_scale, w, visible, block_tables, cu_seqlens_q, block_size)
        means = means_of(pages, block_size, page_sums, page_counts, *page_means)
        filtered = self._filter(call, block_size, block_topk, keep_first, keep_last, means, interpret)
        return call.map_queries(lambda call: (filtered(call),), _QUERIES)[0]

    @in_32_bits
    def select_flat(
        self,
        q: Array,
        k: Array,
        k_scale: Array | None,
        w: Array,
        visible: Array,
        *,
        topk: int,
        cu_seqlens: tuple[Array, Array] | None = None,
        interpret: Interpret = False,
    ) -> tuple[Array, Array]:
        """The flat indexer; results as in `select_hisa`, without blocks."""
        call = _flatten(q, k, k_scale, w, visible, None, cu_seqlens, _TILED_ROWS)
        return self._flat(call, None, topk, interpret)

    @in_32_bits
    def select_flat_paged(
        self,
        q: Array,
        k: Array,
        k_scale: Array | None,
        w: Array,
        visible: Array,
        *,
        topk: int,
        block_tables: Array,
        cu_seqlens_q: Array,
        interpret: Interpret = False,
    ) -> tuple[Array, Array]:
        """The flat indexer over pages: [T, topk], [T]."""
        call, pages = flatten_paged(q, k, k_scale, w, visible, block_tables, cu_seqlens_q)
        return self._flat(call, pages, topk, interpret)

    def _flat(self, call: FlatCall, pages: Pages | None, topk: int, interpret: Interpret) -> tuple[Array, Array]:
        def some(call: FlatCall) -> tuple[Array, Array]:
            return self.stages.flat(
                call.q,
                call.w,
                call.k,
                call.k_scale,
                call.visible,
                call.sequences,
                pages,
                topk=topk,
                interpret=interpret,
            )

        indices, count = call.unflatten(*call.map_queries(some, _QUERIES))
        return indices, count

    def _hisa(
        self,
        call: FlatCall,
        filtered: Callable[[FlatCall], Array],
        pages: Pages | None,
        topk: int,
        block_size: int,
        interpret: Interpret,
    ) -> tuple[Array, Array, Array]:
        """What `select_hisa` returns, given what maps some of the queries to their kept blocks."""

        def some(call: FlatCall) -> tuple[Array, Array, Array]:
            blocks = filtered(call)
            first_block = call.sequences.key_start_of_queries(call.q.shape[0]) // block_size
            indices, count = self.stages.refine(
                call.q,
                call.w,
                call.k,
                call.k_scale,
                blocks[:, : -(-call.sequences.max_keys // block_size)],
                call.visible,
                first_block,
                pages,
                topk=topk,
                block_size=block_size,
                interpret=interpret,
            )
            return indices, count, blocks

        indices, count, blocks = call.unflatten(*call.map_queries(some, _QUERIES))
        return indices, count, blocks

    def _filter(
        self,
        call: FlatCall,
        block_size: int,
        block_topk: int,
        keep_first: int,
        keep_last: int,
        means: Means | PageSums | PageMeans | None,
        interpret: Interpret,
    ) -> Callable[[FlatCall], Array]:
        """Pools the keys and returns what maps some of the queries to their kept blocks, [T, block_topk] int32.

        Args:
            means: None: of the call's keys, pooled here.
        """
        has_filter = call.sequences.max_keys > block_topk * block_size
        if has_filter and means is None:
            counts = call.sequences.tokens_in_blocks(call.k.shape[0], block_size)
            means = self.stages.pool(call.k, call.k_scale, counts, block_size=block_size, interpret=interpret)
        elif has_filter and isinstance(means, PageSums) and _writes_means(call.q.shape[0], call.sequences):
            means = self.stages.pool_pages(means, call.k.dtype, interpret=interpret)

        def kept(call: FlatCall) -> Array:
            eligible = -(-call.visible // block_size)[:, None]
            first = jnp.arange(block_topk, dtype=jnp.int32)
            all_eligible = jnp.where(first < eligible, first, -1)
            if not has_filter or means is None:
                return all_eligible
            keeps_all = eligible <= block_topk
            best = self.stages.block_filter(
                call.q,
                call.w,
                means,
                # A query that keeps all its blocks needs no scores of them.
                jnp.where(keeps_all[:, 0], 0, eligible[:, 0]),
                call.sequences.blocks(block_size),
                block_topk=block_topk,
                keep_first=keep_first,
                keep_last=keep_last,
                interpret=interpret,
            )
            return jnp.where(keeps_all, all_eligible, best)

        return kept


_QUERIES = 8192  # at a time: what a stage leaves in memory for each of them, 64 KB at most, stays below 0.5 GiB
_TILED_ROWS = 8  # tiled copies begin at multiples of this many rows


def _writes_means(T: int, sequences: Sequences) -> bool:
    """Whether to write block means for T queries to share, or to take them from the pages' sums where they are scored.

    On an H200, one query a request of 128K in pages of half a block, ms so and so: 0.153 and 0.147 for 128 requests,
    0.074 and 0.067 for 32.
    """
    return 2 * len(sequences.lengths) < T


def _flatten(
    q: Array,
    k: Array,
    k_scale: Array | None,
    w: Array,
    visible: Array,
    lengths: Array | None,
    cu_seqlens: tuple[Array, Array] | None,
    align: int,
) -> FlatCall:
    if cu_seqlens is None:
        return flatten_batch(q, k, k_scale, w, visible, lengths, align)
    return flatten_packed(q, k, k_scale, w, visible, *cu_seqlens, align)
