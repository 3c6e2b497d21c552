"""Device code of `topk`: one row a program."""

import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from hisa_jax.kernels_pallas.sort_key import FORCED, INVISIBLE, find_threshold
from hisa_jax.kernels_pallas.types import Ref


def topk_body(x_ref: Ref, limit_ref: Ref, *refs: Ref, k: int, block_size: int) -> None:
    *block_ids_ref, o_ref, count_ref = refs  # in: [W], [1], maybe [m]; out: [k], [1]
    columns, x = _load(x_ref, limit_ref[0])
    chosen, slots, count = _choose(x, k)
    positions = columns
    if block_ids_ref:
        block = jnp.where(chosen, columns // block_size, 0)
        block_id = plt.load(block_ids_ref[0].at[block], mask=chosen, other=0)
        positions = block_id * block_size + columns % block_size
    plt.store(o_ref.at[slots], positions, mask=chosen)
    _fill(o_ref, count, k, -1)
    count_ref[0] = count


def merge_topk_body(
    best_ref: Ref,
    positions_ref: Ref,
    x_ref: Ref,
    start_ref: Ref,
    limit_ref: Ref,
    o_best_ref: Ref,
    o_positions_ref: Ref,
    *,
    k: int,
) -> None:
    W = x_ref.shape[0]
    columns = jnp.arange(pl.next_power_of_2(k + W), dtype=jnp.int32)
    start = start_ref[0]
    old = columns < k
    new = (columns >= k) & (columns - k < jnp.minimum(W, limit_ref[0] - start))
    kept_slot, new_column = jnp.where(old, columns, 0), jnp.where(new, columns - k, 0)
    kept = plt.load(best_ref.at[kept_slot], mask=old, other=INVISIBLE)
    x = jnp.where(old, kept, plt.load(x_ref.at[new_column], mask=new, other=INVISIBLE))
    kept_position = plt.load(positions_ref.at[kept_slot], mask=old, other=-1)
    positions = jnp.where(old, kept_position, start + columns - k)
    chosen, slots, count = _choose(x, k)
    plt.store(o_best_ref.at[slots], x, mask=chosen)
    plt.store(o_positions_ref.at[slots], positions, mask=chosen)
    _fill(o_best_ref, count, k, INVISIBLE)
    _fill(o_positions_ref, count, k, -1)


def _load(x_ref: Ref, limit: Array) -> tuple[Array, Array]:
    W = x_ref.shape[0]
    columns = jnp.arange(pl.next_power_of_2(W), dtype=jnp.int32)
    there = columns < jnp.minimum(limit, W)
    return columns, plt.load(x_ref.at[jnp.where(there, columns, 0)], mask=there, other=INVISIBLE)


def _choose(x: Array, k: int) -> tuple[Array, Array, Array]:
    """[W] sort keys -> [W] bool, chosen; [W] int32, the slot of each chosen; how many are chosen."""
    count_at_least = lambda sort_key: jnp.sum((x >= sort_key).astype(jnp.int32))  # noqa: E731
    n = count_at_least(jnp.int32(INVISIBLE + 1))
    lowest = jnp.min(jnp.where(x > INVISIBLE, x, FORCED))
    # An unbounded end would reduce the search to halving.
    highest = jnp.maximum(jnp.max(jnp.where(x == FORCED, INVISIBLE, x)), lowest)
    threshold = find_threshold(count_at_least, lowest, highest, n, k)
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
