"""tokamax's own test base of its lightning indexer, from the installed package, with ours in place of theirs."""

import functools

import jax
import numpy as np
import tokamax
from hisa_jax.integrations.tokamax import lightning_indexer
from tokamax._src.ops.lightning_indexer import test_base


class TestTheirs(test_base.LightningIndexerTestBase):
    """Every test of the base class."""

    __test__ = True

    def __init__(self, *args):
        super().__init__(*args, topk_fn=lightning_indexer)


def test_ours_is_an_implementation_of_their_call():
    inputs = test_base.make_test_inputs([1, 4], [256, 256], seed=123)
    theirs = tokamax.ops.lightning_indexer(**inputs, k=16, implementation="xla")
    ours = jax.jit(functools.partial(tokamax.ops.lightning_indexer, k=16, implementation=lightning_indexer))(**inputs)
    np.testing.assert_array_equal(np.sort(ours), np.sort(theirs))
