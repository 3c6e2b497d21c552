"""Methods are values, and a method that makes no sense cannot be made."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hisa_jax as hj
from hisa_jax.methods import flat_of

pytestmark = pytest.mark.check


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: hj.Dsa(topk=0), "Dsa(topk=0): must be at least 1"),
        (lambda: hj.Hisa(topk=0), "Hisa(topk=0): must be at least 1"),
        (
            lambda: hj.Hisa(block_size=2**31),
            "Hisa(block_size=2147483648): must be at most 2147483647, the largest int32",
        ),
        (lambda: hj.Hisa(block_size=0), "Hisa(block_size=0): must be at least 1"),
        (lambda: hj.Hisa(block_topk=0), "Hisa(block_topk=0): must be at least 1"),
        (lambda: hj.Hisa(block_ratio=0), "Hisa(block_ratio=0): must be at least 1"),
        (lambda: hj.Hisa(keep_first=-1), "Hisa(keep_first=-1): must be at least 0"),
        (
            lambda: hj.Hisa(keep_last=0),
            "Hisa(keep_last=0): must be at least 1: the block of the query itself holds future tokens, "
            "its mean may not decide",
        ),
        (
            lambda: hj.Hisa(topk=64, block_topk=1),
            "Hisa(block_topk=1): must be at least keep_first + keep_last = 2, since those blocks are always kept",
        ),
        (
            lambda: hj.Hisa(topk=2048, block_size=128, block_topk=8),
            "Hisa(topk=2048): must be at most block_topk * block_size = 8 * 128 = 1024, the tokens in the kept blocks",
        ),
        (
            lambda: hj.BlockSparse(topk=2000, block_size=128),
            "BlockSparse(topk=2000): must be a multiple of block_size = 128",
        ),
        (
            lambda: hj.BlockSparse(topk=128, block_size=128),
            "BlockSparse(topk=128): keeps topk / block_size = 1 blocks, must be at least keep_first + keep_last = 2, "
            "since those blocks are always kept",
        ),
    ],
)
def test_a_method_out_of_range_says_what_is_wanted(make, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        make()


@pytest.mark.parametrize("topk", [2048.0, "2048", True, None])
def test_a_method_of_the_wrong_type_says_so(topk):
    with pytest.raises(TypeError, match=re.escape(f"Dsa(topk={topk!r}): must be an int, not {type(topk).__name__}")):
        hj.Dsa(topk=topk)


def test_methods_are_frozen_and_hashable():
    assert hash(hj.Hisa()) == hash(hj.Hisa()) and hj.Hisa() == hj.Hisa() != hj.Hisa(block_topk=32)
    with pytest.raises(dataclasses.FrozenInstanceError):
        hj.Hisa().topk = 3


def test_a_ratio_is_a_whole_number():
    with pytest.raises(TypeError, match=re.escape("Hisa(block_ratio='1/4'): must be an int, not str")):
        hj.Hisa(block_ratio="1/4")


def test_the_defaults_are_the_papers():
    assert (hj.Hisa().topk, hj.Hisa().block_size, hj.Hisa().block_topk, hj.Hisa().block_ratio) == (2048, 128, 64, 1)
    assert hj.BlockSparse().block_topk == 16


ARRAYS = jnp.ones((1, 2, 2, 16)), jnp.ones((1, 20, 16)), jnp.ones((1, 2, 2))
BY_CLASS = (
    hj.Dsa(topk=4),
    hj.Hisa(topk=4, block_size=4, block_topk=2),
    hj.BlockSparse(topk=8, block_size=4),
    hj.Scan(topk=4),
)


@pytest.mark.parametrize("names", [None, "method"])
def test_a_method_is_static_under_jit(names):
    traced = []

    def noted(*arrays, method):
        traced.append(method)
        return hj.select(*arrays, method=method)

    select = jax.jit(noted, static_argnames=names)
    for topk in (4, 5, 5):
        assert select.eval_shape(*ARRAYS, method=hj.Dsa(topk=topk)).indices.shape == (1, 2, topk)
    assert traced == [hj.Dsa(topk=4), hj.Dsa(topk=5)]  # equal methods are one
    jax.jit(hj.select, static_argnames=names)(*ARRAYS, method=hj.Dsa(topk=4))


def test_a_flag_that_jit_traces_says_how_to_give_it():
    with pytest.raises(
        TypeError, match="^select: return_scores is traced, wanted a bool, under jit by static_argnames"
    ):
        jax.jit(hj.select)(*ARRAYS, hj.Dsa(topk=4), return_scores=True)


@pytest.mark.parametrize("method", [*BY_CLASS, hj.Tiles()], ids=lambda method: type(method).__name__)
def test_to_jax_a_method_has_no_leaves_and_comes_back_as_it_is(method):
    leaves, tree = jax.tree.flatten(method)
    assert leaves == [] and jax.tree.unflatten(tree, leaves) == method
    assert tree == jax.tree.structure(dataclasses.replace(method)) and hash(tree) == hash(jax.tree.structure(method))


@pytest.mark.parametrize("method", BY_CLASS, ids=lambda method: type(method).__name__)
def test_the_flat_indexer_of_a_method_has_its_entries_and_its_scores(method):
    shared = dict(topk=method.topk, entry_size=4, tail="open")
    if not isinstance(method, hj.Scan):
        shared |= dict(activation=None, per_head=True)
    assert flat_of(dataclasses.replace(method, **shared)) == hj.Dsa(**shared)
    assert flat_of(dataclasses.replace(method, entry_size=2, returns="entries")).returns == "entries"
    if "token_score" in method.functions:
        assert flat_of(dataclasses.replace(method, token_score=jnp.dot)).token_score is jnp.dot


def test_a_method_is_an_argument_under_vmap_and_grad():
    method = BY_CLASS[1]
    arrays = [np.stack([x, x]) for x in ARRAYS]
    batched = jax.jit(lambda *arrays: jax.vmap(hj.select, in_axes=(0, 0, 0, None))(*arrays, method))(*arrays)
    assert (batched.indices[1] == hj.select(*ARRAYS, method).indices).all()

    def of_scores(q, k, w, method):
        return jnp.sum(hj.select(q, k, w, method, return_scores=True).scores)

    assert jax.eval_shape(jax.grad(of_scores), *ARRAYS, method).shape == ARRAYS[0].shape


@pytest.mark.parametrize("kind", [np.int32, np.int64, np.uint8])
def test_sizes_of_numpy_become_pythons(kind):
    for method in BY_CLASS:
        given = {field.name: getattr(method, field.name) for field in dataclasses.fields(method)}
        sizes = {name: kind(value) for name, value in given.items() if type(value) is int}
        made = type(method)(**given | sizes)
        assert made == method and hash(made) == hash(method) and repr(made) == repr(method)
    assert repr(hj.Tiles(queries=kind(8), keys=kind(128))) == "Tiles(queries=8, keys=128)"


def test_completion_shows_the_public_names_alone():
    assert dir(hj) == sorted(hj.__all__)
