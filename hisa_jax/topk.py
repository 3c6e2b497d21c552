"""Exact top-k without a sort: find the k-th largest value, then compact what passes it, in order.

Scores are compared through their *image*, the int32 that orders like the float32. Three kinds of candidate never need
a second array: `INVISIBLE` is below every score and is never chosen, `FORCED` is above every score, and NaN is mapped
to the image of -inf. Candidates lie in ascending position, so a tie at the cut is broken by counting from the left.
"""

import jax
import jax.numpy as jnp
from jax import Array, lax

INVISIBLE = jnp.iinfo(jnp.int32).min
FORCED = jnp.iinfo(jnp.int32).max
_WORD = 32


def image_of(scores: Array) -> Array:
    """Maps float32 to int32 so that order is kept; NaN maps to the image of -inf, -0.0 to that of 0.0."""
    scores = jnp.where(jnp.isnan(scores), -jnp.inf, scores)
    # A negative weight on a closed relu gives -0.0, which must tie with 0.0. (XLA drops an added zero, not a select.)
    scores = jnp.where(scores == 0, 0.0, scores)
    bits = lax.bitcast_convert_type(scores, jnp.int32)
    return jnp.where(bits < 0, bits ^ FORCED, bits)


def score_of(image: Array) -> Array:
    """Inverts `image_of`."""
    return lax.bitcast_convert_type(jnp.where(image < 0, image ^ FORCED, image), jnp.float32)


def kth_largest(image: Array, k: int | Array) -> Array:
    """[T, S] int32 -> [T] int32: the k-th largest of each row, by bisection on the value; k <= S, [T] or one of all."""

    def unfinished(bounds: tuple[Array, Array]) -> Array:
        low, high = bounds
        return jnp.any(low < high)

    def halve(bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = (low >> 1) + (high >> 1) + ((low | high) & 1)  # the mean, rounded up, without overflow
        count = jnp.sum(image >= middle[:, None], axis=1, dtype=jnp.int32)
        # Any cut that exactly k values pass selects them as well as the k-th value itself would: stop there.
        high = jnp.where(count == k, middle, jnp.where(count > k, high, middle - 1))
        return jnp.where(count >= k, middle, low), high

    return lax.while_loop(unfinished, halve, (jnp.min(image, axis=1), jnp.max(image, axis=1)))[0]


def chosen_mask(image: Array, k: int | Array, positions: Array | None = None) -> Array:
    """[T, S] int32 -> [T, S] bool: the k largest visible values of each row, all of them if there are fewer.

    k is one for all rows, or [T] int32 and at most S.
    Of equal values those in front, or those with the lowest `positions`, [T, S] int32, all different.
    """
    S = image.shape[1]
    if isinstance(k, int) and k >= S:
        return image > INVISIBLE
    cut = kth_largest(image, k)[:, None]
    above, at_cut = image > cut, image == cut
    room = (k - jnp.sum(above, axis=1, dtype=jnp.int32))[:, None]
    if positions is None:
        has_room = jnp.cumsum(at_cut, axis=1, dtype=jnp.int32) <= room
    else:
        order = jnp.where(at_cut, -positions, INVISIBLE)
        has_room = order >= kth_largest(order, room[:, 0])[:, None]
    return (above | (at_cut & has_room)) & (image > INVISIBLE)


def compact(mask: Array, k: int) -> tuple[Array, Array]:
    """Finds the columns of the first k set bits of each row.

    [T, S] bool -> [T, k] int32 columns, ascending, 0 where there is none; [T, k] bool, which slots are filled.

    Each slot looks up its 32-column word in the running count of words, then its bit in the word: k log S steps,
    where a scatter of S elements is a serial loop on CPUs.
    """
    T, S = mask.shape
    n_words = -(-S // _WORD)
    bits = jnp.pad(mask, ((0, 0), (0, n_words * _WORD - S))).reshape(T, n_words, _WORD)
    words = jnp.sum(
        bits.astype(jnp.uint32) << jnp.arange(_WORD, dtype=jnp.uint32)[None, None, :],
        axis=-1,
        dtype=jnp.uint32,
    )  # [T, n_words]
    ends = jnp.cumsum(lax.population_count(words).astype(jnp.int32), axis=1)
    slots = jnp.arange(k, dtype=jnp.int32)
    filled = slots[None, :] < ends[:, -1:]
    word_ids = jax.vmap(lambda row: jnp.searchsorted(row, slots, side="right", method="scan"))(ends).astype(jnp.int32)
    word_ids = jnp.minimum(word_ids, n_words - 1)
    word = jnp.take_along_axis(words, word_ids, axis=1)
    before = jnp.take_along_axis(ends, word_ids, axis=1) - lax.population_count(word).astype(jnp.int32)
    columns = word_ids * _WORD + _nth_set_bit(word, slots[None, :] - before)
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


def topk_in_order(image: Array, positions: Array, k: int) -> tuple[Array, Array]:
    """The k best candidates of each row, in the order in which they stand.

    Args:
        image: [T, S] int32, `INVISIBLE` where there is no candidate.
        positions: [T, S] int32, ascending among the visible.
        k: how many to choose.

    Returns: image and position of the chosen, [T, k] each; empty slots hold `INVISIBLE` and -1.
    """
    columns, filled = compact(chosen_mask(image, k), k)
    image = jnp.take_along_axis(image, columns, axis=1)
    positions = jnp.take_along_axis(positions, columns, axis=1)
    return jnp.where(filled, image, INVISIBLE), jnp.where(filled, positions, -1)


def topk_of_any_order(image: Array, positions: Array, k: int) -> tuple[Array, Array]:
    """As `topk_in_order`, where the candidates of a row stand in any order; the chosen come out ascending."""
    columns, filled = compact(chosen_mask(image, k, positions), k)
    image = jnp.take_along_axis(image, columns, axis=1)
    positions = jnp.where(filled, jnp.take_along_axis(positions, columns, axis=1), jnp.iinfo(jnp.int32).max)
    positions, image = lax.sort((positions, image), dimension=1, num_keys=1)  # the empty slots stay behind
    return jnp.where(filled, image, INVISIBLE), jnp.where(filled, positions, -1)
