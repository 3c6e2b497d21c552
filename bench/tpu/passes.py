"""How many passes a search for a threshold takes: the kernels' own search, run on normal scores.

The most that a row of those that search side by side takes counts, as they wait for one another.
"""

import functools
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jax import Array

from hisa_jax.kernels_pallas.sort_key import Search, narrow_search, sort_key_of


@functools.cache
def passes(n: int, k: int, rows: int, unit: int = 1) -> float:
    """Passes over n normal scores, each the best of `unit`, until the thresholds of all rows are found: a mean."""
    if n <= k:
        return 0.0
    draw = np.random.default_rng(0)
    draws = 8 if n * unit < 1 << 18 else 1
    return float(np.mean([_passes(draw.standard_normal((rows, n, unit), np.float32).max(2), k) for _ in range(draws)]))


def _passes(scores: np.ndarray, k: int) -> int:
    x = np.sort(np.asarray(sort_key_of(jnp.asarray(scores))), axis=1)
    return _search(x, _start(x, k), k, 0)[1]


@functools.cache
def near_passes(n: int, k: int, slack: int, unit: int, rows: int) -> tuple[float, float]:
    """Passes of `find_near_thresholds` over a sample and over all of n units, whose tokens have normal scores."""
    if n <= k:
        return 0.0, 1.0
    draw = np.random.default_rng(0)
    found = []
    for _ in range(2):
        scores = np.max(draw.standard_normal((rows, n, unit), np.float32), axis=2)
        keys = np.asarray(sort_key_of(jnp.asarray(scores)))
        sample, x = np.sort(keys.reshape(rows, -1, 128)[:, ::8].reshape(rows, -1), axis=1), np.sort(keys, axis=1)
        rank = int(sample.shape[1] / n * (k + slack / 2))
        (guess, *_), of_sample = _search(sample, _start(sample, rank), rank, rank * slack // (4 * k) + 1)
        state = _start(x, k)
        reached = _count(x)(guess)
        enough, excess = reached >= k, (reached - k).astype(jnp.float32)
        low, high, n_low, above, below, side, _ = state
        state = (
            jnp.where(enough, guess, low), jnp.where(enough, high, guess - 1), jnp.where(enough, reached, n_low),
            jnp.where(enough, excess + 0.5, above), jnp.where(enough, below, 0.5 - excess), side, jnp.int32(1),
        )  # fmt: skip
        found.append((of_sample, 1 + _search(x, state, k, slack)[1]))
    of_sample, of_all = np.mean(found, axis=0)
    return float(of_sample), float(of_all)


def _count(x: np.ndarray) -> Callable[[Array], Array]:
    def count_at_least(threshold: Array) -> Array:
        found = [x.shape[1] - np.searchsorted(row, c) for row, c in zip(x, np.asarray(threshold), strict=True)]
        return jnp.asarray(found, jnp.int32)

    return count_at_least


def _start(x: np.ndarray, k: int) -> Search:
    T, n = x.shape
    return (
        jnp.asarray(x[:, 0]), jnp.asarray(x[:, -1]), jnp.full(T, n, jnp.int32), jnp.full(T, n - k + 0.5, jnp.float32),
        jnp.full(T, k, jnp.float32), jnp.zeros(T, jnp.int32), jnp.int32(0),
    )  # fmt: skip


def _search(x: np.ndarray, state: Search, k: int, slack: int) -> tuple[Search, int]:
    """The search over rows of ascending sort keys, and how many passes it takes."""
    done = 0
    while bool(jnp.any((state[0] < state[1]) & (state[2] > k + slack))):
        state = narrow_search(state, _count(x), k)
        done += 1
    return state, done
