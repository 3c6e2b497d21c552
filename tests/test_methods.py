"""Methods are values, and a method that makes no sense cannot be made."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import pytest

import hisa_jax as hj

pytestmark = pytest.mark.check


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: hj.Dsa(topk=0), "Dsa(topk=0): must be at least 1"),
        (lambda: hj.Hisa(topk=0), "Hisa(topk=0): must be at least 1"),
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


def test_a_method_is_static_under_jit():
    select = jax.jit(hj.select, static_argnames="method")
    arrays = jnp.ones((1, 2, 2, 16)), jnp.ones((1, 20, 16)), jnp.ones((1, 2, 2))
    assert select(*arrays, method=hj.Dsa(topk=4)).indices.shape == (1, 2, 4)
    assert select(*arrays, method=hj.Dsa(topk=5)).indices.shape == (1, 2, 5)
