"""Arguments that are valid and odd: empty axes, impossible numbers, arrays of other kinds; in all forms alike."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify

import hisa_jax as hj
from tests.arguments import DSA, batch, ints, over_context, pages

I32 = jnp.int32


def zero(x, axis):
    """Nothing of an array along an axis."""
    return np.take(np.asarray(x), [], axis)


def forms(method, **options):
    """The selection of a batch on one device and on a mesh: names, and functions of no argument."""
    rng = np.random.default_rng(0)
    q, k, w = (rng.normal(size=x.shape).astype(np.float32) for x in (batch()["q"], batch()["k"], batch()["w"]))
    yield "select", functools.partial(hj.select, q, k, w, method, **options)
    yield "select on a mesh", functools.partial(hj.select, q, k, w, method, **over_context(), **options)


@pytest.mark.parametrize("method", [DSA, hj.Hisa(topk=4, block_size=8, block_topk=2)], ids=["dsa", "hisa"])
def test_axes_may_be_empty_in_every_form(method):
    for empty in (dict(q=0, k=0, w=0), dict(q=1, w=1), dict(k=1)):  # B, T, S
        given = batch() | {name: zero(batch()[name], axis) for name, axis in empty.items()} | dict(method=method)
        given["query_positions"] = np.full(given["q"].shape[:2], 30, np.int32)
        rows = given["q"].shape[:2]
        for got in (hj.select(**given), hj.select(**given, **over_context())):
            assert got.indices.shape == (*rows, 4) and got.count.shape == rows and not got.count.any()
    blocks = hj.Hisa(topk=4, block_size=16, block_topk=2) if method.has_blocks else method
    for R, P, T in ((0, 2, 3), (2, 0, 3), (2, 2, 0)):
        table, offsets, lengths = np.zeros((R, P), np.int32), np.zeros(R + 1, np.int32), np.zeros(R, np.int32)
        rows = np.ones((T, 4, 8), np.float32), np.ones((T, 4), np.float32)
        for axes in ({}, over_context()):
            got = hj.select_paged(*rows, pages(), table, offsets, lengths, blocks, **axes)
            assert got.indices.shape == (T, 4) and not got.count.any()
        for axes in ({}, over_context()):
            one = hj.append(pages(), rows[0][:, 0], table, offsets, lengths, **axes)
            one = hj.truncate(one, table, lengths, lengths, max_tokens=3, **axes)
            one = hj.copy_pages(one, zero(lengths, 0), zero(lengths, 0), **axes)
            jax.tree.map(np.testing.assert_array_equal, one, pages())


def test_losses_of_nothing_are_empty():
    for B, T, S in ((0, 2, 5), (1, 0, 5), (1, 0, 0)):
        q, k, w = jnp.ones((B, T, 4, 8)), jnp.ones((B, S, 8)), jnp.ones((B, T, 4))
        for indices in (None, jnp.zeros((B, T, 3), I32)):
            loss = hj.indexer_kl(q, k, w, q, k, scale=1.0, indices=indices)
            assert loss.shape == (B, T)


def test_impossible_values_are_the_same_in_every_form_and_raise_if_checked():
    least, most = np.iinfo(np.int32).min, np.iinfo(np.int32).max
    good = dict(query_positions=ints([-1, -1, -1], [0, 39, 39]), lengths=ints(40, 40))
    bad = dict(query_positions=ints([least, -2, -1], [0, 39, most]), lengths=ints(-5, most))
    wanted = dict(forms(DSA, **good))
    for call, run in forms(DSA, **bad):
        jax.tree.map(np.testing.assert_array_equal, run(), wanted[call]())
    for argument in bad:
        # Of `select`, test_checked.py has it.
        run = dict(forms(DSA, **good | {argument: bad[argument]}))["select on a mesh"]
        with pytest.raises(checkify.JaxRuntimeError, match=f"select: {argument}"):
            hj.checked(run)()


def test_arrays_of_numpy_and_weak_types_are_as_good_as_others():
    strong = dict(forms(DSA, lengths=jnp.array([40, 30], I32)))
    weak = dict(forms(DSA, lengths=jnp.stack([jnp.asarray(40), jnp.asarray(30)])))
    for call, run in dict(forms(DSA, lengths=ints(40, 30))).items():
        for other in (strong[call], weak[call]):
            jax.tree.map(np.testing.assert_array_equal, other(), run())


def test_a_request_of_bad_lengths_takes_nothing_from_the_others():
    """What pages say of themselves is worked out for so many pages a step: bad lengths must not use those up."""
    table, k = jnp.array([[0, 1], [2, 3]], I32), jax.random.normal(jax.random.key(0), (64, 8))
    full = hj.append(pages(), k, table, ints(0, 32, 64), ints(0, 0))
    wanted = hj.truncate(full, table[1:], ints(32), ints(29), max_tokens=4)
    for before, after in ((2**31 - 1, 0), (32, -(2**31)), (32, 0)):
        got = hj.truncate(full, table, ints(before, 32), ints(after, 29), max_tokens=4)
        jax.tree.map(lambda x, y: np.testing.assert_array_equal(x[2:], y[2:]), got, wanted)
    three = jnp.array([[0, 1], [-1, -1], [2, 3]], I32), ints(0, 0, 0)
    got, wanted = (hj.append(pages(), k, three[0], ints(0, 30, end, 62), three[1]) for end in (2, 30))
    jax.tree.map(np.testing.assert_array_equal, got, wanted)


@pytest.mark.parametrize("is_split", [False, True])
def test_a_copy_from_or_to_no_page_is_none(is_split):
    axes = over_context() if is_split else {}
    full = hj.append(pages(), jnp.ones((64, 8)), jnp.array([[0, 1, 2, 3]], I32), ints(0, 64), ints(0))
    full = hj.truncate(full, jnp.array([[0, 1, 2, 3]], I32), ints(64), ints(50), max_tokens=20)
    for source, target in ((-1, 3), (4, 3), (2**31 - 1, 3), (0, -1), (0, 4), (0, -(2**31))):
        jax.tree.map(np.testing.assert_array_equal, hj.copy_pages(full, ints(source), ints(target), **axes), full)
    assert hj.copy_pages(full, ints(0), ints(3), **axes).counts.tolist() == [16, 16, 16, 16]
