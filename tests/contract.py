"""The contract, a test a promise. An implementation subclasses `Contract`, names itself and inherits every promise."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from hypothesis import given, settings
from hypothesis import strategies as st

import hisa_jax as hj
from hisa_jax.testing.oracle.entries import width
from hisa_jax.testing.oracle.methods import block_budget
from tests import draw, oracle
from tests.draw import Inputs, named

TOLERANCE = 1e-5  # float32 sums in another order, relative to the scale of a query's scores

DSA = hj.Dsa(topk=24)
HISA = hj.Hisa(topk=24, block_size=16, block_topk=4)
BLOCK_SPARSE = hj.BlockSparse(topk=64, block_size=16)
RATIO = hj.Hisa(topk=24, block_size=16, block_topk=7, block_ratio=2)
SCAN = hj.Scan(topk=24, candidates=48, exact_heads=1)
SCAN_UNITS = hj.Scan(topk=24, candidates=64, exact_heads=0, unit=8)
PLAIN = {
    "dsa": DSA,
    "hisa": HISA,
    "hisa_ratio": RATIO,
    "block_sparse": BLOCK_SPARSE,
    "scan": SCAN,
    "scan_units": SCAN_UNITS,
}
# Keys that are entries, no activation, a selection a head, blocks by their best token. conftest.py leaves the cases of
# these names out of the gate; test_entries.py has some of each there.
FAMILY = {
    "family_pools": hj.Dsa(topk=6, entry_size=4, tail="open"),
    "family_entries": hj.Hisa(topk=8, block_size=4, block_topk=3, entry_size=4, returns="entries"),
    "family_scanned_pools": hj.Scan(topk=6, candidates=12, exact_heads=1, entry_size=8, tail="open"),
    "family_linear": hj.Hisa(topk=24, block_size=16, block_topk=4, activation=None),
    "family_block_max": hj.BlockSparse(topk=64, block_size=16, keep_first=0, keep_last=0, scored_by="max"),
    "family_each_head": hj.BlockSparse(
        topk=48, block_size=16, keep_first=0, scored_by="max", activation=None, per_head=True
    ),
    "family_heads_and_pools": hj.Hisa(topk=4, block_size=2, block_topk=3, entry_size=16, tail="open", per_head=True),
}
METHODS = PLAIN | FAMILY
HIERARCHICAL = {"hisa": HISA, "hisa_ratio": RATIO, "block_sparse": BLOCK_SPARSE}
each_method = parameterized.named_parameters(METHODS.items())
each_plain = parameterized.named_parameters(PLAIN.items())
each_hierarchical = parameterized.named_parameters(HIERARCHICAL.items())


# Tests that differ by values alone share this shape, and so a compiled program.
STANDARD = draw.Shape(2, 8, 150, 4, 32)
STANDARD_QUERIES = (STANDARD.B, STANDARD.T, STANDARD.H, STANDARD.D)
_as_one_program = jax.jit(
    hj.select, static_argnames=("method", "implementation", "return_scores", "return_blocks", "tiles")
)


def standard() -> Inputs:
    return draw.inputs(*STANDARD)


def everywhere(positions) -> np.ndarray:
    """The same 8 query positions for both sequences of the standard shape."""
    return np.array([positions] * 2, np.int32)


def assert_same_bits(got: hj.Selection, wanted: hj.Selection) -> None:
    chex.assert_trees_all_equal(got, wanted)


def rows(selection: hj.Selection, *at) -> hj.Selection:
    """The selection of some of the queries, by NumPy: XLA would compile a program a place."""
    return jax.tree.map(lambda leaf: np.asarray(leaf)[at], selection)


class Contract(parameterized.TestCase):
    """Promises of one implementation; `implementation` names it."""

    implementation: str

    def select(self, q, k, w, method, **options) -> hj.Selection:
        """Selects with all that can be asked for.

        The shapes that many tests have are called as users do. Others are one program: the operations around it would
        each be compiled for the one test.
        """
        options = dict(return_scores=True, return_blocks=method.has_blocks) | options
        q, k, w = jax.tree.map(jnp.asarray, (q, k, None if method.per_head else w))
        select = hj.select if q.shape == STANDARD_QUERIES else _as_one_program
        return select(q, k, w, method, implementation=self.implementation, **options)

    def assert_agrees(self, got: hj.Selection, reference: oracle.OracleSelection, tolerance: float = TOLERANCE) -> None:
        oracle.assert_same_selection(got.indices, got.count, reference, tolerance, scores=got.scores, blocks=got.blocks)

    def assert_keeps_the_contract(self, q, k, w, method, tolerance=TOLERANCE, **options) -> hj.Selection:
        """Selects, compares with the oracle, returns the selection."""
        reference = oracle.select(q, k, w, method, **options)
        got = self.select(q, k, w, method, **jax.tree.map(jnp.asarray, options))
        self.assert_agrees(got, reference, tolerance)
        return got


class SelectionContract(Contract, chex.TestCase):
    """Section 2 of the contract, in its order."""

    @parameterized.product(shape=list(draw.SHAPES), method=list(PLAIN))
    # Every shape once, the flat indexer in most; every method has the standard shape below.
    @pytest.mark.gate(0, 6, 14, 21, 24, 30, 35)
    @pytest.mark.optimised
    def test_selects_what_the_oracle_selects(self, shape, method):
        self.assert_keeps_the_contract(*draw.inputs(*draw.SHAPES[shape]), PLAIN[method])

    @each_method
    @pytest.mark.gate("hisa")
    def test_it_selects_the_same_under_jit(self, method):
        q, k, w = standard()
        under_jit = jax.jit(functools.partial(self.select, method=method))(q, k, w)
        self.assert_agrees(under_jit, oracle.select(q, k, w, method))

    # The score. Block-sparse selection scores blocks as HISA does.

    @parameterized.parameters(
        ("1", "16", "bfloat16", "dsa"),
        ("16", "64", "float8_e4m3fn", "hisa_ratio"),
        ("32", "128", "int8", "scan"),
        ("64", "128", "bfloat16", "block_sparse"),
        ("128", "256", "float32", "hisa"),
        ("64", "64", "float8_e4m3fn", "scan_units"),
    )
    @pytest.mark.gate(*range(5))
    @pytest.mark.slow
    def test_scores_are_the_formula_for_heads_sizes_and_dtypes_together(self, heads, size, dtype, method):
        # Every number, size and dtype by some method. One by one they are in the exhaustive run.
        inputs = draw.inputs(1, 4, 150, draw.HEADS[heads], draw.SIZES[size], dtype=dtype)
        self.assert_keeps_the_contract(*inputs, PLAIN[method])

    @parameterized.product(heads=list(draw.HEADS), method=["dsa", "hisa"])
    @pytest.mark.exhaustive
    @pytest.mark.slow
    def test_scores_are_the_formula_for_every_number_of_heads(self, heads, method):
        self.assert_keeps_the_contract(*draw.inputs(1, 4, 150, draw.HEADS[heads], 32), PLAIN[method])

    @parameterized.product(size=list(draw.SIZES), method=["dsa", "hisa"])
    @pytest.mark.exhaustive
    @pytest.mark.slow
    def test_scores_are_the_formula_for_every_head_size(self, size, method):
        self.assert_keeps_the_contract(*draw.inputs(1, 4, 150, 4, draw.SIZES[size]), PLAIN[method])

    @parameterized.product(dtype=list(draw.DTYPES), method=list(PLAIN))
    @pytest.mark.exhaustive
    def test_scores_are_the_formula_for_every_dtype(self, dtype, method):
        self.assert_keeps_the_contract(*draw.inputs(2, 5, 140, 4, 64, dtype=dtype), PLAIN[method])

    @parameterized.product(
        q_dtype=["float32", "bfloat16", "float8_e4m3fn", "int8"],
        k_dtype=["float8_e4m3fn", "int8"],
    )
    @pytest.mark.gate(0, 3)  # queries of the keys' dtype: the next test
    @pytest.mark.slow
    def test_key_scales_multiply_the_score(self, q_dtype, k_dtype):
        q, k, w = draw.inputs(2, 5, 140, 4, 64)
        for scale in ("float32", "ue8m0"):
            self.assert_keeps_the_contract(draw.cast(q, q_dtype), draw.quantized(k, k_dtype, scale), w, HISA)

    @parameterized.product(dtype=["float8_e4m3fn", "int8"], method=["dsa", "block_sparse"])
    @pytest.mark.gate(0, 3)
    def test_every_method_takes_key_scales(self, dtype, method):
        q, k, w = draw.inputs(2, 5, 140, 4, 64)
        self.assert_keeps_the_contract(draw.cast(q, dtype), draw.quantized(k, dtype, "float32"), w, PLAIN[method])

    @each_plain
    def test_weights_may_be_negative(self, method):
        q, k, w = standard()
        got = self.assert_keeps_the_contract(q, k, -np.abs(w), method)
        self.assertTrue(np.all(np.asarray(got.scores)[np.asarray(got.indices) >= 0] <= 0))

    # Visible.

    @each_method
    @pytest.mark.check
    def test_visible_are_the_tokens_up_to_the_query_and_the_length(self, method):
        # Block edges and their neighbours, the first token, the last, one past the length, one past all keys.
        positions, lengths = everywhere([0, 15, 16, 17, 63, 64, 89, 1000]), np.array([90, 150], np.int32)
        self.assert_keeps_the_contract(*standard(), method, query_positions=positions, lengths=lengths)

    @each_method
    @pytest.mark.check
    def test_a_query_at_position_minus_one_selects_nothing(self, method):
        positions = everywhere([-1, 40, -1, 99, 149, -1, -1, 3])
        got = self.assert_keeps_the_contract(*standard(), method, query_positions=positions)
        self.assertTrue(np.all(np.asarray(got.count)[positions == -1] == 0))
        self.assertTrue(np.all(np.asarray(got.indices)[positions == -1] == -1))

    @each_method
    def test_by_default_the_queries_are_the_last_tokens(self, method):
        q, k, w = standard()
        lengths = np.array([150, 61], np.int32)
        positions = (lengths[:, None] - 8 + np.arange(8)).astype(np.int32)
        explicit = self.select(q, k, w, method, query_positions=jnp.asarray(positions), lengths=jnp.asarray(lengths))
        assert_same_bits(self.select(q, k, w, method, lengths=jnp.asarray(lengths)), explicit)

    @parameterized.product(method=list(PLAIN), length=[0, 1, 15, 16, 17, 63, 64, 65, 149])
    @pytest.mark.check
    def test_lengths_at_block_edges(self, method, length):
        self.assert_keeps_the_contract(*standard(), PLAIN[method], lengths=np.array([length, 150], np.int32))

    @each_method
    def test_impossible_lengths_and_positions_are_clipped(self, method):
        limits = np.iinfo(np.int32)
        extreme, lengths = everywhere([-7, limits.min, limits.max, 20, 150, 151, -2, 0]), np.array([-3, 5000], np.int32)
        self.assert_keeps_the_contract(*standard(), method, query_positions=extreme, lengths=lengths)

    # The result.

    @each_method
    @pytest.mark.check
    def test_indices_are_ascending_then_minus_one_and_count_says_how_many(self, method):
        positions = everywhere([0, 1, 15, 22, 23, 24, 63, 149])
        got = jax.tree.map(np.asarray, self.select(*standard(), method, query_positions=jnp.asarray(positions)))
        chex.assert_type([got.indices, got.count], np.int32)
        heads = (4,) if method.per_head else ()
        chex.assert_shape(got.indices, (2, 8, *heads, width(method)))
        flat = (x.reshape(-1, x.shape[-1]) for x in (got.indices, got.scores))
        for indices, scores, count in zip(*flat, got.count.reshape(-1), strict=True):
            self.assertTrue(np.all(np.diff(indices[:count]) > 0))
            self.assertTrue(np.all(indices[count:] == -1))
            self.assertTrue(np.all(np.isneginf(scores[count:])))

    @parameterized.parameters(1, 23, 64, 200)  # one, some, just all, more than there are
    @pytest.mark.gate(1)
    @pytest.mark.slow
    def test_exactly_topk_or_all_visible_candidates_are_chosen(self, topk):
        q, k, w = draw.inputs(1, 64, 64, 4, 32)
        flat = self.select(q, k, w, hj.Dsa(topk=topk))
        self.assertEqual(flat.count[0].tolist(), [min(topk, t + 1) for t in range(64)])
        if topk <= 64:
            hisa = self.select(q, k, w, hj.Hisa(topk=topk, block_size=32, block_topk=2))
            self.assertEqual(hisa.count[0].tolist(), flat.count[0].tolist())

    @settings(max_examples=25)
    @given(data=st.data())
    @pytest.mark.slow
    def test_nothing_is_chosen_twice_and_nothing_invisible_ever(self, data):
        # One compiled shape, any run-time values: lengths and positions beyond all bounds among them.
        B, T, S = STANDARD[:3]
        q, k, w = draw.inputs(*STANDARD, seed=data.draw(st.integers(0, 9)))
        positions = data.draw(st.lists(st.integers(-2, S + 2), min_size=B * T, max_size=B * T))
        lengths = data.draw(st.lists(st.integers(-1, S + 1), min_size=B, max_size=B))
        options = dict(query_positions=np.array(positions, np.int32).reshape(B, T), lengths=np.array(lengths, np.int32))
        for method in PLAIN.values():
            self.assert_keeps_the_contract(q, k, w, method, **options)

    # Ties, NaN, infinity.

    @parameterized.named_parameters(
        ("standard", *STANDARD), *named("one_token", "one_query", "block_edge", "ragged_tail")
    )
    @pytest.mark.gate("standard")
    def test_ties_go_to_the_lower_position(self, B, T, S, H, D):
        q, k, w = draw.equal_scores(B, T, S, H, D)
        for method in PLAIN.values():
            # Float32 scores are not the oracle's to the last bit; that they are equal is what matters here.
            got = dataclasses.replace(self.select(q, k, w, method), scores=None)
            self.assert_agrees(got, oracle.select(q, k, w, method), tolerance=0.0)

    @parameterized.product(seed=[0, 1, 2], method=list(PLAIN))
    @pytest.mark.check
    def test_partial_ties_go_to_the_lower_position_and_block(self, seed, method):
        # Whole numbers and blocks of 16: sums and means are exact, so the oracle's choice is the only right one.
        q, k, w = draw.few_scores(*STANDARD, seed=seed)
        self.assert_keeps_the_contract(q, k, w, PLAIN[method], tolerance=0.0)

    @pytest.mark.slow
    def test_negative_zero_ties_with_zero(self):
        # Closed relus give 0 for a positive weight and -0 for a negative one; both are the score 0.
        q = np.ones((1, 1, 1, 16), np.float32)
        k = -np.ones((1, 40, 16), np.float32)
        k[0, 30:] = 1  # score < 0 with the negative weight
        for weight in (1.0, -1.0):
            w = np.full((1, 1, 1), weight, np.float32)
            self.assert_keeps_the_contract(q, k, w, hj.Dsa(topk=8), tolerance=0.0)
        mixed = np.concatenate([q, q], axis=2)
        self.assert_keeps_the_contract(mixed, k, np.array([[[1.0, -1.0]]], np.float32), hj.Dsa(topk=8), tolerance=0.0)

    @each_method
    @pytest.mark.check
    def test_nan_scores_count_as_minus_infinity(self, method):
        q, k, w = standard()
        k[:, [3, 40, 100, 149]] = np.nan
        self.assert_keeps_the_contract(q, k, w, method)
        got = self.select(q, k, w, hj.Dsa(topk=140))
        self.assertFalse(np.isin([3, 40, 100, 149], got.indices[0, -1]).any())

    @parameterized.product(where=["q", "k", "w"], value=[np.nan, np.inf, -np.inf], method=list(PLAIN))
    def test_any_input_may_hold_nan_or_infinity(self, where, value, method):
        arrays = standard()._asdict()
        arrays[where] = arrays[where].copy()
        arrays[where][0, 1] = value
        arrays[where][0, -1, ..., 0] = value
        # The values are what is tested, not scores near the threshold: finite ones differ by more than rounding.
        self.assert_keeps_the_contract(**arrays, method=PLAIN[method])

    @each_method
    def test_minus_infinity_is_chosen_when_nothing_better_is_left_and_never_if_invisible(self, method):
        q, k, w = standard()
        self.assert_keeps_the_contract(q, np.full_like(k, np.nan), w, method, tolerance=0.0)
        k[:, 20:] = np.nan  # less than topk real scores
        self.assert_keeps_the_contract(q, k, w, method)

    # Blocks.

    @parameterized.parameters(64, 128, 256)  # 16 is that of most tests
    @pytest.mark.gate(0)
    @pytest.mark.slow
    def test_blocks_start_at_multiples_of_the_block_size(self, block_size):
        S = 5 * block_size + block_size // 2 + 1
        q, k, w = draw.inputs(1, 5, S, 4, 32)
        self.assert_keeps_the_contract(q, k, w, hj.Hisa(topk=8, block_size=block_size, block_topk=3))
        self.assert_keeps_the_contract(q, k, w, hj.BlockSparse(topk=3 * block_size, block_size=block_size))

    @pytest.mark.slow
    def test_block_sizes_need_not_be_powers_of_two(self):
        q, k, w = draw.inputs(1, 5, 200, 4, 32)
        self.assert_keeps_the_contract(q, k, w, hj.Hisa(topk=20, block_size=12, block_topk=5))

    @each_hierarchical
    @pytest.mark.gate("hisa", "block_sparse")  # a ratio takes fewer of the same blocks
    def test_a_mean_is_over_the_tokens_present(self, method):
        # The tail holds 3 tokens of 16. Queries past the length make it the last of several blocks, not their own.
        positions, lengths = everywhere([97, 98, 99, 111, 112, 120, 149, 500]), np.array([99, 131], np.int32)
        self.assert_keeps_the_contract(*standard(), method, query_positions=positions, lengths=lengths)

    @each_hierarchical
    @pytest.mark.check
    def test_the_first_and_last_eligible_blocks_are_always_kept_and_count(self, method):
        q, k, w = standard()
        k[:, :16] = -10 * np.abs(k[:, :16])  # the first block would lose on its score
        positions = everywhere([0, 15, 16, 47, 63, 64, 100, 149])
        got = self.assert_keeps_the_contract(q, k, w, method, query_positions=positions)
        for position, blocks in zip(positions.reshape(-1), np.asarray(got.blocks).reshape(16, -1), strict=True):
            kept = blocks[blocks >= 0]
            self.assertEqual((kept[0], kept[-1]), (0, position // 16))
            self.assertLen(kept, block_budget(method, position // 16 + 1))

    @parameterized.parameters((0, 1), (1, 2), (2, 5), (3, 1))
    @pytest.mark.gate(0)
    @pytest.mark.slow
    def test_any_number_of_first_and_last_blocks_may_be_kept(self, keep_first, keep_last):
        q, k, w = standard()
        block_topk = max(keep_first + keep_last, 4)
        options = dict(block_size=16, keep_first=keep_first, keep_last=keep_last)
        self.assert_keeps_the_contract(q, k, w, hj.Hisa(topk=24, block_topk=block_topk, **options))
        self.assert_keeps_the_contract(q, k, w, hj.BlockSparse(topk=16 * block_topk, **options))

    @pytest.mark.slow
    def test_all_kept_blocks_may_be_forced(self):
        method = hj.Hisa(topk=24, block_size=16, block_topk=4, keep_first=1, keep_last=3)
        got = self.assert_keeps_the_contract(*standard(), method)
        self.assertEqual(got.blocks[0, -1].tolist(), [0, 7, 8, 9])

    @each_method
    @pytest.mark.check
    def test_nothing_behind_a_query_decides_anything(self, method):
        q, k, w = standard()
        positions = jnp.asarray(everywhere(range(61, 69)))
        before = self.select(q, k, w, method, query_positions=positions)
        for future in (1e6, -1e6, np.nan, np.inf):
            changed = k.copy()
            changed[:, 69:] = future
            assert_same_bits(self.select(q, changed, w, method, query_positions=positions), before)

    @each_method
    @pytest.mark.check
    def test_missing_tokens_decide_nothing(self, method):
        q, k, w = standard()
        lengths = jnp.array([135, 135])  # 7 tokens in the last block
        before = self.select(q, k, w, method, lengths=lengths)
        for missing in (1e6, np.nan, np.inf):
            changed = k.copy()
            changed[:, 135:] = missing
            assert_same_bits(self.select(q, changed, w, method, lengths=lengths), before)
