"""Device code of `topk`: one row a program."""

import functools
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from hisa_jax.kernels_pallas.sort_key import FORCED, INVISIBLE, KTH_SLACK, find_threshold
from hisa_jax.kernels_pallas.types import Ref


class TopkInputs(NamedTuple):
    """A query's rows."""

    x: Ref  # [W] sort keys
    limit: Ref  # [1]
    block_ids: Ref | None  # [m]
    most: Ref | None = None  # [1]


class MergeInputs(NamedTuple):
    """A query's rows of the best so far and of a tile of candidates; the tile's first position."""

    best: Ref  # [k] sort keys
    positions: Ref  # [k]
    x: Ref  # [W] sort keys
    start: Ref  # [1]
    limit: Ref  # [1]


class KthInputs(NamedTuple):
    """A query's row."""

    x: Ref  # [W] sort keys
    limit: Ref  # [1]
    rank: Ref  # [1]


def topk_body(refs: TopkInputs, o_ref: Ref, count_ref: Ref, *sort_keys_ref: Ref, k: int, block_size: int) -> None:
    # One program, one row:   load once -> 6 to 9 counts over registers find the threshold -> one scan -> masked stores
    #
    # A thread keeps its sort keys in registers from the load to the store; each count ends in a sum over the program,
    # for which its warps wait for each other. out: [k], [1], maybe [k] sort keys.
    columns, x = _load(refs.x, refs.limit[0])
    chosen, slots, count = choose(x, k if refs.most is None else jnp.clip(refs.most[0], 0, k))
    positions = columns
    if refs.block_ids is not None:
        block = jnp.where(chosen, columns // block_size, 0)
        block_id = plt.load(refs.block_ids.at[block], mask=chosen, other=0)
        positions = block_id * block_size + columns % block_size
    plt.store(o_ref.at[slots], positions, mask=chosen)
    _fill(o_ref, count, k, -1)
    for o_sort_keys_ref in sort_keys_ref:
        plt.store(o_sort_keys_ref.at[slots], x, mask=chosen)
        _fill(o_sort_keys_ref, count, k, INVISIBLE)
    count_ref[0] = count


def kth_body(refs: KthInputs, o_ref: Ref) -> None:
    # As `topk_body`, but for what is chosen: the threshold alone. out: [1].
    _, x = _load(refs.x, refs.limit[0])
    rank = refs.rank[0]
    o_ref[0] = threshold_of((x,), rank, rank // KTH_SLACK)[0]


def merge_topk_body(refs: MergeInputs, o_best_ref: Ref, o_positions_ref: Ref) -> None:
    # One program, one row:   the k best so far | the tile's W columns   as one row of registers, then as `topk_body`
    #
    # Old positions are below new ones, so column order is position order and ties go to the lower. out: [k] twice.
    W, k = refs.x.shape[0], refs.best.shape[0]
    columns = jnp.arange(pl.next_power_of_2(k + W), dtype=jnp.int32)
    start = refs.start[0]
    old = columns < k
    new = (columns >= k) & (columns - k < jnp.minimum(W, refs.limit[0] - start))
    kept_slot, new_column = jnp.where(old, columns, 0), jnp.where(new, columns - k, 0)
    kept = plt.load(refs.best.at[kept_slot], mask=old, other=INVISIBLE)
    x = jnp.where(old, kept, plt.load(refs.x.at[new_column], mask=new, other=INVISIBLE))
    kept_position = plt.load(refs.positions.at[kept_slot], mask=old, other=-1)
    positions = jnp.where(old, kept_position, start + columns - k)
    chosen, slots, count = choose(x, k)
    plt.store(o_best_ref.at[slots], x, mask=chosen)
    plt.store(o_positions_ref.at[slots], positions, mask=chosen)
    _fill(o_best_ref, count, k, INVISIBLE)
    _fill(o_positions_ref, count, k, -1)


def _load(x_ref: Ref, limit: Array) -> tuple[Array, Array]:
    W = x_ref.shape[0]
    columns = jnp.arange(pl.next_power_of_2(W), dtype=jnp.int32)
    there = columns < jnp.minimum(limit, W)
    return columns, plt.load(x_ref.at[jnp.where(there, columns, 0)], mask=there, other=INVISIBLE)


def threshold_of(parts: tuple[Array, ...], k: int | Array, slack: int | Array = 0) -> tuple[Array, Array]:
    """Sort keys, in parts of [W] -> what the k best reach, or k to k + slack of them; how many there are.

    As `find_threshold`: exactly k reach it, unless more tie with the k-th.
    """

    def count_at_least(sort_key: Array) -> Array:
        return jnp.sum(functools.reduce(jnp.add, [(x >= sort_key).astype(jnp.int32) for x in parts]))

    n = count_at_least(jnp.int32(INVISIBLE + 1))
    lowest = jnp.min(functools.reduce(jnp.minimum, [jnp.where(x > INVISIBLE, x, FORCED) for x in parts]))
    # An unbounded end would reduce the search to halving.
    finite = [jnp.where(x == FORCED, INVISIBLE, x) for x in parts]
    highest = jnp.maximum(jnp.max(functools.reduce(jnp.maximum, finite)), lowest)
    return find_threshold(count_at_least, lowest, highest, n, k, slack=slack), n


def choose(x: Array, k: int | Array) -> tuple[Array, Array, Array]:
    """[W] sort keys -> [W] bool, chosen; [W] int32, the slot of each chosen; how many are chosen."""
    threshold, n = threshold_of((x,), k)
    visible = x > INVISIBLE
    above, at_threshold = visible & (x > threshold), visible & (x == threshold)
    room = k - jnp.sum(above.astype(jnp.int32))
    # Both running counts in one scan: those above in the high half, those at the threshold in the low half.
    counts = jnp.cumsum(above.astype(jnp.int32) * 65536 + at_threshold.astype(jnp.int32))
    n_above, n_at_threshold = counts >> 16, counts & 0xFFFF
    chosen = above | (at_threshold & (n_at_threshold <= room))
    # The slot of a column that is not chosen is the next free one: interpret mode writes there, before its owner does.
    slots = n_above + jnp.minimum(n_at_threshold, room) - chosen.astype(jnp.int32)
    return chosen, slots, jnp.minimum(n, k)


def _fill(o_ref: Ref, count: Array, k: int, value: int) -> None:
    slots = jnp.arange(pl.next_power_of_2(k), dtype=jnp.int32)
    empty = (slots >= count) & (slots < k)
    plt.store(o_ref.at[slots], jnp.full(slots.shape, value, jnp.int32), mask=empty)
