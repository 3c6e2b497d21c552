"""Implementation "xla" keeps the contract, and its tile sizes change nothing."""

import jax.numpy as jnp
import numpy as np
from absl.testing import parameterized

import hisa_jax as hj
from tests import contract, draw
from tests.contract import METHODS, assert_same_bits


class XlaSelectionTest(contract.SelectionContract):
    implementation = "xla"

    @parameterized.product(queries=[1, 3, 64], keys=[128, 1024], method=list(METHODS))
    def test_tile_sizes_do_not_change_the_selection(self, queries, keys, method):
        q, k, w = draw.inputs(2, 11, 700, 8, 64, dtype="bfloat16")
        options = dict(return_scores=True, lengths=jnp.array([700, 333]))
        wanted = self.select(q, k, w, METHODS[method], **options)
        got = self.select(q, k, w, METHODS[method], tiles=hj.Tiles(queries=queries, keys=keys), **options)
        assert_same_bits(got, wanted)

    def test_more_means_than_a_tile(self):
        # 75 blocks scored 128 at a time would be one tile; blocks of 2 make 600, in five tiles.
        q, k, w = draw.inputs(1, 3, 1200, 2, 16)
        method = hj.Hisa(topk=16, block_size=2, block_topk=150)  # 300 candidates, in three tiles
        got = self.select(q, k, w, method, tiles=hj.Tiles(keys=128), return_scores=True, return_blocks=True)
        assert_same_bits(got, self.select(q, k, w, method, return_scores=True, return_blocks=True))
        self.assert_keeps_the_contract(q, k, w, method)


class XlaPackedTest(contract.PackedContract):
    implementation = "xla"


def test_a_query_of_no_sequence_costs_no_scores():
    """Rows that see nothing run no tile of keys: NaN everywhere leaves no trace in the others."""
    q, k, w = draw.inputs(1, 3, 64, 2, 16)
    positions = jnp.array([[-1, 5, -1]])
    got = hj.select(*map(jnp.asarray, (q, k, w)), hj.Dsa(topk=4), query_positions=positions)
    np.testing.assert_array_equal(got.count, [[0, 4, 0]])
