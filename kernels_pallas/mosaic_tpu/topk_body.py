"""Exact top-k of rows of sort keys that lie in VMEM: functions for the inside of any kernel.

Sort keys lie as [tiles, G * 8, 128]: a tile is 8 rows, a group 128 candidates, and sublane 8 g + r holds group g of
row r, so that one vector register holds a group of a tile. That is the memory order of a [rows, candidates] array.
The three steps of a selection:

1. `find_thresholds`: the threshold of each row, all rows side by side, by counting how many sort keys reach a guess.
2. `drop_late_ties`: where more than k reach the threshold, the late ones at the threshold are made `INVISIBLE`.
3. `chosen_columns`: the columns whose sort key reaches the threshold, ascending. A TPU has no scatter, so every output
   slot finds its own column. One matrix product turns 128 comparisons into four words of 32 bits, their partial counts
   and the group's total, with a row's groups along the lanes; a second one adds up the totals. A slot then searches
   the totals for its group (lane gathers), the partial counts for its word, and the word for its bit.
"""

import functools

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

from hisa_jax.kernels_pallas.bits import is_any, quotient
from hisa_jax.kernels_pallas.mosaic_tpu.config import LANES, SUBLANES
from hisa_jax.kernels_pallas.mosaic_tpu.threshold_body import (
    along_lanes,
    find_thresholds,
    load_groups,
    n_groups_of,
    span_of,
    unroll_of,
)
from hisa_jax.kernels_pallas.sort_key import INVISIBLE
from hisa_jax.kernels_pallas.types import Ref

SLOTS = SUBLANES * LANES  # output slots that one vector register holds
_WORDS, _COUNTS, _TOTALS, _STARTS = 0, 4, 5, 6  # rows of the tables; four rows of words
Groups = Array | int | None  # how many groups are looked at, the first
_GATHER = lax.GatherDimensionNumbers((), (1,), (1,), operand_batching_dims=(0,), start_indices_batching_dims=(0,))


def select(
    sort_keys_ref: Ref,
    n: Array,
    k: int,
    thresholds_ref: Ref,
    table_ref: Ref,
    out_ref: Ref,
    groups: Groups = None,
    searched: Groups = None,
    registers: int = 1,
) -> None:
    """The columns of the k largest sort keys of every row, ascending, then -1; the lowest columns win ties.

    Args:
        sort_keys_ref: [tiles, G * 8, 128] int32; changed where there are ties.
        n: [tiles, 8, 128] int32, sort keys of each row that are not `INVISIBLE`, the same along the lanes.
        thresholds_ref: scratch, [tiles, 8, 128] int32; `table_ref`: scratch, int32, of `table_shape(G)`.
        out_ref: [tiles, K // 16, 128] int32, K a multiple of 1024, as the sort keys lie; the first k and those up to
            the next multiple of 128 are written.
        groups: only so many groups are looked at, the first; a multiple of min(G, 128). All if None.
        searched: the same for the thresholds, a multiple of what a step of their search takes.
        registers: of slots, that are filled together, as `chosen_columns` says.
    """
    scanned = n_groups_of(sort_keys_ref) if groups is None else groups
    scanned = scanned if searched is None else searched
    thresholds, reached = find_thresholds(sort_keys_ref, n, k, scanned)
    drop_late_ties(sort_keys_ref, thresholds, reached, k, scanned)  # now min(n, k) sort keys of each row reach it
    thresholds_ref[...] = thresholds

    def one_tile(tile, _):
        chosen_columns(sort_keys_ref, tile, thresholds_ref, table_ref, out_ref.at[tile], groups, k, registers)
        return _

    lax.fori_loop(0, sort_keys_ref.shape[0], one_tile, None)


def drop_late_ties(sort_keys_ref: Ref, thresholds: Array, reached: Array, k: int, groups: Array | int) -> None:
    """Makes `INVISIBLE` what reaches the threshold but comes after the k-th: the late ones of those equal to it."""

    @pl.when(is_any(reached > k))
    def _some_row_has_ties():
        unroll = unroll_of(sort_keys_ref, 32)

        def columns(i):
            return _columns(sort_keys_ref.shape[0], unroll, i * unroll)

        def chosen_before(limit):
            def some(i, total):
                x = load_groups(sort_keys_ref, i, unroll)
                threshold = thresholds[:, None]
                chosen = (x > threshold) | ((x == threshold) & (columns(i) < limit[:, None]))
                return total + jnp.sum(jnp.where(chosen, 1.0, 0.0), axis=1)

            return along_lanes(
                jnp.sum, lax.fori_loop(0, quotient(groups, unroll), some, jnp.zeros(thresholds.shape, jnp.float32))
            )

        def halve(_, bounds):
            low, high = bounds  # fewer than k, at least k
            middle = (low + high) >> 1
            enough = chosen_before(middle) >= k
            return jnp.where(enough, low, middle), jnp.where(enough, middle, high)

        n = n_groups_of(sort_keys_ref) * LANES
        whole = (jnp.zeros_like(thresholds), jnp.full(thresholds.shape, n, jnp.int32))
        limit = lax.fori_loop(0, n.bit_length(), halve, whole)[1]

        def drop(i, _):
            x = load_groups(sort_keys_ref, i, unroll)
            late = (x == thresholds[:, None]) & (columns(i) >= limit[:, None]) & (reached[:, None] > k)
            kept = jnp.where(late, INVISIBLE, x).reshape(x.shape[0], -1, LANES)
            sort_keys_ref[:, pl.ds(i * unroll * SUBLANES, unroll * SUBLANES)] = kept
            return _

        lax.fori_loop(0, quotient(groups, unroll), drop, None)


def table_shape(n_groups: int) -> tuple[int, int, int]:
    """Of the int32 VMEM scratch that `chosen_columns` needs."""
    return (max(SUBLANES * span_of(n_groups) // LANES, 1), SUBLANES, LANES)


def chosen_columns(
    sort_keys_ref: Ref,
    tile: Array | int,
    thresholds_ref: Ref,
    table_ref: Ref,
    out_ref: Ref,
    groups: Groups = None,
    k: int | None = None,
    at_once: int = 1,
) -> None:
    """Writes the columns of a tile's sort keys that reach the threshold, ascending, then -1.

    Args:
        sort_keys_ref: [tiles, G * 8, 128] int32; G = 8, 16, 32, 64 or a multiple of 128.
        thresholds_ref: [tiles, 8, 128] int32, the same along the lanes, above `INVISIBLE`.
        table_ref: scratch, int32, of `table_shape(G)`.
        out_ref: [K // 16, 128] int32, as the sort keys lie; K a multiple of 1024, and no row has more than K sort keys
            that reach its threshold.
        k: how many do at most, if that is known; then no more are written, but for whole registers.
        at_once: registers of slots that are filled together if a span of 128 groups fills one of them. Where one span
            fills most, two side by side take 600 cycles on v6e, one after the other 940.
    """
    n_groups = n_groups_of(sort_keys_ref)
    span = span_of(n_groups)
    if k is not None and k <= LANES and n_groups * SUBLANES <= LANES:
        totals = _write_tables(sort_keys_ref, tile, 0, span, thresholds_ref, table_ref)
        _write_few(totals, span, table_ref, out_ref)
        return
    registers = out_ref.shape[0] * LANES // (SUBLANES * SLOTS)

    def write(i, register, before, totals):
        for row in range(SUBLANES):
            # Row `row` of eight groups of slots: one strided store.
            at = pl.ds(register * SUBLANES * SUBLANES + row, SUBLANES, stride=SUBLANES)
            slot = _slots(register) - before[row]
            table = table_ref.at[row * span // LANES]
            column = _column_of_slot(slot, row * span % LANES, span, table) + i * span * LANES
            inside = slot < totals[row]
            if span == n_groups:
                out_ref[at, :] = jnp.where(inside, column, -1)
            else:
                out_ref[at, :] = jnp.where((slot >= 0) & inside, column, out_ref[at, :])

    def one_span(i, before):
        totals = _write_tables(sort_keys_ref, tile, i * span, span, thresholds_ref, table_ref)
        after = tuple(a + b for a, b in zip(before, totals, strict=True))
        if span == n_groups:
            for register in range(registers):
                write(i, register, before, totals)
            return after
        # A span fills few of the slots: most registers of them are left alone.
        first, last = jnp.min(functools.reduce(jnp.minimum, before)), jnp.max(functools.reduce(jnp.maximum, after))
        for some in range(0, registers, at_once):
            end = min(some + at_once, registers)

            @pl.when((first < end * SLOTS) & (last > some * SLOTS))
            def _write(some=some, end=end):
                for register in range(some, end):
                    write(i, register, before, totals)

        return after

    none = tuple(jnp.zeros((SUBLANES, LANES), jnp.int32) for _ in range(SUBLANES))
    if span == n_groups:
        one_span(0, none)
    else:
        out_ref[...] = jnp.full(out_ref.shape, -1, jnp.int32)
        lax.fori_loop(0, quotient(n_groups if groups is None else groups, span), one_span, none)


def _write_tables(
    sort_keys_ref: Ref, tile: Array | int, first: Array | int, span: int, thresholds_ref: Ref, table_ref: Ref
) -> list[Array]:
    """Tables of `span` groups from the `first` on; returns how many are chosen in each row, [8, 128] splats."""
    chosen, totals = [], []
    for row in range(SUBLANES):
        threshold = jnp.broadcast_to(thresholds_ref[tile, row : row + 1], (SUBLANES, LANES))
        total = jnp.zeros((SUBLANES, LANES), jnp.float32)
        for group in range(0, span, SUBLANES):
            # Eight groups of one row are one strided load.
            x = sort_keys_ref[tile, pl.ds((first + group) * SUBLANES + row, SUBLANES, stride=SUBLANES)]
            x = jnp.where(x >= threshold, 1.0, 0.0)
            chosen.append(x)
            total += x
        totals.append(splat_sum(total))
    chosen += [jnp.zeros((SUBLANES, LANES), jnp.float32)] * (table_ref.shape[0] * LANES // SUBLANES - len(chosen))
    matrix = jnp.concatenate(chosen, axis=0).astype(jnp.bfloat16)  # [8 * span, 128]
    both = _contract_lanes(_packing(), matrix).astype(jnp.int32)  # [16, 8 * span]
    words = both[:SUBLANES] | both[SUBLANES:] << 16
    per_group = words[_TOTALS : _TOTALS + 1].reshape(1, -1)
    lanes = [per_group[:, i * LANES : (i + 1) * LANES] for i in range(table_ref.shape[0])]
    lanes += [jnp.zeros((1, LANES), jnp.int32)] * (-len(lanes) % SUBLANES)
    starts = jnp.dot(
        jnp.concatenate(lanes, axis=0).astype(jnp.float32).astype(jnp.bfloat16),
        _before(span),
        preferred_element_type=jnp.float32,
    ).astype(jnp.int32)
    for i in range(table_ref.shape[0]):
        table_ref[i] = words[:, i * LANES : (i + 1) * LANES]
        table_ref[i, _STARTS : _STARTS + 1] = starts[i : i + 1]
    return totals


def _write_few(totals: list[Array], span: int, table_ref: Ref, out_ref: Ref) -> None:
    """Up to 128 columns of each of eight rows, whose groups all have a lane of one table: the rows side by side.

    Else each row has a register of slots of its own, of which the last seven eighths stay empty.
    """
    row = lax.broadcasted_iota(jnp.int32, (SUBLANES, LANES), 0)
    slot = lax.broadcasted_iota(jnp.int32, (SUBLANES, LANES), 1)
    total = totals[0]
    for i in range(1, SUBLANES):
        total = jnp.where(row == i, totals[i], total)
    column = _column_of_slot(slot, row * span, span, table_ref.at[0])
    out_ref[pl.ds(0, SUBLANES)] = jnp.where(slot < total, column, -1)


def _column_of_slot(slot: Array, lane: Array | int, span: int, table: Ref) -> Array:
    """[8, 128] -> [8, 128]: the column, within the span, of a row's chosen sort key number `slot`.

    Args:
        lane: of the row's first group in the table [8, 128], one for all slots or [8, 128].
    """

    def along(entry):
        return jnp.broadcast_to(table[entry : entry + 1, :], (SUBLANES, LANES))

    starts = along(_STARTS)
    group, start = jnp.broadcast_to(jnp.int32(lane), slot.shape), jnp.zeros_like(slot)
    step = span // 2
    while step:  # the last group that starts at or before the slot
        further = group + step
        found = _gather_lanes(starts, further)
        early = found <= slot
        group, start = jnp.where(early, further, group), jnp.where(early, found, start)
        step //= 2
    rank = slot - start
    packed = _gather_lanes(along(_COUNTS), group)
    counts = (packed & 63, (packed >> 6) & 127, packed >> 16)  # of one, two and three words
    word, before, bit = _gather_lanes(along(_WORDS), group), jnp.zeros_like(rank), jnp.zeros_like(rank)
    for i, count in enumerate(counts, 1):
        later = rank >= count
        word = jnp.where(later, _gather_lanes(along(_WORDS + i), group), word)
        before, bit = jnp.where(later, count, before), jnp.where(later, 32 * i, bit)
    return (group - lane) * LANES + bit + _bit_of_rank(word, rank - before)


def _bit_of_rank(word: Array, rank: Array) -> Array:
    """The set bit that has `rank` set bits below it, by bisection."""
    bit = jnp.zeros_like(rank)
    for step in (16, 8, 4, 2, 1):
        further = bit + step
        below = lax.population_count(word & ((1 << further) - 1))
        bit = jnp.where(below <= rank, further, bit)
    return bit


def _packing() -> Array:
    """[16, 128] bfloat16, exact: what the 128 comparisons of a group are multiplied with."""
    entry = lax.broadcasted_iota(jnp.int32, (2 * SUBLANES, LANES), 0)
    lane = lax.broadcasted_iota(jnp.int32, (2 * SUBLANES, LANES), 1)
    is_high, entry = entry >= SUBLANES, entry % SUBLANES
    word, bit = lax.div(lane, 32), lane % 32
    half = jnp.where(is_high, bit - 16, bit)
    bits = jnp.where((word == entry) & (half >= 0) & (half < 16), 1 << (half & 15), 0)
    low = jnp.where(word < 1, 1, 0) + jnp.where(word < 2, 64, 0)
    counts = jnp.where(is_high, jnp.where(word < 3, 1, 0), low)
    total = jnp.where(is_high, 0, 1)
    weights = jnp.where(entry < _COUNTS, bits, jnp.where(entry == _COUNTS, counts, total))
    return jnp.where(entry > _TOTALS, 0, weights).astype(jnp.float32).astype(jnp.bfloat16)


def _before(span: int) -> Array:
    """[128, 128] bfloat16: ones where a lane is of the same row and before."""
    i = lax.broadcasted_iota(jnp.int32, (LANES, LANES), 0)
    j = lax.broadcasted_iota(jnp.int32, (LANES, LANES), 1)
    return jnp.where((i < j) & (lax.div(i, span) == lax.div(j, span)), 1.0, 0.0).astype(jnp.bfloat16)


def _slots(register: int) -> Array:
    """[8, 128]: the output slots of a register."""
    sublane = lax.broadcasted_iota(jnp.int32, (SUBLANES, LANES), 0)
    return register * SLOTS + sublane * LANES + lax.broadcasted_iota(jnp.int32, (SUBLANES, LANES), 1)


def _columns(tiles: int, n: int, first: Array | int) -> Array:
    """[tiles, n, 8, 128]: the columns of n groups."""
    shape = (tiles, n, SUBLANES, LANES)
    return (lax.broadcasted_iota(jnp.int32, shape, 1) + first) * LANES + lax.broadcasted_iota(jnp.int32, shape, 3)


def splat_sum(x: Array) -> Array:
    """[8, 128] float32 -> its sum everywhere, int32."""
    return jnp.broadcast_to(jnp.sum(jnp.sum(x, axis=0, keepdims=True), axis=1, keepdims=True), x.shape).astype(
        jnp.int32
    )


def _contract_lanes(a: Array, b: Array) -> Array:
    return lax.dot_general(a, b, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)


def _gather_lanes(x: Array, lane: Array) -> Array:
    return lax.gather(x, lane[..., None], _GATHER, (1, 1), mode=lax.GatherScatterMode.PROMISE_IN_BOUNDS)
