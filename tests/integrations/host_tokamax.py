"""tokamax's own test base of its lightning indexer, from the installed package, with ours in place of theirs."""

import functools

import jax
import numpy as np
import tokamax
from tokamax._src.ops.lightning_indexer import test_base

import hisa_jax as hj
from hisa_jax.integrations.tokamax import lightning_indexer
from tests.integrations import conformance
from tests.integrations.installed import run_example


class TestFlat(test_base.LightningIndexerTestBase):
    """Every test of the base class, by the flat indexer."""

    def __init__(self, *args):
        super().__init__(*args, topk_fn=lightning_indexer)


class TestHisa(test_base.LightningIndexerTestBase):
    """By HISA that keeps the 4 blocks that a query of theirs sees at most: it is the flat indexer then."""

    def __init__(self, *args):
        method = hj.Hisa(topk=16, block_size=128, block_topk=4)
        super().__init__(*args, topk_fn=functools.partial(lightning_indexer, method=method))


class TestScan(test_base.LightningIndexerTestBase):
    """By the scan of as many candidates as a query sees at most."""

    def __init__(self, *args):
        method = hj.Scan(topk=16, candidates=512)
        super().__init__(*args, topk_fn=functools.partial(lightning_indexer, method=method))


def test_ours_is_an_implementation_of_their_call():
    inputs = test_base.make_test_inputs([1, 4], [256, 256], seed=123)
    theirs = tokamax.ops.lightning_indexer(**inputs, k=16, implementation="xla")
    ours = jax.jit(functools.partial(tokamax.ops.lightning_indexer, k=16, implementation=lightning_indexer))(**inputs)
    np.testing.assert_array_equal(np.sort(ours), np.sort(theirs))


def test_the_example_of_the_documentation_runs():
    run_example("tokamax")


def test_what_conformance_md_says_of_theirs_holds():
    assert not conformance.surprises("tokamax")
