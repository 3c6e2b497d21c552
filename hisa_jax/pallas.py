"""Implementations by kernels: the functions of `xla.py` with the same names, on a backend of `kernels_pallas`."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax import Array, lax

from hisa_jax.cache import IndexCache
from hisa_jax.layout import Contiguous, Keys, Paged, Sequence
from hisa_jax.methods import BlockSparse, Dsa, Hisa, Method, Scan
from hisa_jax.selection import Selection
from hisa_jax.xla import stages, topk
from hisa_jax.xla.select import Tiles

_STATIC = ("self", "method", "tiles", "return_scores", "return_blocks")
_SCORED_QUERIES = 16  # at a time: their chosen keys are gathered


class Backend(Protocol):
    """What kernels_pallas/README.md promises of every backend."""

    select_hisa: Callable[..., tuple[Array, Array, Array]]
    select_flat: Callable[..., tuple[Array, Array]]
    select_blocks: Callable[..., Array]
    # Over pages, of the backends that have them.
    select_hisa_paged: Callable[..., tuple[Array, Array, Array]]
    select_flat_paged: Callable[..., tuple[Array, Array]]
    select_blocks_paged: Callable[..., Array]


@dataclasses.dataclass(frozen=True)
class Kernels:
    """The selection by one backend.

    Attributes:
        backend: a function that imports it, so that nothing is imported which does not run.
        flat_if_all_kept: whether its flat indexer is the faster way to `Hisa` where no query can see more blocks than
            it keeps, and both are the same by contract.
        takes_means: whether its block filter reads the means that pages keep.
        interpret: handed to the kernels, for tests without their device.
    """

    backend: Callable[[], Backend]
    flat_if_all_kept: bool = False
    takes_means: bool = False
    interpret: Any = False

    @functools.partial(jax.jit, static_argnames=_STATIC)
    def select(
        self,
        q: Array,
        keys: Keys,
        w: Array,
        visible: Array,
        lengths: Array,
        method: Method,
        tiles: Tiles,
        *,
        return_scores: bool,
        return_blocks: bool,
    ) -> Selection:
        """[B, T, H, D], Keys of [B, S, D], [B, T, H], [B, T], [B] -> Selection of [B, T]."""
        S = keys.values.shape[1]
        selection = self._select(
            q, keys, w, visible, method, return_blocks, max_keys=S, rows={}, blocks_rows=dict(lengths=lengths)
        )
        if not return_scores:
            return selection

        def scored(q: Array, keys: Keys, w: Array, indices: Array) -> Array:
            first_key = jnp.zeros(q.shape[0], jnp.int32)
            return _scores_of_chosen(q, w, indices, lambda first: Contiguous(keys, first, S), first_key)

        return dataclasses.replace(selection, scores=jax.vmap(scored)(q, keys, w, selection.indices))

    @functools.partial(jax.jit, static_argnames=_STATIC)
    def select_packed(
        self,
        q: Array,
        keys: Keys,
        w: Array,
        visible: Array,
        cu_seqlens_q: Array,
        cu_seqlens_k: Array,
        method: Method,
        tiles: Tiles,
        *,
        return_scores: bool,
        return_blocks: bool,
    ) -> Selection:
        """[T, H, D], Keys of [N, D], [T, H], [T], [R + 1], [R + 1] -> Selection of [T]."""
        N, rows = keys.values.shape[0], dict(cu_seqlens=(cu_seqlens_q, cu_seqlens_k))
        selection = self._select(q, keys, w, visible, method, return_blocks, max_keys=N, rows=rows, blocks_rows={})
        if not return_scores:
            return selection
        first_key = cu_seqlens_k[_sequences_of(q.shape[0], cu_seqlens_q)]
        scored = _scores_of_chosen(q, w, selection.indices, lambda first: Contiguous(keys, first, N), first_key)
        return dataclasses.replace(selection, scores=scored)

    @functools.partial(jax.jit, static_argnames=_STATIC)
    def select_paged(
        self,
        q: Array,
        w: Array,
        visible: Array,
        cache: IndexCache,
        block_tables: Array,
        cu_seqlens_q: Array,
        method: Method,
        tiles: Tiles,
        *,
        return_scores: bool,
        return_blocks: bool,
    ) -> Selection:
        """[T, H, D], [T, H], [T], pages, [R, P], [R + 1] -> Selection of [T]."""
        page_size = cache.page_size
        selection = self._select(
            q,
            Keys(cache.keys, cache.scales),
            w,
            visible,
            method,
            return_blocks,
            max_keys=block_tables.shape[1] * page_size,
            rows=dict(block_tables=block_tables, cu_seqlens_q=cu_seqlens_q),
            blocks_rows=dict(page_sums=cache.sums, page_counts=cache.counts)
            | (dict(page_means=(cache.means, cache.mean_scales)) if self.takes_means else {}),
            is_paged=True,
        )
        if not return_scores:
            return selection
        keys = Keys(
            cache.keys.reshape(-1, cache.keys.shape[-1]), None if cache.scales is None else cache.scales.reshape(-1)
        )
        scored = _scores_of_chosen(
            q,
            w,
            selection.indices,
            lambda r: Paged(keys, block_tables[r], page_size),
            _sequences_of(q.shape[0], cu_seqlens_q),
        )
        return dataclasses.replace(selection, scores=scored)

    def _select(
        self,
        q: Array,
        keys: Keys,
        w: Array,
        visible: Array,
        method: Method,
        return_blocks: bool,
        *,
        max_keys: int,
        rows: dict[str, Any],
        blocks_rows: dict[str, Any],
        is_paged: bool = False,
    ) -> Selection:
        """`rows`: where queries and keys lie; `blocks_rows`: also what only block means need to know."""
        backend, operands = self.backend(), (q, keys.values, keys.scales, w, visible)
        keeps_all = isinstance(method, Hisa) and max_keys <= method.block_topk * method.block_size
        if isinstance(method, Dsa) or (keeps_all and self.flat_if_all_kept):
            flat = backend.select_flat_paged if is_paged else backend.select_flat
            indices, count = flat(*operands, topk=method.topk, interpret=self.interpret, **rows)
            blocks = _all_blocks(visible, method) if return_blocks and isinstance(method, Hisa) else None
            return Selection(indices=indices, count=count, blocks=blocks)
        options = dict(
            block_size=method.block_size,
            block_topk=method.block_topk,
            keep_first=method.keep_first,
            keep_last=method.keep_last,
            interpret=self.interpret,
            **rows,
            **blocks_rows,
        )
        assert not isinstance(method, Scan)  # declined
        if isinstance(method, Hisa):
            hisa = backend.select_hisa_paged if is_paged else backend.select_hisa
            indices, count, blocks = hisa(*operands, topk=method.topk, **options)
        else:
            block_sparse = backend.select_blocks_paged if is_paged else backend.select_blocks
            blocks = block_sparse(*operands, **options)
            indices, count = tokens_of_blocks(blocks, visible, method)
        return Selection(indices=indices, count=count, blocks=blocks if return_blocks else None)


def _all_blocks(visible: Array, method: Hisa) -> Array:
    """[...] -> [..., block_topk] int32: the blocks of the visible tokens, which are no more."""
    eligible = -(-visible // method.block_size)
    return stages.first_positions(eligible.reshape(-1), method.block_topk).reshape(*visible.shape, method.block_topk)


def tokens_of_blocks(blocks: Array, visible: Array, method: BlockSparse) -> tuple[Array, Array]:
    """[..., m], [...] -> [..., topk] int32 and [...] count: only the last block has invisible tokens, so no holes."""
    flat = blocks.reshape(-1, blocks.shape[-1])
    positions, seen = stages.tokens_of(flat, visible.reshape(-1), method.block_size)
    indices = jnp.where(seen, positions, -1).reshape(*visible.shape, method.topk)
    return indices, jnp.sum(indices >= 0, axis=-1, dtype=jnp.int32)


def _sequences_of(T: int, query_starts: Array) -> Array:
    """[T] int32: the sequence of each query, the last one's for rows behind it."""
    r = jnp.searchsorted(query_starts[1:], jnp.arange(T, dtype=jnp.int32), side="right", method="compare_all")
    return jnp.minimum(r, query_starts.shape[0] - 2)


def _scores_of_chosen(
    q: Array, w: Array, indices: Array, sequence_of: Callable[[Array], Sequence], which: Array
) -> Array:
    """[T, H, D], [T, H], [T, topk] -> [T, topk] float32, -inf where nothing is chosen.

    Kernels hand out no scores, so the chosen ones are scored once more, in float32. `sequence_of(which[t])` has the
    keys of query t.
    """

    def one(row: tuple[Array, ...]) -> Array:
        q, w, indices, which = row
        scores = topk.score_of(topk.sort_key_of(stages.scores(q, sequence_of(which).rows(indices), w)))
        return jnp.where(indices >= 0, scores, -jnp.inf)

    return lax.map(one, (q, w, indices, which), batch_size=min(_SCORED_QUERIES, q.shape[0]))
