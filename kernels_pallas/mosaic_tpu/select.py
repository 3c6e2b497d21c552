"""The stages put together, for batches, packed batches and requests in pages alike.

Sequences with several queries get tiles of their own, which share what is brought to VMEM; the queries of the others
stand side by side and copy what they keep. Both can be in one call, and neither costs anything where it has no query.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from hisa_jax.kernels_pallas.mosaic_tpu import block_filter, decode, flat, launch, pool, query_tiles, refine, units
from hisa_jax.kernels_pallas.mosaic_tpu.config import GROUP, LANES, SUBLANES, Choice, chip
from hisa_jax.kernels_pallas.mosaic_tpu.pool_body import parts_of
from hisa_jax.kernels_pallas.mosaic_tpu.query_tiles import Found, few_rows, nothing_like, put, take, where_rows
from hisa_jax.kernels_pallas.mosaic_tpu.ragged import Ragged, of_call
from hisa_jax.kernels_pallas.sequences import Rows
from hisa_jax.kernels_pallas.sort_key import INVISIBLE
from hisa_jax.kernels_pallas.types import Interpret
from hisa_jax.layout import Call, Queries
from hisa_jax.methods import BlockSparse, Hisa, is_by_best_token
from hisa_jax.xla import topk

_WIDE = 16  # queries of a packed sequence from which tiles of 32 are worth their padding


@functools.partial(jax.jit, static_argnames=("method", "interpret"))
def select_hisa(
    call: Call, method: Hisa, interpret: Interpret = False, n_kept: Array | None = None
) -> tuple[Array, Array, Array]:
    """The hierarchical indexer.

    Args:
        n_kept: [T] int32, up to `block_topk` blocks that each query keeps; None: as many as these.

    Returns: [T, topk] int32 positions, ascending, then -1; [T] int32 count; [T, block_topk] int32 block ids, likewise;
        a row for each of `call.queries`.
    """
    with jax.enable_x64(False):  # see bits.py
        queries, ragged = of_call(call, method.block_size)
        blocks = kept_blocks(queries, ragged, of_blocks(method, interpret), n_kept)
        n_visible = candidates(blocks, queries.visible, ragged.block_size)
        own = queries._replace(visible=n_visible), ragged, blocks[:, : ragged.max_blocks]
        found = best_tokens(*own, _choice(call, method.topk, interpret))
        n_visible, blocks = _first(call, n_visible, blocks)
        return *_chosen(call, _first(call, *found), n_visible), blocks


@functools.partial(jax.jit, static_argnames=("method", "interpret"))
def select_blocks(
    call: Call, method: Hisa | BlockSparse, interpret: Interpret = False, n_kept: Array | None = None
) -> Array:
    """The block filter alone: [T, block_topk] int32 block ids, ascending, then -1."""
    with jax.enable_x64(False):
        choice = of_blocks(method, interpret)
        if isinstance(method, BlockSparse) and is_by_best_token(method):
            queries, ragged = of_call(call, copied_keys(call))
            eligible, n_blocks = -(-queries.visible // method.block_size), -(-call.max_keys // method.block_size)
            find = functools.partial(best_by_token, queries, ragged, method)
            return _first(call, kept(eligible, n_blocks, choice, n_kept, find))[0]
        queries, ragged = of_call(call, method.block_size)
        return _first(call, kept_blocks(queries, ragged, choice, n_kept))[0]


def copied_keys(call: Call) -> int:
    """Keys that are copied at a time where nothing asks for blocks: 128 or 256."""
    return LANES if call.cache is None else max(LANES, call.cache.page_size)


@functools.partial(jax.jit, static_argnames=("topk", "interpret"))
def select_flat(call: Call, topk: int, interpret: Interpret = False) -> tuple[Array, Array]:
    """The flat indexer, of what is listed where something is: [T, topk] int32 positions, ascending, then -1; [T] int32
    count."""
    if call.limits.candidates is not None:
        return _select_listed(call, topk, interpret)
    choice = _choice(call, topk, interpret)
    with jax.enable_x64(False):
        if call.query_offsets is None:
            assert call.k is not None
            found = flat.flat(Queries(call.q, call.w, call.visible), call.k, choice=choice)
            n = jnp.clip(call.queries.visible, 0, call.max_keys)
            return _chosen(call, tuple(x.reshape(-1, topk) for x in found), n)
        queries, ragged = of_call(call, copied_keys(call))
        seen = queries._replace(visible=jnp.clip(queries.visible, 0, ragged.max_keys))
        found = best_of_all(seen, ragged, choice)
        return _chosen(call, _first(call, *found), *_first(call, seen.visible))


def _select_listed(call: Call, topk: int, interpret: Interpret) -> tuple[Array, Array]:
    """As the hierarchical indexer chooses among the blocks that it keeps."""
    listed = call.limits.candidates
    assert listed is not None
    size = listed.block_size
    with jax.enable_x64(False):
        queries, ragged = of_call(call, size)
        ids = listed.ids[:, : ragged.max_blocks]
        ids = jnp.pad(ids, ((0, queries.visible.shape[0] - ids.shape[0]), (0, 0)), constant_values=-1)
        blocks = jnp.where(ids * size < queries.visible[:, None], ids, -1)
        n = candidates(blocks, queries.visible, size)
        k = min(topk, blocks.shape[1] * size)
        choice = _choice(call, k, interpret)
        found = best_tokens(queries._replace(visible=n), ragged, blocks, choice)
        if not choice.has_sort_keys:  # without them a list that is chosen whole may not have been read
            place = jnp.arange(k, dtype=jnp.int32)
            every = jnp.where(place < n[:, None], blocks[:, place // size] * size + place % size, -1)
            found = (jnp.where(n[:, None] <= k, every, found[0]),)
        chosen, count = _chosen(call, _first(call, *found), *_first(call, n))
        return jnp.pad(chosen, ((0, 0), (0, topk - k)), constant_values=-1), count


def _choice(call: Call, k: int, interpret: Interpret) -> Choice:
    """Of tokens; a budget takes the best of them by their sort keys."""
    return Choice(k=k, has_sort_keys=call.budget is not None, interpret=interpret)


def _chosen(call: Call, found: Found, n: Array) -> tuple[Array, Array]:
    """The selection of queries that have n [T] candidates each; one without gets anything."""
    chosen = jnp.where(n[:, None] > 0, found[0], -1)
    budget = call.limits.budget
    if budget is None:
        return chosen, jnp.minimum(n, chosen.shape[1])
    _, chosen = topk.within(jnp.where(chosen >= 0, found[1], INVISIBLE), chosen, budget)
    return chosen, jnp.sum(chosen >= 0, axis=1, dtype=jnp.int32)


def of_blocks(method: Hisa | BlockSparse, interpret: Interpret) -> Choice:
    """What the block filter chooses."""
    first, last = method.keep_first, method.keep_last
    return Choice(k=method.block_topk, keep_first=first, keep_last=last, interpret=interpret)


def kept_blocks(queries: Queries, ragged: Ragged, choice: Choice, n_kept: Array | None = None) -> Array:
    """The block filter: [T, k] int32, ascending, then -1; of each query `n_kept` [T] of them, None: k."""
    if n_kept is None:  # a sequence of queries that keep all their blocks needs no means
        is_long = ragged.lengths > choice.k * ragged.block_size
        ragged = dataclasses.replace(ragged, lengths=jnp.where(is_long, ragged.lengths, 0))
    eligible = -(-queries.visible // ragged.block_size)
    return kept(eligible, ragged.max_blocks, choice, n_kept, functools.partial(best_blocks, queries, ragged))


def kept(
    eligible: Array, max_blocks: int, choice: Choice, n_kept: Array | None, find: Callable[[Array, Choice], Found]
) -> Array:
    """The blocks that each query keeps, as `kept_blocks`.

    Args:
        eligible: [T] int32, blocks that each query sees, of at most `max_blocks`.
        find: (blocks [T] to choose from, the first ones; what is chosen) -> the best, as `best_blocks`.
    """
    every = jnp.arange(choice.k, dtype=jnp.int32)
    all_eligible = jnp.where(every < eligible[:, None], every, -1)
    if n_kept is None and max_blocks <= choice.k:
        return all_eligible
    # A query that keeps all its blocks needs no scores of them.
    if n_kept is None:
        keeps_all = eligible <= choice.k
        (best,) = find(jnp.where(keeps_all, 0, eligible), choice)
    else:
        n_kept = jnp.pad(n_kept, (0, eligible.shape[0] - n_kept.shape[0]))
        keeps_all = eligible <= n_kept
        some = dataclasses.replace(choice, has_sort_keys=True)
        best, sort_keys = find(jnp.where(keeps_all, 0, eligible), some)
        _, best = topk.within(jnp.where(best >= 0, sort_keys, INVISIBLE), best, n_kept)
    return jnp.where(keeps_all[:, None], all_eligible, best)


def best_blocks(queries: Queries, ragged: Ragged, eligible: Array, choice: Choice) -> Found:
    """The best of the first `eligible` [T] blocks: [T, k] int32; maybe their sort keys.

    A query with none gets anything, and a sequence whose length is 0 has no such query.
    """
    T = queries.q.shape[0]
    is_packed = ragged.table is None and not ragged.is_batch
    is_wide = ragged.n_queries >= (_WIDE if is_packed else SUBLANES)
    row_is_wide = ragged.of_rows(is_wide, T)
    some = ragged.shared_by(T)

    def tiled(wanted: Rows, least: int, tile_t: int) -> Found:
        config = block_filter.heuristic(chip(), some, tile_t)
        tiles = query_tiles.split(ragged, T, (ragged.lengths > 0) & wanted, least, tile_t, config.n_cores)
        return block_filter.block_filter(queries, ragged, tiles, eligible, choice=choice, config=config)

    def side_by_side() -> Found:
        parts, n_tokens = block_filter.heuristic(chip(), some).mean_parts, jnp.where(is_wide, 0, ragged.lengths)
        if ragged.page_sums is not None:
            means = pool.pool_pages(ragged, n_tokens, parts, choice.interpret)
        else:
            means = pool.pool(ragged.keys, n_tokens, choice.interpret) if ragged.means is None else ragged.means
            means = launch.pad_axis(parts_of(means, parts), 1, LANES)
        rows, slot_of_row = few_rows((eligible > 0) & ~row_is_wide, ragged.R * (SUBLANES - 1), ragged.is_batch)
        sequence = ragged.sequence_of(rows.clip(0, T - 1))
        few = take(queries, rows), means, sequence, take(eligible, rows)
        return put(refine.refine(*decode.as_refinement(*few, choice=choice, chip=chip())), slot_of_row)

    wide = functools.partial(tiled, is_wide, SUBLANES, ragged.tile_t(T))
    narrow = functools.partial(tiled, ~is_wide, 1, SUBLANES) if is_packed else side_by_side
    if ragged.is_batch:
        return wide() if is_wide.all() else narrow()
    # Neither runs where it has no query.
    first = lax.cond(jnp.any((eligible > 0) & row_is_wide), wide, nothing_like(wide))
    second = lax.cond(jnp.any((eligible > 0) & ~row_is_wide), narrow, nothing_like(wide))
    return where_rows(row_is_wide, first, second)


def best_by_token(queries: Queries, ragged: Ragged, method: BlockSparse, eligible: Array, choice: Choice) -> Found:
    """As `best_blocks`, by the best token of each block."""
    T, H, _ = queries.q.shape
    size, shared = method.block_size, ragged.shared_by(T)
    task = units.Task(
        block_size=size,
        has_relu=method.activation is not None,
        is_weighted=not method.per_head,
        choice=choice,
    )

    def tiled(wanted: Rows, least: int, tile_t: int) -> Found:
        config = units.Config(tile_t=tile_t, n_cores=chip().n_cores if is_split(tile_t) else 1)
        tiles = query_tiles.split(ragged, T, wanted, least, tile_t, config.n_cores)
        return units.units(queries, ragged, tiles, eligible, task=task, config=config)

    def is_split(tile_t: int) -> bool:
        # Sequences of a batch are split over cores already.
        return tile_t < shared or (ragged.R > 1 and not ragged.is_batch)

    large = units.most_queries(shared, H, -(-ragged.max_keys // size))
    if not ragged.is_batch:
        large = min(large, 1 << (T.bit_length() - 1))  # tiles are windows of q
    if ragged.is_batch or H == 1:
        # A head by itself: of a tile only those queries are multiplied that there are.
        return tiled(ragged.n_queries > 0, 1, large)
    return _of_two_sizes(ragged, eligible > 0, large, tiled)


def candidates(blocks: Array, visible: Array, block_size: int) -> Array:
    """[..., m] ascending block ids, then -1, and [...] visible tokens -> [...] tokens of those blocks that are visible.

    All of a query's blocks are whole but the last, so they come first among its candidates.
    """
    n_kept = jnp.sum(blocks >= 0, axis=-1, dtype=jnp.int32)
    last = jnp.max(blocks, axis=-1)
    return jnp.where(n_kept > 0, (n_kept - 1) * block_size + jnp.minimum(block_size, visible - last * block_size), 0)


def best_tokens(queries: Queries, ragged: Ragged, blocks: Array, choice: Choice) -> Found:
    """The best tokens of some blocks: [T, k] int32 positions; maybe their sort keys.

    Args:
        queries: see `candidates`; one with none gets anything.
        blocks: [T, m] int32, ascending, then -1.
    """
    (T, H, D), m, block_size = queries.q.shape, blocks.shape[1], ragged.block_size
    page_size, itemsize = ragged.keys.values.shape[1], ragged.keys.values.dtype.itemsize
    most = refine.most_resident(block_size, page_size, D, itemsize)
    n = ragged.most_blocks if ragged.is_batch else min(-(-ragged.max_blocks // GROUP) * GROUP, most)
    is_shared = refine.is_shared(ragged.n_queries, ragged.n_blocks, m, min(n, most))
    row_is_shared = ragged.of_rows(is_shared, T)

    def shared() -> Found:
        config = refine.resident(chip(), ragged.shared_by(T), ragged.tile_t(T), H, block_size, itemsize)
        tiles = query_tiles.split(ragged, T, is_shared, SUBLANES, config.tile_t, config.n_cores)
        # Queries that keep all they see need no scores, nor a sequence of such queries its keys.
        lengths = ragged.lengths if choice.has_sort_keys else jnp.where(ragged.lengths > choice.k, ragged.lengths, 0)
        lists = refine.Lists(jnp.minimum(blocks, n - 1), jnp.clip(blocks, 0, n - 1))
        task = refine.Task(choice=choice, config=config, block_size=block_size, n=n)
        return refine.refine(queries, ragged.keys, lists, task, tiles, lengths)

    def side_by_side() -> Found:
        # Of sequences that fit VMEM, those have few queries.
        few = ragged.R * max(SUBLANES - 1, -(-ragged.max_blocks // m) - 1) if ragged.max_blocks <= most else T
        rows, slot_of_row = few_rows((queries.visible > 0) & ~row_is_shared, few, ragged.is_batch)
        own_blocks = take(blocks, rows)
        lists = refine.Lists(own_blocks, ragged.page_index(jnp.maximum(own_blocks, 0), rows.clip(0, T - 1)))
        config = refine.gathered(chip(), len(rows), H, m, block_size)
        task = refine.Task(choice=choice, config=config, block_size=block_size)
        return put(refine.refine(take(queries, rows), ragged.keys, lists, task), slot_of_row)

    if ragged.is_batch:
        return shared() if is_shared.all() else side_by_side()
    is_real = queries.visible > 0
    first = lax.cond(jnp.any(is_real & row_is_shared), shared, nothing_like(shared))
    second = lax.cond(jnp.any(is_real & ~row_is_shared), side_by_side, nothing_like(shared))
    return where_rows(row_is_shared, first, second)


def best_of_all(queries: Queries, ragged: Ragged, choice: Choice, wanted: Rows | bool = True) -> Found:
    """The best of all visible tokens of the ragged sequences that are `wanted` [R]: [T, k] int32.

    A query that sees none, or of another sequence, gets anything.
    """
    T = queries.q.shape[0]
    is_real = (queries.visible > 0) & ragged.of_rows(jnp.broadcast_to(wanted, (ragged.R,)), T)

    def tiled(some: Rows, least: int, tile_t: int) -> Found:
        n_cores = chip().n_cores if tile_t < T else 1
        tiles = query_tiles.split(ragged, T, some & wanted, least, tile_t, n_cores)
        return flat.flat_ragged(queries, ragged, tiles, choice=choice, tile_t=tile_t, n_cores=n_cores)

    large = min(ragged.tile_t(T), flat.heuristic(T, ragged.max_keys).tile_t)
    return _of_two_sizes(ragged, is_real, large, tiled)


def _of_two_sizes(ragged: Ragged, is_real: Array, large: int, tiled: Callable[[Rows, int, int], Found]) -> Found:
    """What ragged sequences find in tiles of `large` queries, or of eight where they have few.

    Args:
        is_real: [T] bool, the queries that look for anything.
        tiled: (wanted sequences, least queries of each, queries of a tile) -> what all queries find.
    """
    is_wide = ragged.n_queries >= _WIDE
    row_is_wide = ragged.of_rows(is_wide, is_real.shape[0])
    wide = functools.partial(tiled, is_wide, _WIDE, large)
    narrow = functools.partial(tiled, ~is_wide, 1, SUBLANES)
    first = lax.cond(jnp.any(is_real & row_is_wide), wide, nothing_like(wide))
    second = lax.cond(jnp.any(is_real & ~row_is_wide), narrow, nothing_like(wide))
    return where_rows(row_is_wide, first, second)


def _first(call: Call, *results: Array) -> tuple[Any, ...]:
    """Of results with rows for queries that were padded, those of the call."""
    return tuple(x[: math.prod(call.shape)] for x in results)
