"""Device code that finds the threshold of rows of sort keys in VMEM, which lie as `topk_body` says.

All rows are searched side by side, by counting how many sort keys reach a guess. A pass looks at every register.
"""

import functools
from collections.abc import Callable

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

from hisa_jax.kernels_pallas.bits import is_any, quotient
from hisa_jax.kernels_pallas.mosaic_tpu.config import LANES, SUBLANES
from hisa_jax.kernels_pallas.sort_key import FORCED, INVISIBLE, Search, narrow_search
from hisa_jax.kernels_pallas.types import Ref


def find_thresholds(sort_keys_ref: Ref, n: Array, k: int, groups: Array | int) -> tuple[Array, Array]:
    """The threshold of each row: the k largest sort keys reach it, or more if there are ties.

    Args:
        sort_keys_ref: [tiles, G * 8, 128] int32.
        n: [tiles, 8, 128] int32, sort keys of each row that are not `INVISIBLE`, the same along the lanes.

    Returns: the thresholds and how many sort keys reach them, [tiles, 8, 128] int32, the same along the lanes.
    """

    def bounds(carry, x):
        least, greatest = carry
        seen = jnp.where(x == INVISIBLE, FORCED, x)
        return jnp.minimum(least, jnp.min(seen, axis=1)), jnp.maximum(greatest, jnp.max(x, axis=1))

    shape = n.shape
    least, greatest = _over_groups(
        sort_keys_ref, groups, bounds, (jnp.full(shape, FORCED), jnp.full(shape, INVISIBLE)), registers=32
    )
    excess = (n - k).astype(jnp.float32) + 0.5
    few = n <= k
    start = (
        jnp.where(few, INVISIBLE + 1, along_lanes(jnp.min, least)),
        jnp.where(few, INVISIBLE + 1, along_lanes(jnp.max, greatest)),
        n,
        excess,
        jnp.full(shape, k, jnp.float32),
        jnp.zeros(shape, jnp.int32),
        jnp.int32(0),
    )
    low, _, n_low, *_ = _search(_counter(sort_keys_ref, groups), start, k, 0)
    return low, n_low


def find_near_thresholds(sort_keys_ref: Ref, n: Array, k: int, slack: int, groups: Array | int, every: int) -> Array:
    """A threshold of each row that at least k sort keys reach, and few more than k + slack: as `find_thresholds`.

    A sample, one group in `every`, is searched first for the threshold that should be reached by as many as wanted;
    then all, from there. So all sort keys are counted 5 times instead of 9, and the sample 10 times. `FORCED` ones are
    no bounds of a search: fewer than k.
    """
    groups_of_sample = quotient(groups, every)

    def bounds(carry, x):
        least, greatest, total = carry
        seen, free = jnp.where(x == INVISIBLE, FORCED, x), jnp.where(x == FORCED, INVISIBLE, x)
        return (
            jnp.minimum(least, jnp.min(seen, axis=1)),
            jnp.maximum(greatest, jnp.max(free, axis=1)),
            total + jnp.sum(jnp.where(x == INVISIBLE, 0.0, 1.0), axis=1),
        )

    shape = n.shape
    none = (jnp.full(shape, FORCED), jnp.full(shape, INVISIBLE), jnp.zeros(shape, jnp.float32))
    least, greatest, total = _over_groups(sort_keys_ref, groups_of_sample, bounds, none, registers=32, every=every)
    few = n <= k
    least = jnp.where(few, INVISIBLE + 1, along_lanes(jnp.min, least))
    greatest = jnp.where(few, INVISIBLE + 1, along_lanes(jnp.max, greatest))
    n_sample = along_lanes(jnp.sum, total)
    rank = jnp.maximum(n_sample * ((k + slack / 2) / jnp.maximum(n, 1).astype(jnp.float32)), 1.0).astype(jnp.int32)
    sampled = (
        least,
        greatest,
        n_sample.astype(jnp.int32),
        n_sample - rank.astype(jnp.float32) + 0.5,
        rank.astype(jnp.float32),
        jnp.zeros(shape, jnp.int32),
        jnp.int32(0),
    )
    count_of_sample = _counter(sort_keys_ref, groups_of_sample, every)
    # As near as a sample may be: a quarter of the slack.
    guess = _search(count_of_sample, sampled, rank, rank * slack // (4 * k) + 1)[0]
    count = _counter(sort_keys_ref, groups)
    reached = count(guess)
    enough, excess = reached >= k, (reached - k).astype(jnp.float32)
    start = (
        jnp.where(enough, guess, least),
        jnp.where(enough, greatest, guess - 1),
        jnp.where(enough, reached, n),
        jnp.where(enough, excess + 0.5, (n - k).astype(jnp.float32) + 0.5),
        jnp.where(enough, jnp.float32(k), 0.5 - excess),
        jnp.zeros(shape, jnp.int32),
        jnp.int32(1),
    )
    low, *_ = _search(count, start, k, slack)
    # Nobody has counted what reaches the least of the sample: then all that is seen.
    return jnp.where(low > least, low, INVISIBLE + 1)


def _search(count_at_least: Callable[[Array], Array], start: Search, k: Array | int, slack: Array | int) -> Search:
    def unfinished(state):
        low, high, n_low, *_ = state
        return is_any((low < high) & (n_low > k + slack))

    return lax.while_loop(unfinished, functools.partial(narrow_search, count_at_least=count_at_least, k=k), start)


def _counter(sort_keys_ref: Ref, groups: Array | int, every: int = 1) -> Callable[[Array], Array]:
    """Threshold [tiles, 8, 128] -> how many sort keys of each row reach it, the same along the lanes."""

    def count_at_least(threshold):
        def some(carry, x):
            # One group after the other: comparisons of all at once are more than the mask registers hold. A pass over
            # 64 rows of 2048 takes 110 cycles instead of 162 on v6e.
            (total,) = carry
            for group in range(x.shape[1]):
                total = total + jnp.where(x[:, group] >= threshold, 1.0, 0.0)
            return (total,)

        none = (jnp.zeros(threshold.shape, jnp.float32),)
        total = _over_groups(sort_keys_ref, groups, some, none, registers=128, every=every)[0]
        return along_lanes(jnp.sum, total).astype(jnp.int32)

    return count_at_least


def _over_groups(
    sort_keys_ref: Ref, groups: Array | int, step: Callable, start: tuple, registers: int, every: int = 1
) -> tuple:
    """step(carry, [tiles, some groups, 8, 128]) over so many groups, one in `every`."""
    unroll = unroll_of(sort_keys_ref, registers)
    if every > 1:
        unroll = min(unroll, n_groups_of(sort_keys_ref) // every)

    def some(i, carry):
        if every == 1:
            return step(carry, load_groups(sort_keys_ref, i, unroll))
        first = i * unroll
        one_by_one = [sort_keys_ref[:, pl.ds((first + j) * every * SUBLANES, SUBLANES)] for j in range(unroll)]
        return step(carry, jnp.stack(one_by_one, axis=1))

    return lax.fori_loop(0, quotient(groups, unroll), some, start)


def unroll_of(sort_keys_ref: Ref, registers: int) -> int:
    """Groups a step of a loop, a power of two, so that it works on about so many registers."""
    groups = 1 << ((registers // sort_keys_ref.shape[0]).bit_length() - 1)
    return min(max(groups, 8), span_of(n_groups_of(sort_keys_ref)))


def n_groups_of(sort_keys_ref: Ref) -> int:
    return sort_keys_ref.shape[1] // SUBLANES


def load_groups(sort_keys_ref: Ref, i: Array, n: int) -> Array:
    """[tiles, n, 8, 128]: groups i * n and on."""
    tiles = sort_keys_ref.shape[0]
    return sort_keys_ref[:, pl.ds(i * n * SUBLANES, n * SUBLANES)].reshape(tiles, n, SUBLANES, LANES)


def span_of(n_groups: int) -> int:
    return min(n_groups, LANES)


def along_lanes(reduce: Callable, x: Array) -> Array:
    return jnp.broadcast_to(reduce(x, axis=-1, keepdims=True), x.shape)
