"""Scores as integers that order the same way (`hisa_jax.xla.topk`), and the search for the k-th largest of them.

Selection compares sort keys alone, so that candidates which must not be chosen (`INVISIBLE`) and those which must
(`FORCED`) need no second array, and NaN is simply the sort key of -inf.
"""

import functools
from collections.abc import Callable

import jax.numpy as jnp
from jax import Array, lax

from hisa_jax.xla.topk import FORCED, INVISIBLE, score_of, sort_key_of

__all__ = [
    "FORCED", "INVISIBLE", "KTH_SLACK", "find_threshold", "halfway", "narrow_search", "score_of", "sort_key_of",
]  # fmt: skip

# `kth` may let a 64th of the rank more pass: 4096 rows of 4096 take 0.036 ms, an exact threshold 0.083.
KTH_SLACK = 64

# Bounds of the threshold, how many reach the lower one, two weights, which bound moved last, steps so far.
Search = tuple[Array, Array, Array, Array, Array, Array, Array]
_GUESSES = 24  # then halving alone, so that no input takes more than 24 + 32 counts


def halfway(low: Array, high: Array) -> Array:
    """The middle of two sort keys, rounded up, without overflow."""
    return (low >> 1) + (high >> 1) + ((low | high) & 1)


def narrow_search(
    state: Search,
    count_at_least: Callable[[Array], Array],
    k: int | Array,
    bitcast: Callable = lax.bitcast_convert_type,
) -> Search:
    """One pass of `find_threshold`; a search that is over stays as it is, so that many may go on side by side."""
    low, high, n_low, above, below, side, step = state
    a, b = score_of(low, bitcast), score_of(high, bitcast)
    guess = sort_key_of(a + (b - a) * (above / (above + below)), bitcast)
    # The sort key of a NaN is that of -inf: an infinite or forced bound falls back to halving.
    guess = jnp.where((guess <= low) | (guess > high) | (step >= _GUESSES), halfway(low, high), guess)
    passed = count_at_least(guess)
    enough = passed >= k
    moved = jnp.where(enough, jnp.int32(1), jnp.int32(-1))
    again = jnp.where(moved == side, jnp.float32(0.5), jnp.float32(1))
    excess = (passed - k).astype(jnp.float32)
    above_next = jnp.where(enough, excess + 0.5, above * again)
    below_next = jnp.where(enough, below * again, 0.5 - excess)
    return (
        jnp.where(enough, guess, low),
        jnp.where(enough, high, guess - 1),
        jnp.where(enough, passed, n_low),
        above_next,
        below_next,
        moved,
        step + 1,
    )


def find_threshold(
    count_at_least: Callable[[Array], Array],
    lowest: Array,
    highest: Array,
    n: Array,
    k: int | Array,
    bitcast: Callable = lax.bitcast_convert_type,
    slack: int | Array = 0,
) -> Array:
    """The threshold of a top-k: the largest sort key that at least k candidates reach, or any that exactly k reach.

    Args:
        count_at_least: sort key -> how many candidates are not below it. One call is a pass over all candidates.
        lowest: int32, the least sort key there is; `highest`: the greatest.
        n: int32, how many candidates there are.
        k: how many are wanted. With n <= k + slack the answer is `lowest`.
        bitcast: of scalars; Mosaic GPU's own takes vectors alone.
        slack: any threshold will do that k to k + slack candidates reach.

    Regula falsi on the count as a function of the score (the Illinois variant: a bound that survives twice loses half
    its weight), which takes 6 to 9 passes where halving takes about 22; it stops as soon as exactly k pass.
    """

    def unfinished(state: Search) -> Array:
        low, high, n_low, *_ = state
        return (low < high) & (n_low > k + slack)

    excess = (n - k).astype(jnp.float32) + 0.5
    start = (lowest, highest, n, excess, jnp.asarray(k, jnp.float32), jnp.int32(0), jnp.int32(0))
    step = functools.partial(narrow_search, count_at_least=count_at_least, k=k, bitcast=bitcast)
    return lax.while_loop(unfinished, step, start)[0]
