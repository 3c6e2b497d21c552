"""Exact top-k without a sort: find the k-th largest value, then compact what passes it, in order.

Scores are compared through their *sort key*, the int32 that orders like the float32. Three kinds of candidate never
need a second array: `INVISIBLE` is below every score and is never chosen, `FORCED` is above every score, and NaN
is mapped to the sort key of -inf. Candidates lie in ascending position, so ties at the threshold are broken by
counting from the left.
"""

import math
from collections.abc import Callable

import jax.numpy as jnp
from jax import Array, lax

INVISIBLE = -(2**31)
FORCED = 2**31 - 1
_WORD = 32
_ROWS = 8  # that a CPU's cache holds if they are long
_LONG = 16384
_STRIDE = 16  # of the candidates that show about where the threshold is


def sort_key_of(scores: Array, bitcast: Callable = lax.bitcast_convert_type) -> Array:
    """Maps float32 to int32 so that order is kept; NaN maps to the sort key of -inf, -0.0 to that of 0.0.

    Kernels have it from here, some with a `bitcast` of their own.
    """
    scores = jnp.where(scores != scores, -jnp.inf, scores)
    # A negative weight on a closed relu gives -0.0, which must tie with 0.0. (XLA drops an added zero, not a select.)
    scores = jnp.where(scores == 0.0, 0.0, scores)
    bits = bitcast(scores, jnp.int32)
    return jnp.where(bits < 0, bits ^ FORCED, bits)


def score_of(sort_key: Array, bitcast: Callable = lax.bitcast_convert_type) -> Array:
    """Inverts `sort_key_of`."""
    return bitcast(jnp.where(sort_key < 0, sort_key ^ FORCED, sort_key), jnp.float32)


def kth_largest(sort_key: Array, k: int | Array) -> Array:
    """[T, S] int32 -> [T] int32: the k-th largest of each row, by bisection on the value; k <= S, [T] or one of all."""

    def unfinished(bounds: tuple[Array, Array]) -> Array:
        low, high = bounds
        return jnp.any(low < high)

    def halve(bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = (low >> 1) + (high >> 1) + ((low | high) & 1)  # the mean, rounded up, without overflow
        count = jnp.sum(sort_key >= middle[:, None], axis=1, dtype=jnp.int32)
        # Any threshold that exactly k values pass selects them as well as the k-th value itself: stop there.
        high = jnp.where(count == k, middle, jnp.where(count > k, high, middle - 1))
        return jnp.where(count >= k, middle, low), high

    return lax.while_loop(unfinished, halve, (jnp.min(sort_key, axis=1), jnp.max(sort_key, axis=1)))[0]


def chosen_mask(sort_key: Array, k: int | Array, positions: Array | None = None) -> Array:
    """[T, S] int32 -> [T, S] bool: the k largest visible values of each row, all of them if there are fewer.

    k is one for all rows, or [T] int32 and at most S.
    Of equal values those in front, or those with the lowest `positions`, [T, S] int32, all different.
    """
    S = sort_key.shape[1]
    if isinstance(k, int) and k >= S:
        return sort_key > INVISIBLE
    threshold = kth_largest(sort_key, k)[:, None]
    above, at_threshold = sort_key > threshold, sort_key == threshold
    room = (k - jnp.sum(above, axis=1, dtype=jnp.int32))[:, None]

    def first_at_threshold() -> Array:
        if positions is None:
            return at_threshold & (jnp.cumsum(at_threshold, axis=1, dtype=jnp.int32) <= room)
        order = jnp.where(at_threshold, -positions, INVISIBLE)
        return at_threshold & (order >= kth_largest(order, room[:, 0])[:, None])

    # Ties at the threshold are rare, and to find the first of them costs as much as to find the threshold.
    is_tied = jnp.any(jnp.sum(at_threshold, axis=1, keepdims=True, dtype=jnp.int32) > room)
    return (above | lax.cond(is_tied, first_at_threshold, lambda: at_threshold)) & (sort_key > INVISIBLE)


def words_of(mask: Array) -> Array:
    """[T, S] bool -> [T, ceil(S / 32)] uint32: column 0 is the lowest bit of word 0."""
    T, S = mask.shape
    bits = jnp.pad(mask, ((0, 0), (0, -S % _WORD))).reshape(T, -1, _WORD).astype(jnp.uint32)
    return jnp.sum(bits << jnp.arange(_WORD, dtype=jnp.uint32)[None, None, :], axis=-1, dtype=jnp.uint32)


def columns_of(words: Array, k: int) -> tuple[Array, Array]:
    """The columns of the first k set bits of each row.

    [T, n] uint32, see `words_of` -> [T, k] int32 columns, ascending, then 0; [T, k] bool, which slots are filled.

    Each word writes its number into the first slot that it fills, the others, at most 31, take it from there; each slot
    then looks up its bit in the word. A scatter of S elements would be a serial loop on CPUs.
    """
    T, n_words = words.shape
    counts = lax.population_count(words).astype(jnp.int32)
    ends = jnp.cumsum(counts, axis=1)
    starts = ends - counts
    first_slots = jnp.where(counts > 0, starts, k)  # k: nowhere
    ids = jnp.broadcast_to(jnp.arange(n_words, dtype=jnp.int32), words.shape)
    rows = jnp.arange(T, dtype=jnp.int32)[:, None]
    word_ids = jnp.zeros((T, k), jnp.int32).at[rows, first_slots].max(ids, mode="drop")
    for shift in (1, 2, 4, 8, 16):
        word_ids = jnp.maximum(word_ids, jnp.pad(word_ids, ((0, 0), (shift, 0)))[:, :k])
    slots = jnp.arange(k, dtype=jnp.int32)[None, :]
    nth = slots - jnp.take_along_axis(starts, word_ids, axis=1)
    columns = word_ids * _WORD + _nth_set_bit(jnp.take_along_axis(words, word_ids, axis=1), nth)
    filled = slots < ends[:, -1:]
    return jnp.where(filled, columns, 0), filled


def _nth_set_bit(word: Array, nth: Array) -> Array:
    """Index of the set bit number `nth` (from 0, lowest first) of each uint32."""
    position = jnp.zeros_like(nth)
    for width in (16, 8, 4, 2, 1):
        low = word & jnp.uint32((1 << width) - 1)
        in_low = lax.population_count(low).astype(jnp.int32)
        in_upper_half = nth >= in_low
        nth = jnp.where(in_upper_half, nth - in_low, nth)
        word = jnp.where(in_upper_half, word >> width, low)
        position = position + jnp.where(in_upper_half, width, 0)
    return position


def topk_in_order(sort_key: Array, positions: Array | None, k: int) -> tuple[Array, Array]:
    """The k best candidates of each row, in the order in which they stand.

    Args:
        sort key: [T, S] int32, `INVISIBLE` where there is no candidate.
        positions: [T, S] int32, ascending among the visible; None: 0, 1, 2, ...
        k: how many to choose.

    Where k is a small part of S, a threshold from every 16th candidate throws most away before the exact one is found;
    should it have thrown away too many or too few, the whole row is searched.

    Returns: sort key and position of the chosen, [T, k] each; empty slots hold `INVISIBLE` and -1.
    """
    T, S = sort_key.shape
    if T <= _ROWS or S < _LONG:
        found, columns = _best_in_order(sort_key, k)
    else:
        found, columns = _best_of_long_rows(sort_key, k)
    if positions is None:
        return found, columns
    return found, jnp.where(columns >= 0, jnp.take_along_axis(positions, jnp.maximum(columns, 0), axis=1), -1)


def _best_of_long_rows(sort_key: Array, k: int) -> tuple[Array, Array]:
    T, S = sort_key.shape

    def by_groups(sort_key: Array) -> tuple[Array, Array]:
        groups = jnp.pad(sort_key, ((0, -T % _ROWS), (0, 0)), constant_values=INVISIBLE).reshape(-1, _ROWS, S)
        found, columns = lax.map(lambda rows: _best_in_order(rows, k), groups)
        return found.reshape(-1, k)[:T], columns.reshape(-1, k)[:T]

    # A CPU's cache holds a few long rows, and they are read again and again.
    return lax.platform_dependent(sort_key, cpu=by_groups, default=lambda sort_key: _best_in_order(sort_key, k))


def _best_in_order(sort_key: Array, k: int) -> tuple[Array, Array]:
    """[T, S] int32 -> sort key and column of the k best of each row, [T, k] each, ascending."""
    S = sort_key.shape[1]
    rank = -(-k * (S // _STRIDE) // S)  # of the threshold among the sampled
    slack = 4 * math.isqrt(rank) + 4  # four standard deviations
    room = _STRIDE * (rank + 2 * slack)

    def best() -> tuple[Array, Array]:
        return _take(sort_key, words_of(chosen_mask(sort_key, k)), k)

    if 4 * room > S:
        return best()
    threshold = jnp.maximum(kth_largest(sort_key[:, ::_STRIDE], rank + slack), INVISIBLE + 1)
    above = words_of(sort_key >= threshold[:, None])
    count = jnp.sum(lax.population_count(above).astype(jnp.int32), axis=1)
    holds_best = ((count >= k) | (threshold == INVISIBLE + 1)) & (count <= room)

    def best_above() -> tuple[Array, Array]:
        few, columns = _take(sort_key, above, room)
        found, places = _take(few, words_of(chosen_mask(few, k)), k)
        return found, jnp.where(places >= 0, jnp.take_along_axis(columns, jnp.maximum(places, 0), axis=1), -1)

    return lax.cond(jnp.all(holds_best), best_above, best)


def _take(sort_key: Array, words: Array, k: int) -> tuple[Array, Array]:
    """The candidates in a mask, at most k a row: sort key and column, [T, k] each, `INVISIBLE` and -1 after them."""
    columns, filled = columns_of(words, k)
    return jnp.where(filled, jnp.take_along_axis(sort_key, columns, axis=1), INVISIBLE), jnp.where(filled, columns, -1)


def within(sort_key: Array, ids: Array, most: Array) -> tuple[Array, Array]:
    """Of rows [T, k] the best `most` [T] int32, in the order in which they stand; `INVISIBLE` and -1 after them."""
    k = ids.shape[1]
    columns, filled = columns_of(words_of(chosen_mask(sort_key, jnp.clip(most, 0, k))), k)
    sort_key, ids = (jnp.take_along_axis(x, columns, axis=1) for x in (sort_key, ids))
    return jnp.where(filled, sort_key, INVISIBLE), jnp.where(filled, ids, -1)


def topk_of_any_order(sort_key: Array, positions: Array, k: int) -> tuple[Array, Array]:
    """As `topk_in_order`, where the candidates of a row stand in any order; the chosen come out ascending."""
    columns, filled = columns_of(words_of(chosen_mask(sort_key, k, positions)), k)
    sort_key = jnp.take_along_axis(sort_key, columns, axis=1)
    positions = jnp.where(filled, jnp.take_along_axis(positions, columns, axis=1), jnp.iinfo(jnp.int32).max)
    positions, sort_key = lax.sort((positions, sort_key), dimension=1, num_keys=1)  # the empty slots stay last
    return jnp.where(filled, sort_key, INVISIBLE), jnp.where(filled, positions, -1)
