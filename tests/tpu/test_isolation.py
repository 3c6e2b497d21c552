"""What a query does not see never changes a bit of its result, on the kernels of TPUs.

Interpreted, a case takes half a minute to three minutes, so all of them are exhaustive; on a TPU all run.
"""

import functools

import pytest

import hisa_jax as hj
from tests import isolation

pytestmark = pytest.mark.exhaustive
METHODS = {
    "dsa": hj.Dsa(topk=40),
    "hisa": hj.Hisa(topk=40, block_size=64, block_topk=3),
    "block_sparse": hj.BlockSparse(topk=192, block_size=64),
}


def each(*cases):
    return pytest.mark.parametrize(("method", "dtype"), cases)


@each(("dsa", "int8"), ("hisa", "bfloat16"), ("block_sparse", "float8_e4m3fn"), ("hisa", "int8"))
def test_in_a_batch(implementation, method, dtype):
    select = functools.partial(hj.select, implementation=implementation)
    for first_unseen in (261, 101):
        call = isolation.batch(select, METHODS[method], dtype, first_unseen=first_unseen)
        isolation.assert_isolated(call, METHODS[method])


@each(("dsa", "bfloat16"), ("hisa", "int8"), ("block_sparse", "bfloat16"))
def test_in_a_packed_batch(implementation, method, dtype):
    select = functools.partial(hj.select_packed, implementation=implementation)
    isolation.assert_isolated(isolation.packed(select, METHODS[method], dtype), METHODS[method])


@each(("dsa", "float8_e4m3fn"), ("hisa", "bfloat16"), ("block_sparse", "int8"))
def test_in_pages(implementation, method, dtype):
    select = functools.partial(hj.select_paged, implementation=implementation)
    isolation.assert_isolated(isolation.paged(select, METHODS[method], dtype, page_size=32), METHODS[method])
