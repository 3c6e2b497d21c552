"""The indexers put together from a backend's stages: the same for every GPU backend."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from hisa_jax.kernels_pallas import scan
from hisa_jax.kernels_pallas.flat_call import FlatCall, flatten
from hisa_jax.kernels_pallas.operands import KeyBlocks
from hisa_jax.kernels_pallas.pages import PageMeans, PageSums, is_shared_by_few, means_of
from hisa_jax.kernels_pallas.sequences import Rows
from hisa_jax.kernels_pallas.types import Interpret
from hisa_jax.layout import Call
from hisa_jax.methods import BlockSparse, Hisa, Scan

Means = tuple[Array, Array | None]  # [n, parts, D] in the keys' dtype and [n] float32 scale: what `pool` returns

QUERIES = 8192  # at a time: what a stage leaves in memory for each of them, 64 KB at most, stays below 0.5 GiB
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


class Stages(scan.ScanStages, Protocol):
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
    """

    stages: Stages
    flat_up_to: float = 1.0

    def select_hisa(self, call: Call, method: Hisa, interpret: Interpret = False) -> tuple[Array, Array, Array]:
        """The hierarchical indexer.

        Returns: [T, topk] int32 positions, ascending, then -1; [T] int32 count; [T, block_topk] block ids, likewise.
        """
        with jax.enable_x64(False):
            flat = flatten(call, method.block_size)
            kept_blocks = self._filter(call, flat, method, interpret)

            def some(flat: FlatCall) -> tuple[Array, ...]:
                blocks = kept_blocks(flat)
                m = -(-flat.sequences.max_keys // method.block_size)
                return *self.stages.refine(flat, blocks[:, :m], method, interpret), blocks

            indices, count, blocks = flat.map_queries(some, QUERIES)
            return indices, count, blocks

    def select_blocks(self, call: Call, method: Hisa | BlockSparse, interpret: Interpret = False) -> Array:
        """The block filter alone: [T, block_topk] int32 block ids, ascending, then -1."""
        with jax.enable_x64(False):
            flat = flatten(call, method.block_size)
            kept_blocks = self._filter(call, flat, method, interpret)
            return flat.map_queries(lambda flat: (kept_blocks(flat),), QUERIES)[0]

    def select_flat(self, call: Call, topk: int, interpret: Interpret = False) -> tuple[Array, Array]:
        """The flat indexer: [T, topk] and [T], as `select_hisa`."""
        with jax.enable_x64(False):
            flat = of_tokens(call)
            indices, count = flat.map_queries(lambda flat: self.stages.flat(flat, topk, interpret), QUERIES)
            return indices, count

    def select_scan(self, call: Call, method: Scan, interpret: Interpret = False) -> tuple[Array, Array]:
        """The scan, of more keys than `candidates`: [T, topk] and [T], as `select_hisa`."""
        with jax.enable_x64(False):
            flat = of_tokens(call)
            if method.sketch is not None:
                flat = dataclasses.replace(flat, sketch=call.sketch)
            if flat.sequences.max_keys * flat.q.shape[1] <= self.flat_up_to * 64 * method.block_topk:
                return self.select_flat(call, method.topk, interpret)
            n = scan.queries_at_a_time(method, flat.sequences.max_keys)
            indices, count = flat.map_queries(lambda flat: scan.select(self.stages, flat, method, interpret), n)
            return indices, count

    def _filter(
        self, call: Call, flat: FlatCall, method: Hisa | BlockSparse, interpret: Interpret
    ) -> Callable[[FlatCall], Array]:
        """Pools the keys and returns what maps some of the queries to their kept blocks, [T, block_topk] int32."""
        block_size, m = method.block_size, method.block_topk
        has_filter = flat.sequences.max_keys > m * block_size
        means = block_means(self.stages, call, flat, block_size, interpret) if has_filter else None

        def kept(flat: FlatCall) -> Array:
            # [T, 1]: of [T] XLA gathers the tiles' limits inside their concatenation, one after the other: 6 us more.
            eligible = -(-flat.visible // block_size)[:, None]
            first = jnp.arange(m, dtype=jnp.int32)
            if means is None:
                return jnp.where(first < eligible, first, -1)
            keeps_all = eligible <= m
            # A query that keeps all its blocks needs no scores of them.
            scored = jnp.where(keeps_all[:, 0], 0, eligible[:, 0])
            return self.stages.block_filter(flat, means, Eligible(scored, eligible[:, 0]), method, interpret)

        return kept


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
