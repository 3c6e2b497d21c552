"""What a query does not see never changes a bit of its result, in plain JAX and in what writes pages.

A case compiles for 2 to 10 s: the gate has each form, each method and each dtype, not each combination. The scan, of a
sketch that is unseen, too, is there by way of models (tests/models/test_isolation.py).
"""

import functools
import itertools

import jax
import pytest

import hisa_jax as hj
from tests import isolation

METHODS = {
    "dsa": hj.Dsa(topk=40),
    "hisa": hj.Hisa(topk=40, block_size=32, block_topk=4, keep_last=2),
    "block_sparse": hj.BlockSparse(topk=128, block_size=32),
    "scan": hj.Scan(topk=40, candidates=64, exact_heads=1, keep_last=2, sketch="int4"),
}
PAGE_SIZES = {"float32": 32, "bfloat16": 16, "float8_e4m3fn": 32, "int8": 8}


def each_but(*gate):
    """Every method and dtype; those that are not named are exhaustive."""
    return pytest.mark.parametrize(
        ("method", "dtype"),
        [
            pytest.param(*case, marks=() if case in gate else pytest.mark.exhaustive)
            for case in itertools.product(METHODS, PAGE_SIZES)
        ],
    )


def jitted(function):
    statics = ("return_scores", "return_blocks", "method")
    return jax.jit(functools.partial(function, implementation="xla"), static_argnames=statics)


@each_but(("dsa", "bfloat16"), ("hisa", "int8"))
def test_in_a_batch(method, dtype):
    select, method = jitted(hj.select), METHODS[method]
    for first_unseen in (261, 101):
        isolation.assert_isolated(isolation.batch(select, method, dtype, first_unseen=first_unseen), method)


@each_but(("hisa", "float8_e4m3fn"))
def test_in_a_packed_batch(method, dtype):
    isolation.assert_isolated(isolation.packed(jitted(hj.select_packed), METHODS[method], dtype), METHODS[method])


@each_but(("block_sparse", "float32"), ("hisa", "float8_e4m3fn"))
def test_in_pages(method, dtype):
    call = isolation.paged(jitted(hj.select_paged), METHODS[method], dtype, page_size=PAGE_SIZES[dtype])
    isolation.assert_isolated(call, METHODS[method])


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn"])
def test_nan_stays_in_the_page_it_was_written_to_and_goes_with_its_token(dtype):
    append = jax.jit(functools.partial(hj.append, implementation="xla"))
    isolation.assert_nan_stays_in_its_page(append, dtype)
    isolation.assert_removed_nan_leaves_no_trace(append, dtype)
