"""The indexers put together from a backend's stages: the same for every GPU backend."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from hisa_jax.kernels_pallas import lists, scan, units
from hisa_jax.kernels_pallas.flat_call import FlatCall, flatten
from hisa_jax.kernels_pallas.operands import KeyBlocks
from hisa_jax.kernels_pallas.pages import PageMeans, PageSums, is_shared_by_few, means_of
from hisa_jax.kernels_pallas.sequences import Rows
from hisa_jax.kernels_pallas.types import Interpret
from hisa_jax.layout import Call
from hisa_jax.methods import BlockSparse, Hisa, Scan, is_by_best_token

Means = tuple[Array, Array | None]  # [n, parts, D] in the keys' dtype and [n] float32 scale: what `pool` returns

QUERIES = 8192  # at a time: what a stage leaves in memory for each of them, 80 KB at most, stays below 0.7 GB
_TILED_ROWS = 8  # tiled copies begin at multiples of this many rows


class Eligible(NamedTuple):
    """Of how many blocks, the first ones, a query has the best: [T] int32 each.

    Attributes: `scored`, 0 where a query keeps all of them; `seen`, there too.
    """

    scored: Array
    seen: Array

    def or_all(self, best: Array) -> Array:
        """[T, m] best of the scored blocks -> all that are seen where none is scored."""
        first, seen = jnp.arange(best.shape[1], dtype=jnp.int32), self.seen[:, None]
        return jnp.where(seen <= best.shape[1], jnp.where(first < seen, first, -1), best)


@dataclasses.dataclass(frozen=True)
class ByScore:
    """A block filter by score alone, for one of several devices: which blocks are always kept, all know without one."""

    block_size: int
    block_topk: int
    keep_first: int = 0
    keep_last: int = 0


class Stages(scan.ScanStages, units.UnitStages, lists.ListStages, Protocol):
    """What a backend brings."""

    def pool(
        self, k: Array, k_scale: Array | None, counts: Rows, *, block_size: int, interpret: Interpret = False
    ) -> Means:
        """Mean key of each block over the `counts` [S // block_size] tokens present in it."""
        ...

    def pools_where_scored(self, n_sequences: int, T: int, k: Array) -> bool:
        """Whether `block_filter` should take means of keys [S, D] itself, for T queries of so many sequences."""
        ...

    def pool_pages(self, page_sums: PageSums, dtype: DTypeLike, *, interpret: Interpret = False) -> Means:
        """Mean key of each block from its pages' sums, as `pool` gives them for keys of `dtype`."""
        ...

    def block_filter(
        self,
        call: FlatCall,
        means: Means | KeyBlocks | PageSums | PageMeans,
        eligible: Eligible,
        method: Hisa | BlockSparse,
        interpret: Interpret = False,
    ) -> Array:
        """The best of the blocks: [T, block_topk] int32 ids, ascending, then -1."""
        ...

    def block_sort_keys(
        self,
        call: FlatCall,
        means: Means | KeyBlocks | PageSums | PageMeans,
        eligible: Array,
        method: Hisa | BlockSparse | ByScore,
        interpret: Interpret = False,
    ) -> Array:
        """[T, n] sort keys of the first `eligible` [T] blocks."""
        ...

    def refine(
        self, call: FlatCall, block_ids: Array, method: Hisa, interpret: Interpret = False
    ) -> tuple[Array, Array]:
        """The best tokens of the kept blocks, [T, m] ids in the sequence: [T, topk], ascending, then -1; [T] count."""
        ...

    def flat(self, call: FlatCall, topk: int, interpret: Interpret = False) -> tuple[Array, Array]:
        """The best of all visible tokens, as `refine`."""
        ...


@dataclasses.dataclass(frozen=True)
class Indexer:
    """Whole indexers of one backend. Results have a row a query, `call.queries`.

    Tracing is as without `jax_enable_x64` (see bits.py); `interpret` is that of types.py.

    Attributes:
        flat_up_to: a scan with 64 heads of at most so many times its candidates is the flat indexer, which scores all
            of them and is faster there; with fewer heads of more.
        way_of_scan: how a call is scanned, by topk.
        is_flat_where_all_kept: whether the flat indexer is faster for a call of which HISA keeps every block.
    """

    stages: Stages
    flat_up_to: float = 1.0
    way_of_scan: Callable[[FlatCall, int], scan.Way] = scan.way_of
    is_flat_where_all_kept: Callable[[FlatCall], bool] = lambda call: False

    def select_hisa(
        self, call: Call, method: Hisa, interpret: Interpret = False, n_kept: Array | None = None
    ) -> tuple[Array, Array, Array]:
        """The hierarchical indexer.

        Args:
            n_kept: [T] int32, up to `block_topk` blocks that each query keeps; None: as many as these.

        Returns: [T, topk] int32 positions, ascending, then -1; [T] int32 count; [T, block_topk] block ids, likewise.
        """
        with jax.enable_x64(False):
            flat = flatten(call, method.block_size)
            kept_blocks = self._filter(call, flat, method, interpret, n_kept)
            keeps_all = n_kept is None and flat.sequences.max_keys <= method.block_topk * method.block_size

            def some(flat: FlatCall, *n_kept: Array) -> tuple[Array, ...]:
                blocks = kept_blocks(flat, *n_kept)
                if keeps_all and self.is_flat_where_all_kept(flat):
                    return *self.stages.flat(flat, method.topk, interpret), blocks
                m = -(-flat.sequences.max_keys // method.block_size)
                return *self.stages.refine(flat, blocks[:, :m], method, interpret), blocks

            indices, count, blocks = flat.map_queries(some, QUERIES, *_given(n_kept))
            return *self._within_budget(call, flat, (indices, count), interpret), blocks

    def select_blocks(
        self, call: Call, method: Hisa | BlockSparse, interpret: Interpret = False, n_kept: Array | None = None
    ) -> Array:
        """The block filter alone: [T, block_topk] int32 block ids, ascending, then -1."""
        with jax.enable_x64(False):
            if isinstance(method, BlockSparse) and is_by_best_token(method):
                return self._by_best_token(of_tokens(call), method, interpret, n_kept)
            flat = flatten(call, method.block_size)
            kept_blocks = self._filter(call, flat, method, interpret, n_kept)
            some = lambda flat, *n_kept: (kept_blocks(flat, *n_kept),)  # noqa: E731
            return flat.map_queries(some, QUERIES, *_given(n_kept))[0]

    def select_flat(self, call: Call, topk: int, interpret: Interpret = False) -> tuple[Array, Array]:
        """The flat indexer, of what is listed where something is: [T, topk] and [T], as `select_hisa`."""
        with jax.enable_x64(False):
            flat, listed = of_tokens(call), call.limits.candidates
            if listed is not None:
                ids, size = listed.ids[:, : -(-flat.sequences.max_keys // listed.block_size)], listed.block_size

                def some(flat: FlatCall, ids: Array) -> tuple[Array, ...]:
                    return lists.best_listed(self.stages, flat, ids, size, topk, interpret)

                n = lists.queries_at_a_time(ids.shape[1] * size)
                indices, count = flat.map_queries(some, n, ids)
            else:
                indices, count = flat.map_queries(lambda flat: self.stages.flat(flat, topk, interpret), QUERIES)
            return self._within_budget(call, flat, (indices, count), interpret)

    def select_scan(self, call: Call, method: Scan, interpret: Interpret = False) -> tuple[Array, Array]:
        """The scan, of more keys than `candidates`: [T, topk] and [T], as `select_hisa`."""
        with jax.enable_x64(False):
            flat = of_tokens(call)
            if method.sketch is not None:
                flat = dataclasses.replace(flat, sketch=call.sketch)
            way = self.way(flat, method)
            if way == "flat":
                return self.select_flat(call, method.topk, interpret)
            if way == "lists":
                return self._within_budget(call, flat, scan.select_few(self.stages, flat, method, interpret), interpret)
            n = scan.queries_at_a_time(method, flat.sequences.max_keys)
            indices, count = flat.map_queries(lambda flat: scan.select(self.stages, flat, method, interpret), n)
            return self._within_budget(call, flat, (indices, count), interpret)

    def way(self, flat: FlatCall, method: Scan) -> scan.Way:
        """How a call is scanned."""
        if flat.sequences.max_keys * flat.q.shape[1] <= self.flat_up_to * 64 * method.block_topk:
            return "flat"
        return self.way_of_scan(flat, method.topk)

    def _within_budget(
        self, call: Call, flat: FlatCall, found: tuple[Array, Array], interpret: Interpret
    ) -> tuple[Array, Array]:
        """Of the chosen tokens, [T, k] and [T] count, the best so many of each query as its budget says."""
        budget = call.limits.budget
        if budget is None:
            return found

        def some(flat: FlatCall, indices: Array, count: Array, budget: Array) -> tuple[Array, ...]:
            return self.stages.within_budget(flat, indices, count, budget, interpret)

        indices, count = flat.map_queries(some, QUERIES, *found, budget)
        return indices, count

    def _by_best_token(self, flat: FlatCall, method: BlockSparse, interpret: Interpret, n_kept: Array | None) -> Array:
        n = units.queries_at_a_time(flat.sequences.max_keys, units.unit_of(method, flat.q.shape[1]))

        def some(flat: FlatCall, *n_kept: Array) -> tuple[Array, ...]:
            return (units.best_blocks(self.stages, flat, method, interpret, *n_kept),)

        return flat.map_queries(some, n, *_given(n_kept))[0]

    def _filter(
        self, call: Call, flat: FlatCall, method: Hisa | BlockSparse, interpret: Interpret, n_kept: Array | None
    ) -> Callable[..., Array]:
        """Pools the keys and returns what maps some of the queries to their kept blocks, [T, block_topk] int32.

        That takes these queries, and [T] int32, how many blocks each one keeps, where not all keep `block_topk`.
        """
        block_size, m = method.block_size, method.block_topk
        n_blocks = -(-flat.sequences.max_keys // block_size)
        has_filter = n_blocks > (m if n_kept is None else 0)
        means = block_means(self.stages, call, flat, block_size, interpret) if has_filter else None

        def kept(flat: FlatCall, *n_kept: Array) -> Array:
            # [T, 1]: of [T] XLA gathers the tiles' limits inside their concatenation, one after the other: 6 us more.
            eligible = -(-flat.visible // block_size)[:, None]
            first = jnp.arange(m, dtype=jnp.int32)
            if means is None:
                return jnp.where(first < eligible, first, -1)
            if n_kept:
                most = n_kept[0]
                scored = jnp.where(eligible[:, 0] <= most, 0, eligible[:, 0])
                sort_keys = self.stages.block_sort_keys(flat, means, scored, method, interpret)
                found = self.stages.best_columns(sort_keys, scored, min(m, n_blocks), interpret)
                best = self.stages.within(*found, most, interpret)
                best = jnp.pad(best, ((0, 0), (0, m - best.shape[1])), constant_values=-1)
                return jnp.where(eligible <= most[:, None], jnp.where(first < eligible, first, -1), best)
            keeps_all = eligible <= m
            # A query that keeps all its blocks needs no scores of them.
            scored = jnp.where(keeps_all[:, 0], 0, eligible[:, 0])
            return self.stages.block_filter(flat, means, Eligible(scored, eligible[:, 0]), method, interpret)

        return kept


def _given(rows: Array | None) -> tuple[Array, ...]:
    return () if rows is None else (rows,)


def block_means(
    stages: Stages, call: Call, flat: FlatCall, block_size: int, interpret: Interpret
) -> Means | KeyBlocks | PageSums | PageMeans:
    """Those of all sequences, or what a filter takes them from."""
    if flat.pages is None:
        counts = flat.sequences.tokens_in_blocks(flat.k.shape[0], block_size)
        if stages.pools_where_scored(len(flat.sequences.lengths), flat.q.shape[0], flat.k):
            return KeyBlocks(k=flat.k, k_scale=flat.k_scale, counts=counts, size=block_size)
        return stages.pool(flat.k, flat.k_scale, counts, block_size=block_size, interpret=interpret)
    assert call.cache is not None
    means = means_of(flat.pages, block_size, call.cache)
    is_few = is_shared_by_few(len(flat.sequences.lengths), flat.q.shape[0])
    # Where a block is a page, `scores` finds the means by the table, for many queries, too.
    if not is_few and (isinstance(means, PageSums) or means.rows is None):
        sums = means if isinstance(means, PageSums) else means.page_sums
        return stages.pool_pages(sums, flat.k.dtype, interpret=interpret)
    return means


def of_tokens(call: Call) -> FlatCall:
    """For stages without blocks."""
    return flatten(call, _TILED_ROWS if call.cache is None else call.cache.page_size)
