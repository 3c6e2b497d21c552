"""Append and truncate at every length there is: a page says what it holds, and nobody loses what another one gives up.

6 s.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hisa_jax as hj
from hisa_jax.page_pool import PagePool
from tests import draw

PAGE, N, D = 16, 40, 8  # three pages
TABLES = jnp.array([[5, 0, 3], [1, 4, 2]], jnp.int32)


def two_requests(n, cache, before):
    """Tokens `before` to `before` + n of two requests, appended in one call; a traced n may be up to N."""
    k = jnp.asarray(draw.cast(np.random.default_rng(0).normal(size=(2, 2 * N, D)), "bfloat16"))
    rows = jnp.arange(2 * n if isinstance(n, int) else 2 * N, dtype=jnp.int32)
    r = (rows >= n).astype(jnp.int32)
    offsets = jnp.stack([jnp.asarray(x, jnp.int32) for x in (0, n, 2 * n)])
    k = k[r, jnp.minimum(before + rows - r * n, 2 * N - 1)]
    return hj.append(cache, k, TABLES, offsets, jnp.stack([jnp.asarray(before, jnp.int32)] * 2))


@functools.cache
def caches():
    """Of two requests of 0, 1, ... N tokens that were written at once: what all others must be like."""
    write = lambda n: two_requests(n, hj.init_cache(6, PAGE, D, block_size=2 * PAGE), 0)  # noqa: E731
    return jax.jit(jax.vmap(write))(jnp.arange(N + 1, dtype=jnp.int32))


def assert_says(got, lengths):
    for name in ("counts", "sums", "means"):
        np.testing.assert_array_equal(getattr(got, name), getattr(caches(), name)[lengths], err_msg=name)


@pytest.mark.parametrize("max_tokens", [2, PAGE + 2])  # the fewest that may lie in two pages, and in three
def test_a_cache_says_after_truncation_what_it_says_of_the_tokens_left_alone(max_tokens):
    """Two requests of every length lose at once from nothing to as much as is allowed."""
    of_lengths = caches()

    def truncated(before, after):
        cache = jax.tree.map(lambda leaf: leaf[before], of_lengths)
        return hj.truncate(cache, TABLES, jnp.stack([before] * 2), jnp.stack([after] * 2), max_tokens=max_tokens)

    pairs = [(n, n - lost) for n in range(N + 1) for lost in range(min(n, max_tokens) + 1)]
    before, after = np.array(pairs, np.int32).T
    assert_says(jax.jit(jax.vmap(truncated))(before, after), after)


@pytest.mark.parametrize("n", [1, 2, PAGE + 2])
def test_a_cache_says_after_an_append_what_it_says_of_all_tokens_written_at_once(n):
    """Two requests of every length get so many at once."""
    of_lengths = caches()

    def appended(before):
        return two_requests(n, jax.tree.map(lambda leaf: leaf[before], of_lengths), before)

    before = np.arange(N - n + 1, dtype=np.int32)
    assert_says(jax.jit(jax.vmap(appended))(before), before + n)


def test_a_truncated_request_holds_the_pages_of_its_tokens_and_the_others_are_free():
    for length in range(N + 1):
        pool = PagePool(6, PAGE)
        pool.add("a")
        pool.extend("a", N)
        held = pool.table(["a"], 3)[0]
        assert pool.truncate("a", length) == []
        n = -(-length // PAGE)
        assert pool.table(["a"], 3)[0].tolist() == [*held[:n], *[-1] * (3 - n)]
        assert pool.lengths["a"] == length and pool.n_free == 6 - n
        pool.check()


class Pages:
    """What pages hold, token by token, if a server does what its pool says; a page knows how many it holds."""

    def __init__(self, size):
        self.pool, self.content, self.held = PagePool(12, size), [[] for _ in range(12)], {}

    def copy(self, copies):
        for source, target in copies:
            self.content[target] = list(self.content[source])

    def extend(self, name, tokens):
        start = len(self.held[name])
        self.copy(self.pool.extend(name, len(tokens)))
        for i, token in enumerate(tokens, start):
            page, at = self.page(name, i)
            self.content[page][at:] = [token]
        self.held[name] = [*self.held[name], *tokens]

    def truncate(self, name, length):
        self.copy(self.pool.truncate(name, length))
        if length % self.pool.page_size and length < len(self.held[name]):
            page, at = self.page(name, length - 1)
            self.content[page][at + 1 :] = []
        self.held[name] = self.held[name][:length]

    def page(self, name, i):
        size = self.pool.page_size
        return self.pool.table([name], 12)[0][i // size], i % size

    def check(self):
        self.pool.check()
        for name, tokens in self.held.items():
            assert len(tokens) == self.pool.lengths[name]
            for i, token in enumerate(tokens):
                page, at = self.page(name, i)
                assert self.content[page][at : at + 1] == [token], (name, i)


@pytest.mark.parametrize("who", ["donor", "fork"])
def test_no_truncation_and_no_write_after_it_takes_a_token_of_whom_the_pages_are_shared_with(who):
    """All lengths of the donor, of what is shared, of what is left, with and without new tokens of the fork."""
    size, longest = 4, 9
    for length in range(longest + 1):
        for shared in range(length + 1):
            for grown in (0, 1, size):
                for left in range((length if who == "donor" else shared + grown) + 1):
                    pages = Pages(size)
                    pages.pool.add("donor")
                    pages.held["donor"] = []
                    pages.extend("donor", list(range(length)))
                    pages.pool.fork("donor", "fork", shared)
                    pages.held["fork"] = pages.held["donor"][:shared]
                    pages.extend("fork", [100 + i for i in range(grown)])
                    pages.truncate(who, left)
                    pages.check()
                    pages.extend(who, [200])
                    pages.check()
