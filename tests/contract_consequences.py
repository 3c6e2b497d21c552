"""What follows from the contract, a test a promise, and what a user would expect beside it."""

import dataclasses
import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized

import hisa_jax as hj
from tests import draw
from tests.contract import (
    DSA,
    HISA,
    PLAIN,
    RATIO,
    Contract,
    assert_same_bits,
    each_method,
    each_plain,
    everywhere,
    rows,
    standard,
)


class ConsequencesContract(Contract, chex.TestCase):
    """Few or all tokens, chunks, decoding, batches; what else may be asked for, and JAX's transforms."""

    @each_plain
    @pytest.mark.gate("dsa", "block_sparse", "scan")
    def test_up_to_topk_visible_tokens_all_are_selected(self, method):
        T = method.topk
        q, k, w = draw.inputs(1, T, T, 4, 32)
        got = self.select(q, k, w, method)
        wanted = np.where(np.arange(T)[None] <= np.arange(T)[:, None], np.arange(T)[None], -1)
        np.testing.assert_array_equal(got.indices[0], wanted)

    @parameterized.parameters(
        (40, "float32"), (63, "bfloat16"), (64, "int8"), (65, "float32"),
        (200, "float32"), (200, "bfloat16"), (200, "int8"),
    )  # fmt: skip
    @pytest.mark.gate(2, 5)
    @pytest.mark.slow
    def test_up_to_all_kept_blocks_the_selection_is_the_flat_one_bit_for_bit(self, S, dtype):
        # Both where the shapes say so (S <= 64) and where only the run-time positions do.
        q, k, w = draw.inputs(1, 8, S, 8, 64, dtype=dtype)
        positions = jnp.asarray(np.linspace(0, min(S, 64) - 1, 8).astype(np.int32)[None])
        assert_same_bits(
            *(self.select(q, k, w, m, query_positions=positions, return_blocks=False) for m in (DSA, HISA))
        )

    @pytest.mark.slow
    def test_with_all_blocks_kept_the_selection_is_the_flat_one_bit_for_bit(self):
        q, k, w = draw.inputs(2, 8, 500, 8, 64, dtype="bfloat16")
        for block_topk in (32, 100):  # just all of them, more than there are
            method = hj.Hisa(topk=24, block_size=16, block_topk=block_topk)
            assert_same_bits(self.select(q, k, w, method, return_blocks=False), self.select(q, k, w, DSA))

    def test_a_ratio_keeps_one_block_in_so_many(self):
        # Up to 3 blocks, which hold topk = 24 tokens even if the last holds one, all; then a half; then 7.
        positions = everywhere([15, 33, 47, 95, 96, 127, 128, 149])
        got = self.assert_keeps_the_contract(*standard(), RATIO, query_positions=positions)
        self.assertEqual(np.sum(got.blocks[0] >= 0, axis=1).tolist(), [1, 3, 3, 3, 4, 4, 5, 5])
        self.assertEqual(np.asarray(got.count[0]).tolist(), [16, *[24] * 7])
        positions = everywhere([0, 15, 16, 31, 32, 33, 46, 47])
        options = dict(query_positions=positions, return_blocks=False)
        assert_same_bits(*(self.select(*standard(), m, **options) for m in (RATIO, DSA)))

    def test_a_bound_beyond_all_blocks_leaves_a_ratio_its_say(self):
        got = self.assert_keeps_the_contract(*standard(), dataclasses.replace(RATIO, block_topk=40))
        self.assertEqual(got.blocks.shape, (2, 8, 40))
        self.assertEqual(np.sum(got.blocks[0, -1] >= 0), 5)

    @parameterized.parameters(
        ("hisa", "float32"), ("hisa", "bfloat16"), ("hisa", "int8"),
        ("dsa", "float8_e4m3fn"), ("block_sparse", "bfloat16"),
    )  # fmt: skip
    @pytest.mark.gate(1)  # one token at a time, the next test has every method
    @pytest.mark.slow
    @pytest.mark.optimised
    def test_prefill_chunks_do_not_change_the_selection(self, method, dtype):
        S, method = 150, PLAIN[method]
        q, k, w = draw.inputs(1, S, S, 8, 64, dtype=dtype)
        whole = self.select(q, k, w, method)
        for start, end in itertools.pairwise((0, 1, 17, 64, 150)):  # a single query, block edges and their neighbours
            # The keys that a chunk sees grow; its queries are the last of them.
            part = self.select(q[:, start:end], k[:, :end], w[:, start:end], method)
            assert_same_bits(part, rows(whole, slice(None), slice(start, end)))

    @parameterized.product(method=list(PLAIN), heads=[1, 64])
    @pytest.mark.gate(9)  # the scan; HISA has the test above
    @pytest.mark.slow
    @pytest.mark.optimised
    def test_one_token_at_a_time_gives_the_selection_of_one_shot(self, method, heads):
        # As in decoding: one static buffer of keys, filled up to the length.
        S, method = 140, PLAIN[method]
        q, k, w = draw.inputs(1, S, S, heads, 64, dtype="bfloat16")
        whole = self.select(q, k, w, method)
        buffer = np.zeros((1, 400, 64), k.dtype)
        step = jax.jit(functools.partial(self.select, method=method))
        for t in range(0, S, 3):
            buffer[:, : t + 1] = k[:, : t + 1]
            one = step(q[:, t : t + 1], buffer, w[:, t : t + 1], lengths=jnp.array([t + 1]))
            assert_same_bits(one, rows(whole, slice(None), slice(t, t + 1)))

    @each_method
    @pytest.mark.gate("scan_units")
    @pytest.mark.slow
    def test_a_batch_gives_each_sequence_its_own_selection(self, method):
        q, k, w = standard()
        batch = self.select(q, k, w, method)
        for b in range(2):
            one = self.select(*(x[b : b + 1] for x in (q, k, w)), method)
            assert_same_bits(one, rows(batch, slice(b, b + 1)))

    @each_method
    def test_the_same_call_gives_the_same_bits(self, method):
        q, k, w = standard()
        first = self.select(q, k, w, method)
        for _ in range(3):
            assert_same_bits(self.select(q, k, w, method), first)

    # What a user would expect beside the contract.

    @each_method
    @pytest.mark.gate("dsa", "block_sparse", "scan")
    @pytest.mark.slow
    def test_scores_and_blocks_do_not_change_the_selection(self, method):
        q, k, w = standard()
        plain = self.select(q, k, w, method, return_scores=False, return_blocks=False)
        extra = self.select(q, k, w, method)
        assert_same_bits(hj.Selection(indices=extra.indices, count=extra.count), plain)

    @each_plain
    @pytest.mark.gate("dsa", "hisa", "block_sparse", "scan")
    @pytest.mark.slow
    def test_topk_may_exceed_the_tokens_and_blocks_there_are(self, method):
        options = {name: value for name, value in vars(method).items() if name != "topk"}
        if "block_topk" in options:
            options["block_topk"] = 32
        if "candidates" in options:
            options["candidates"] = None
        more = type(method)(topk=512, **options)
        got = self.assert_keeps_the_contract(*draw.inputs(1, 5, 70, 4, 32), more)
        self.assertEqual(got.indices.shape, (1, 5, 512))

    @parameterized.parameters((0, 3, 50), (2, 0, 50), (2, 3, 0))
    def test_empty_batches_give_empty_selections(self, B, T, S):
        q, k, w = draw.inputs(B, T, S, 4, 32)
        positions = jnp.zeros((B, T), jnp.int32)
        for method in PLAIN.values():
            got = self.select(q, k, w, method, query_positions=positions)
            chex.assert_shape(got.indices, (B, T, method.topk))
            self.assertTrue(np.all(np.asarray(got.indices) == -1))
            self.assertTrue(np.all(np.asarray(got.count) == 0))

    @each_method
    def test_no_gradient_flows_through_a_selection(self, method):
        q, k, w = standard()

        def total(q):
            got = self.select(q, k, w, method)
            return jnp.sum(jnp.where(got.indices >= 0, got.scores, 0)) + jnp.sum(q) * 0

        gradient = jax.grad(total)(jnp.asarray(q))
        self.assertTrue(np.all(np.asarray(gradient) == 0))

    @each_method
    @pytest.mark.gate("hisa")
    def test_vmap_over_calls_gives_what_the_calls_give(self, method):
        q, k, w = (x[:, None] for x in draw.inputs(2, 3, 100, 4, 32))
        mapped = jax.vmap(functools.partial(self.select, method=method))(*map(jnp.asarray, (q, k, w)))
        for b in range(2):
            one = self.select(q[b], k[b], w[b], method)
            np.testing.assert_array_equal(mapped.indices[b], one.indices)
