"""The scan of a few queries: all scan scores in memory, lists made from them without the host.

Lists of rows of all kinds are one program, compiled in some 4 s; whole selections are `exhaustive`.
"""

import jax.numpy as jnp
import numpy as np
import pytest

from hisa_jax.kernels_pallas.sort_key import sort_key_of
from hisa_jax.kernels_pallas.triton.list_best import list_best
from tests.gpu.test_lowering import lower

pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")
WIDTH, LEAST, MOST = 1000, 80, 128
OPTIONS = dict(least=LEAST, most=MOST, rank=26, step=4, keep_first=2, keep_last=3)


def rows():
    """Scores of a row, and how many of them are candidates."""
    rng, sampled = np.random.default_rng(0), np.arange(WIDTH) % 4 == 0
    normal = rng.normal(size=WIDTH)
    yield "normal", normal, WIDTH
    yield "fewer candidates", normal, 777
    yield "as many as fit", normal, MOST
    yield "hardly more", normal, MOST + 1
    yield "none", normal, 0
    yield "one", normal, 1
    yield "all tie", np.zeros(WIDTH), WIDTH
    yield "many tie, few are above", np.where(rng.random(WIDTH) < 0.03, 5.0, 1.0), WIDTH
    yield "samples are the best", normal + 9 * sampled, WIDTH
    yield "samples are the worst", normal - 9 * sampled, WIDTH
    yield "infinite and none", np.where(rng.random(WIDTH) < 0.3, np.nan, np.inf * np.sign(normal)), WIDTH
    yield "ascending", np.arange(WIDTH) * 1.0, WIDTH
    yield "the first and the last are worst", np.where(np.abs(np.arange(WIDTH) - 500) > 490, -99, normal), WIDTH


def check(interpret):
    names, scores, limits = zip(*rows(), strict=True)
    sort_keys = sort_key_of(jnp.asarray(np.stack(scores), jnp.float32))
    lists = list_best(sort_keys, jnp.asarray(limits, jnp.int32), **OPTIONS, interpret=interpret)
    tokens, counts = map(np.asarray, lists)
    for name, x, n, got, count in zip(names, np.asarray(sort_keys), limits, tokens, counts, strict=True):
        listed = got[:count]
        assert min(n, LEAST) <= count <= MOST and (got[count:] == -1).all(), name
        assert (np.diff(listed) > 0).all() and ((listed >= 0) & (listed < n)).all(), name
        if n <= MOST:
            assert count == n, name
        forced = (np.arange(n) < 2) | (np.arange(n) >= n - 3)
        assert np.isin(np.flatnonzero(forced), listed).all(), name
        others, left = listed[~forced[listed]], np.setdiff1d(np.flatnonzero(~forced), listed)
        if len(left):
            # The best, and of those that tie at the end the first.
            at = x[others].min()
            assert x[left].max() <= at, name
            tied = np.flatnonzero((x[:n] == at) & ~forced)
            np.testing.assert_array_equal(others[x[others] == at], tied[: (x[others] == at).sum()], err_msg=name)


def test_a_list_has_the_best_and_of_those_that_tie_the_first():
    check(interpret=True)


@pytest.mark.gpu
def test_a_list_on_the_device():
    check(interpret=False)


def test_lists_lower():
    lists = lambda x, limit: list_best(x, limit, **OPTIONS | dict(least=8192, most=12288, rank=626, step=16))  # noqa: E731
    assert "hisa_list_best" in lower(lists, ((128, 131072), jnp.int32), ((128,), jnp.int32))
