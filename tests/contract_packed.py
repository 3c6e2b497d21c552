"""The contract of packed ragged batches: that of each sequence by itself."""

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
from tests import draw, oracle
from tests.contract import HISA, PLAIN, Contract, assert_same_bits, each_method, rows
from tests.draw import Inputs

SOME_LENGTHS = [7, 30, 2], [90, 170, 41]


class PackedContract(Contract, chex.TestCase):
    """Packed ragged batches: the contract of each sequence by itself."""

    def select_packed(self, q, k, w, cu_seqlens_q, cu_seqlens_k, method, **options) -> hj.Selection:
        """Selects with all that can be asked for."""
        options = dict(return_scores=True, return_blocks=method.has_blocks) | options
        arrays = jax.tree.map(jnp.asarray, (q, k, None if method.per_head else w, cu_seqlens_q, cu_seqlens_k))
        return hj.select_packed(*arrays, method, implementation=self.implementation, **options)

    @staticmethod
    def packed(lengths_q, lengths_k, *, R=12, T=64, N=512, dtype="float32"):
        """Buffers of T queries and N keys that hold sequences of these lengths, rows of padding after them; offsets.

        Of R sequences, the last of them empty, so that batches of any lengths share a compiled program.
        """
        q, k, w = (x[0] for x in draw.inputs(1, T, N, 4, 32, dtype=dtype))
        lengths = (np.pad(lengths, (0, max(R - len(lengths), 0))) for lengths in (lengths_q, lengths_k))
        offsets = (np.concatenate([[0], np.cumsum(x)]).astype(np.int32) for x in lengths)
        return Inputs(q, k, w), *offsets

    @parameterized.product(
        lengths=[
            ([5], [130]),  # one sequence
            ([3, 20, 1, 9], [60, 200, 1, 33]),  # blocks of no sequence start at a multiple of 16 in the buffer
            ([0, 4, 0], [0, 50, 70]),  # no queries, no keys
            ([1] * 12, [15, 16, 17, 31, 32, 33, 1, 2, 100, 64, 65, 63]),  # a decode batch
        ],
        method=list(PLAIN),
    )
    @pytest.mark.check
    def test_a_packed_batch_gives_what_the_oracle_gives(self, lengths, method):
        inputs, cu_q, cu_k = self.packed(*lengths)
        method = PLAIN[method]
        got = self.select_packed(*inputs, cu_q, cu_k, method)
        self.assert_agrees(got, oracle.select_packed(*inputs, cu_q, cu_k, method))

    @each_method
    @pytest.mark.gate("hisa")
    def test_a_packed_batch_gives_the_same_under_jit(self, method):
        inputs, cu_q, cu_k = self.packed([3, 20, 1, 9], [60, 200, 1, 33])
        under_jit = jax.jit(functools.partial(self.select_packed, method=method))(*inputs, cu_q, cu_k)
        self.assert_agrees(under_jit, oracle.select_packed(*inputs, cu_q, cu_k, method))

    @each_method
    @pytest.mark.exhaustive  # the next test has it by fewer programs
    @pytest.mark.slow
    @pytest.mark.optimised
    def test_packing_does_not_change_the_selection(self, method):
        inputs, cu_q, cu_k = self.packed(*SOME_LENGTHS, R=3, dtype="bfloat16")
        packed = self.select_packed(*inputs, cu_q, cu_k, method)
        for r in range(3):
            queries, keys = slice(cu_q[r], cu_q[r + 1]), slice(cu_k[r], cu_k[r + 1])
            q, k, w = inputs.q[None, queries], inputs.k[None, keys], inputs.w[None, queries]
            alone = self.select(q, k, w, method)
            assert_same_bits(rows(packed, queries), rows(alone, 0))

    @each_method
    @pytest.mark.slow
    @pytest.mark.optimised
    @pytest.mark.gate("hisa")  # and the oracle has packed batches of every method
    def test_a_packed_batch_and_a_padded_one_give_the_same_selection(self, method):
        (q, k, w), cu_q, cu_k = self.packed(*SOME_LENGTHS, dtype="bfloat16")
        packed = self.select_packed(q, k, w, cu_q, cu_k, method)
        n_q, n_k = np.array(SOME_LENGTHS, np.int32)
        queries, keys = np.arange(n_q.max(), dtype=np.int32), np.arange(n_k.max(), dtype=np.int32)
        at_q, at_k = cu_q[:3, None] + queries, cu_k[:3, None] + keys  # [3, T], [3, S]: others' rows after its own
        n_tokens = n_k * method.entry_size
        positions = np.where(queries < n_q[:, None], (n_tokens - n_q)[:, None] + queries, -1)
        options = dict(query_positions=jnp.asarray(positions), lengths=jnp.asarray(n_tokens))
        q, k, w = (x.take(at, axis=0, mode="clip") for x, at in ((q, at_q), (k, at_k), (w, at_q)))
        padded = self.select(q, k, w, method, **options)
        for r in range(3):
            assert_same_bits(rows(packed, slice(cu_q[r], cu_q[r + 1])), rows(padded, r, slice(n_q[r])))

    @each_method
    def test_rows_behind_the_last_sequence_select_nothing(self, method):
        inputs, cu_q, cu_k = self.packed([3, 8], [40, 90])
        got = self.select_packed(*inputs, cu_q, cu_k, method)
        self.assertTrue(np.all(np.asarray(got.count[:11]) > 0) and np.all(np.asarray(got.count[11:]) == 0))
        self.assertTrue(np.all(np.asarray(got.indices[11:]) == -1))

    @each_method
    @pytest.mark.gate("dsa", "hisa")
    def test_a_packed_batch_may_fill_its_buffers(self, method):
        inputs, cu_q, cu_k = self.packed([3, 20, 1, 9], [60, 200, 1, 33], R=4, T=33, N=294)
        got = self.select_packed(*inputs, cu_q, cu_k, method)
        self.assert_agrees(got, oracle.select_packed(*inputs, cu_q, cu_k, method))

    @parameterized.product(scale=["float32", "ue8m0"], method=list(PLAIN))
    @pytest.mark.gate(10)  # the scan; HISA has scaled keys in batches
    def test_packed_keys_may_be_quantized(self, scale, method):
        inputs, cu_q, cu_k = self.packed([3, 8], [40, 190])
        keys = draw.quantized(inputs.k, "float8_e4m3fn", scale)
        got = self.select_packed(inputs.q, keys, inputs.w, cu_q, cu_k, PLAIN[method])
        self.assert_agrees(got, oracle.select_packed(inputs.q, keys, inputs.w, cu_q, cu_k, PLAIN[method]))

    @settings(max_examples=25)
    @given(
        lengths_q=st.lists(st.integers(0, 9), min_size=3, max_size=3),
        lengths_k=st.lists(st.integers(0, 40), min_size=3, max_size=3),
    )
    @pytest.mark.slow
    def test_any_lengths_can_be_packed(self, lengths_q, lengths_k):
        (q, k, w), cu_q, cu_k = self.packed(lengths_q, lengths_k)
        for method in PLAIN.values():
            got = self.select_packed(q, k, w, cu_q, cu_k, method)
            self.assert_agrees(got, oracle.select_packed(q, k, w, cu_q, cu_k, method))

    def test_impossible_offsets_read_nothing_outside(self):
        (q, k, w), _, _ = self.packed([], [])
        for cu_q, cu_k in (([5, 2, 27], [0, 60, 120]), ([0, 9, 900], [0, 60, 4000]), ([0, 9, 27], [0, -60, 120])):
            cu_q, cu_k = (np.pad(cu_seqlens, (0, 10), "edge").astype(np.int32) for cu_seqlens in (cu_q, cu_k))
            for method in PLAIN.values():
                got = self.select_packed(q, k, w, cu_q, cu_k, method)
                indices = np.asarray(got.indices)
                self.assertTrue(np.all((indices >= -1) & (indices < 512)))

    @parameterized.parameters(([0], [0], 3, 4), ([0, 0], [0, 0], 0, 0), ([0, 0], [0, 4], 0, 4), ([0, 3], [0, 0], 3, 0))
    def test_an_empty_packed_batch_gives_an_empty_selection(self, cu_q, cu_k, T, N):
        q, k, w = np.ones((T, 4, 32), np.float32), np.ones((N, 32), np.float32), np.ones((T, 4), np.float32)
        got = self.select_packed(q, k, w, np.array(cu_q, np.int32), np.array(cu_k, np.int32), HISA)
        chex.assert_shape(got.indices, (T, HISA.topk))
        self.assertTrue(np.all(np.asarray(got.count) == 0))
