"""Truncation: what is left is what writing the rest alone would have left, and nobody else loses by it.

Every length there is, not some of them.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hisa_jax as hj
from hisa_jax.pages import PagePool
from tests import draw

PAGE, N, D = 16, 40, 8  # three pages
TABLES = jnp.array([[5, 0, 3], [1, 4, 2]], jnp.int32)


@pytest.mark.parametrize("max_tokens", [2, PAGE + 2])  # the fewest that may lie in two pages, and in three
def test_a_cache_says_after_truncation_what_it_says_of_the_tokens_left_alone(max_tokens):
    """Two requests of every length lose at once from nothing to as much as is allowed."""
    k = jnp.asarray(draw.cast(np.random.default_rng(0).normal(size=(2 * N, D)), "bfloat16"))

    def written(n):
        rows = jnp.arange(2 * N, dtype=jnp.int32)
        of_both = k[jnp.clip(jnp.where(rows < n, rows, N + rows - n), 0, 2 * N - 1)]
        offsets = jnp.stack([jnp.zeros_like(n), n, 2 * n])
        return hj.append(hj.init_cache(6, PAGE, D), of_both, TABLES, offsets, jnp.zeros(2, jnp.int32))

    def truncated(before, after):
        cache = jax.tree.map(lambda leaf: leaf[before], caches)
        return hj.truncate(cache, TABLES, jnp.stack([before] * 2), jnp.stack([after] * 2), max_tokens=max_tokens)

    caches = jax.jit(jax.vmap(written))(jnp.arange(N + 1, dtype=jnp.int32))
    pairs = [(n, n - lost) for n in range(N + 1) for lost in range(min(n, max_tokens) + 1)]
    before, after = np.array(pairs, np.int32).T
    got = jax.jit(jax.vmap(truncated))(before, after)
    for name in ("counts", "sums", "means"):
        np.testing.assert_array_equal(getattr(got, name), getattr(caches, name)[after], err_msg=name)


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
