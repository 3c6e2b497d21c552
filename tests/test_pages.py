"""What a table may name: pages that are none take no tokens, and pages that hold too few give none."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify

import hisa_jax as hj
from tests import draw

PAGE, D = 16, 16
METHODS = [hj.Dsa(topk=20), hj.Hisa(topk=20, block_size=32, block_topk=2)]


def keys(n, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(n, D)), jnp.float32)


def test_tokens_without_a_page_are_written_nowhere():
    """A number that is too low or too high, or a token past the table: all pages but those named stay as they are."""
    cache = hj.init_cache(6, PAGE, D, "float32")
    cache = hj.append(cache, keys(6 * PAGE), jnp.arange(6)[None], jnp.array([0, 6 * PAGE]), jnp.array([0]))
    for bad in (-1, 6, 2**31 - 1, -(2**31)):
        table = jnp.array([[2, bad], [4, 1]], jnp.int32)
        got = hj.append(cache, keys(60, seed=1), table, jnp.array([0, 20, 60]), jnp.array([10, 4]))
        for before, after in zip(jax.tree.leaves(cache), jax.tree.leaves(got), strict=True):
            np.testing.assert_array_equal(before[np.array([0, 3, 5])], after[np.array([0, 3, 5])])
        assert got.counts.tolist() == [16, 16, 16, 16, 16, 16] and got.places.tolist() == [0, 1, 0, 3, 0, 5]
        np.testing.assert_array_equal(got.keys[2, 10:], keys(60, seed=1)[:6])


@pytest.mark.parametrize("method", METHODS, ids=["dsa", "hisa"])
def test_a_page_of_too_few_tokens_or_of_another_place_is_no_page(method):
    """Also one that is named twice. What is not named wrongly selects as before."""
    cache, lengths = hj.init_cache(8, PAGE, D, "float32"), jnp.array([75, 40], jnp.int32)
    table = jnp.array([[3, 0, 6, 1, 4], [2, 5, 7, -1, -1]], jnp.int32)
    cache = hj.append(cache, keys(115), table, jnp.array([0, 75, 115]), jnp.zeros(2, jnp.int32))
    q, _, w = draw.inputs(1, 2, 1, 2, D)
    select = jax.jit(
        lambda table, cache, lengths: hj.select_paged(
            jnp.asarray(q[0]), jnp.asarray(w[0]), cache, table, jnp.array([0, 1, 2]), lengths, method
        )
    )
    right = select(table, cache, lengths)
    assert right.count.tolist() == [20, 20]
    twice, swapped = table.at[0, 2].set(0), table.at[0, jnp.array([1, 2])].set(jnp.array([6, 0]))
    for wrong in (
        (twice, cache, lengths),
        (swapped, cache, lengths),
        (table, cache, lengths.at[0].set(76)),
        (table, dataclasses.replace(cache, counts=cache.counts.at[0].add(-1)), lengths),
    ):
        got = select(*wrong)
        assert got.count[0] == 0 and (got.indices[0] == -1).all()
        np.testing.assert_array_equal(got.indices[1], right.indices[1])


@pytest.mark.parametrize(
    ("lengths", "new_lengths", "message"),
    [
        ([33, 0], [0, 0], r"truncate: lengths is \[33  0\], wanted 0 to 32, the tokens that 2 pages hold"),
        ([-1, 0], [-1, 0], r"truncate: lengths is \[-1  0\], wanted 0 to 32"),
        ([20, 9], [20, 10], r"new_lengths is \[20 10\] where lengths is \[20  9\], wanted 0 to 5 tokens less"),
        ([20, 9], [14, 9], r"new_lengths is \[14  9\] where lengths is \[20  9\], wanted 0 to 5 tokens less"),
    ],
)
def test_lengths_that_cannot_be_are_named_under_checked(lengths, new_lengths, message):
    cache, table = hj.init_cache(4, PAGE, D), jnp.array([[0, 1], [2, 3]], jnp.int32)
    arrays = cache, table, jnp.array(lengths, jnp.int32), jnp.array(new_lengths, jnp.int32)
    with pytest.raises(checkify.JaxRuntimeError, match=message):
        hj.checked(hj.truncate)(*arrays, max_tokens=5)
