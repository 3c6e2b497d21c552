"""Implementation "xla" keeps the contract, and its tile sizes change nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized

import hisa_jax as hj
from tests import contract, contract_consequences, contract_packed, draw, oracle
from tests.contract import PLAIN, assert_same_bits


class XlaSelectionTest(contract.SelectionContract, contract_consequences.ConsequencesContract):
    implementation = "xla"

    @parameterized.product(tiles=[(3, 128), (1, 1024), (64, 128)], method=list(PLAIN))
    @pytest.mark.gate(1)  # HISA; the scan has small tiles in the form for accelerators
    @pytest.mark.slow
    @pytest.mark.optimised
    def test_tile_sizes_do_not_change_the_selection(self, tiles, method):
        (queries, keys), method = tiles, PLAIN[method]
        q, k, w = draw.inputs(2, 11, 700, 8, 64, dtype="bfloat16")
        options = dict(lengths=jnp.array([700, 333]))
        wanted = self.select(q, k, w, method, **options)
        assert_same_bits(self.select(q, k, w, method, tiles=hj.Tiles(queries=queries, keys=keys), **options), wanted)

    @contract.each_method
    @pytest.mark.gate("dsa", "scan_units")
    def test_one_token_more_than_topk_leaves_one_out(self, method):
        # Without scores, where nothing would be scored that is chosen anyway.
        q, k, w = contract.standard()
        positions = contract.everywhere([method.topk] * 8)
        options = dict(return_scores=False, return_blocks=False)
        got = self.select(q, k, w, method, query_positions=jnp.asarray(positions), **options)
        self.assert_agrees(got, oracle.select(q, k, w, method, query_positions=positions))

    def test_more_means_than_a_tile(self):
        # 600 blocks, scored 128 at a time.
        q, k, w = draw.inputs(1, 3, 1200, 2, 16)
        method = hj.Hisa(topk=16, block_size=2, block_topk=150)  # 300 candidates, in three tiles
        got = self.select(q, k, w, method, tiles=hj.Tiles(keys=128))
        assert_same_bits(got, self.select(q, k, w, method))
        self.assert_keeps_the_contract(q, k, w, method)


class XlaPackedTest(contract_packed.PackedContract):
    implementation = "xla"


def test_a_query_of_no_sequence_costs_no_scores():
    """Rows that see nothing run no tile of keys: NaN everywhere leaves no trace in the others."""
    q, k, w = draw.inputs(1, 3, 64, 2, 16)
    positions = jnp.array([[-1, 5, -1]])
    got = hj.select(*map(jnp.asarray, (q, k, w)), hj.Dsa(topk=4), query_positions=positions)
    np.testing.assert_array_equal(got.count, [[0, 4, 0]])


@pytest.mark.slow
@pytest.mark.gate("hisa_ratio", "scan")
@pytest.mark.parametrize("method", PLAIN.values(), ids=PLAIN)
def test_the_form_for_accelerators_selects_the_same(method, monkeypatch):
    """Off the CPU all queries of a tile are scored in one product; that form must be right here, too."""
    q, k, w = draw.inputs(2, 11, 300, 4, 32)
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *operands, cpu, default: default(*operands))
    jax.clear_caches()
    options = dict(return_scores=True, return_blocks=method.has_blocks)
    got = hj.select(*map(jnp.asarray, (q, k, w)), method, tiles=hj.Tiles(queries=4, keys=128), **options)
    jax.clear_caches()
    reference = oracle.select(q, k, w, method)
    oracle.assert_same_selection(
        got.indices, got.count, reference, contract.TOLERANCE, scores=got.scores, blocks=got.blocks
    )


@pytest.mark.parametrize("platform", ["cuda", "rocm", "tpu"])
def test_it_lowers_for_every_platform(platform):
    q, k, w = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((1, 64, 64, 128), (1, 8192, 128), (1, 64, 64)))
    w = jax.ShapeDtypeStruct(w.shape, jnp.float32)

    def run(q, k, w):
        method = hj.Hisa(topk=512, block_size=128, block_topk=16)
        selection = hj.select(q, k, w, method, implementation="xla")
        return selection, hj.sparse_mla(q, k, selection.indices, scale=0.1, value_dim=64)

    assert jax.export.export(jax.jit(run), platforms=[platform])(q, k, w).platforms == (platform,)
