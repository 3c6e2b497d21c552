"""The adapters to other programs on TPU kernels."""

import pytest

import hisa_jax as hj
from tests import host_pages

METHODS = {"dsa": hj.Dsa(topk=24), "hisa": hj.Hisa(topk=24, block_size=64, block_topk=3)}


@pytest.mark.exhaustive
@pytest.mark.parametrize("q_dtype", ["bfloat16", "float8_e4m3fn"])
@pytest.mark.parametrize("method", METHODS)
def test_entries_of_four_tokens_are_chosen_from_a_hosts_pages(implementation, method, q_dtype):
    """What queries see grows by an entry every fourth one."""
    some = host_pages.batch(ratio=4, q_dtype=q_dtype, H=16)
    host_pages.check(some, METHODS[method], implementation=implementation, tolerance=1e-2)
