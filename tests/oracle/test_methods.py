"""The oracle keeps the contract: what each method selects."""

import itertools
import math
import types

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hisa_jax.testing.oracle.methods import block_budget, block_size_of
from tests import oracle
from tests.oracle.cases import METHODS, BlockSparse, Dsa, Hisa, Scan, chosen, draw, one_query


def test_flat_takes_the_best_tokens_a_tie_going_to_the_lower_position():
    q, k, w = one_query([5, 7, 1, 7, 5, 5])
    got = oracle.select(q, k, w, Dsa(4))
    assert chosen(got, 0, 0) == [0, 1, 3, 4]  # both 7s, then the first two of the three 5s
    np.testing.assert_array_equal(got.scores[0, 0], [5, 7, 7, 5])
    assert got.indices.dtype == np.int32 and got.count.dtype == np.int32


def test_hisa_keeps_first_and_last_block_then_the_best_mean_then_the_best_tokens():
    # blocks (0 0) (9 1) (6 6) (8 0) (0 1), means 0 5 6 4 0.5: 0 and 4 kept by force, 2 by its mean. Token 2 is lost.
    q, k, w = one_query([0, 0, 9, 1, 6, 6, 8, 0, 0, 1])
    got = oracle.select(q, k, w, Hisa(4, 2, 3))
    assert got.blocks[0, 0].tolist() == [0, 2, 4]
    assert chosen(got, 0, 0) == [0, 4, 5, 9]  # 6 6 1, and the first of the zeros
    np.testing.assert_array_equal(got.block_scores[0, 0], [0, 5, 6, 4, 0.5])


def test_block_sparse_takes_all_visible_tokens_of_the_best_blocks():
    # same blocks, the query at position 8: token 9 is not visible, its block is still the last eligible one.
    q, k, w = one_query([0, 0, 9, 1, 6, 6, 8, 0, 0, 1])
    got = oracle.select(q, k, w, BlockSparse(6, 2), query_positions=[[8]])
    assert got.blocks[0, 0].tolist() == [0, 2, 4]
    assert chosen(got, 0, 0) == [0, 1, 4, 5, 8]
    assert got.indices.shape == (1, 1, 6) and got.indices[0, 0, 5] == -1


def test_equal_blocks_go_to_the_lower_block():
    q, k, w = one_query([3] * 12)
    assert oracle.select(q, k, w, Hisa(4, 2, 4)).blocks[0, 0].tolist() == [0, 1, 2, 5]


def test_several_blocks_can_be_kept_at_both_ends():
    q, k, w = one_query([0, 0, 0, 0, 1, 2, 3, 0, 0, 0])
    got = oracle.select(q, k, w, Hisa(5, 1, 5, keep_first=2, keep_last=2))
    assert got.blocks[0, 0].tolist() == [0, 1, 6, 8, 9]


@pytest.mark.parametrize(
    ("eligible", "kept"), [(0, 0), (1, 1), (2, 2), (3, 2), (6, 2), (7, 3), (9, 3), (10, 4), (13, 5), (16, 5), (99, 5)]
)
def test_a_ratio_keeps_one_block_in_so_many_at_least_what_holds_topk_tokens_at_most_the_bound(eligible, kept):
    # Of the 2 kept at least, one may hold 1 token and the other holds 2: topk = 3 of them can be had.
    assert block_budget(Hisa(3, 2, 5, block_ratio=3), eligible) == kept
    assert block_budget(Hisa(4, 2, 5, block_ratio=3), eligible) == max(kept, min(eligible, 3))
    assert block_budget(Hisa(3, 2, 5, 2, 2, block_ratio=3), eligible) == max(kept, min(eligible, 4))
    assert block_budget(Hisa(3, 2, 5), eligible) == min(eligible, 5)


def test_a_ratio_drops_the_worst_of_the_best_blocks():
    # Means 1 9 8 7 6 5 4 3: of 8 blocks a half is kept, the first and the last and the best two.
    q, k, w = one_query([1, 9, 8, 7, 6, 5, 4, 3])
    got = oracle.select(q, k, w, Hisa(2, 1, 6, block_ratio=2))
    assert got.blocks[0, 0].tolist() == [0, 1, 2, 7]
    assert chosen(got, 0, 0) == [1, 2]


def test_nan_counts_as_minus_infinity_and_is_chosen_only_when_nothing_better_is_left():
    q, k, w = one_query([np.nan, 1, np.nan, 0, np.nan])
    assert chosen(oracle.select(q, k, w, Dsa(2)), 0, 0) == [1, 3]
    assert chosen(oracle.select(q, k, w, Dsa(3)), 0, 0) == [0, 1, 3]
    blocks = oracle.select(q, k, w, Hisa(3, 1, 3, 0, 1))  # a NaN block comes last of all, but the last one is forced
    assert blocks.blocks[0, 0].tolist() == [1, 3, 4]
    assert blocks.block_scores[0, 0][0] == -np.inf and blocks.scores[0, 0].tolist() == [1, 0, -np.inf]


def test_negative_weights_turn_the_order_around():
    q, k, w = one_query([4, 1, 3, 2])
    assert chosen(oracle.select(q, k, -w, Dsa(2)), 0, 0) == [1, 3]


def test_visible_is_up_to_the_own_position_and_the_length():
    q, k, w = draw(2, 2, 5, 8, 1, 2)
    got = oracle.select(q, k, w, Dsa(3), query_positions=[[-5, -1, 0, 6, 99]] * 2, lengths=[4, 99])
    assert got.visible.tolist() == [[0, 0, 1, 4, 4], [0, 0, 1, 7, 8]]
    assert got.positions[0].tolist() == [-1, -1, 0, 6, 99]
    assert got.count.tolist() == [[0, 0, 1, 3, 3]] * 2 and (got.indices[:, :2] == -1).all()


def test_by_default_the_queries_are_the_last_tokens():
    q, k, w = draw(3, 3, 4, 6, 1, 2)
    assert oracle.select(q, k, w, Dsa(2)).positions.tolist() == [[2, 3, 4, 5]] * 3
    got = oracle.select(q, k, w, Dsa(2), lengths=[5, 2, -3])
    assert got.positions.tolist() == [[1, 2, 3, 4], [-1, -1, 0, 1], [-1] * 4]


def test_absent_tokens_and_garbage_behind_the_length_change_nothing():
    q, k, w = draw(4, 1, 7, 24, 2, 4)
    dirty = k.copy()
    dirty[:, 19:] = np.nan
    for method in METHODS:
        got = oracle.select(q, dirty, w, method, lengths=[19])
        np.testing.assert_array_equal(got.indices, oracle.select(q, k[:, :19], w, method).indices)


def in_4_bits(key):
    """A key of one group: the scale is found by trying those of 5 bits from below."""
    scale = 2.0**-20
    while 7 * scale < max(abs(float(x)) for x in key):
        scale += 2.0 ** (math.floor(math.log2(scale)) - 4)
    return [round(float(x) / scale) * scale for x in key]


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_a_brute_force_search_in_plain_python_agrees(method):
    B, T, S, H, D = 2, 9, 21, 3, 4
    q, k, w = draw(5, B, T, S, H, D)
    lengths = [21, 18]
    got = oracle.select(q, k, w, method, lengths=lengths)
    for b, t in itertools.product(range(B), range(T)):
        length = lengths[b]
        visible = min(length - T + t + 1, length)

        def score(key, b=b, t=t):
            total = 0.0
            for h in range(H):
                dot = sum(float(q[b, t, h, d]) * float(key[d]) for d in range(D))
                total += float(w[b, t, h]) * max(dot, 0.0)
            return total

        def dot(h, key, b=b, t=t):
            return sum(float(q[b, t, h, d]) * float(key[d]) for d in range(D))

        def linear(key, b=b, t=t, visible=visible):
            # So few tokens that all are samples.
            best = sorted(range(visible), key=lambda s: (-score(k[b, s]), s))[:32]
            sizes = [abs(float(w[b, t, h])) * math.hypot(*map(float, q[b, t, h])) for h in range(H)]
            exact = sorted(range(H), key=lambda h: -sizes[h])[: method.exact_heads]
            total = 0.0
            for h in range(H):
                is_open = [dot(h, k[b, s]) > 0 for s in best]
                slope = 1.0 if method.slopes == "plain" else sum(is_open) / len(best)
                product = dot(h, in_4_bits(key) if method.sketch else key)
                total += float(w[b, t, h]) * (max(product, 0.0) if h in exact else slope * product)
            return total

        tokens = list(range(visible))
        if not isinstance(method, Dsa):
            size = block_size_of(method)
            rank = {}
            for j in range(math.ceil(visible / size)):
                members = range(j * size, min(j * size + size, visible if isinstance(method, Scan) else length))
                if isinstance(method, Scan):
                    block_score = max(linear(k[b, s]) for s in members)
                else:
                    block_score = score(sum(k[b, s].astype(float) for s in members) / len(members))
                is_forced = j < method.keep_first or j >= math.ceil(visible / size) - method.keep_last
                rank[j] = (not is_forced, -block_score, j)
            budget = block_budget(method, len(rank))
            kept = sorted(rank, key=rank.get)[:budget]
            tokens = [s for s in tokens if s // size in kept]
            assert got.blocks[b, t].tolist() == sorted(kept)
        tokens = sorted(tokens, key=lambda s: (-score(k[b, s]), s))[: method.topk]
        assert chosen(got, b, t) == sorted(tokens)
        np.testing.assert_allclose(got.scores[b, t][: len(tokens)], [score(k[b, s]) for s in sorted(tokens)])


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.integers(1, 5), st.integers(1, 6), st.integers(0, 9))
def test_short_contexts_select_everything_and_medium_ones_equal_flat(S, block_size, block_topk, seed):
    block_topk = max(2, block_topk)
    topk = max(1, block_topk * block_size - seed % 3)
    q, k, w = draw(seed, 1, S, S, 2, 3)
    hisa, flat = (oracle.select(q, k, w, m) for m in (Hisa(topk, block_size, block_topk), Dsa(topk)))
    for t in range(S):
        if t + 1 <= topk:
            assert chosen(hisa, 0, t) == list(range(t + 1))
        if t + 1 <= block_size * block_topk:
            assert chosen(hisa, 0, t) == chosen(flat, 0, t)


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_the_result_does_not_depend_on_chunks_batches_or_packing(method):
    lengths, queries = [17, 0, 1, 23], [5, 0, 1, 23]
    q, k, w = draw(6, 1, 29, 41, 2, 3)
    cu_q, cu_k = np.cumsum([0, *queries]), np.cumsum([0, *lengths])
    packed = oracle.select_packed(q[0], k[0], w[0], cu_q, cu_k, method)
    for r, (length, own) in enumerate(zip(lengths, queries, strict=True)):
        for t in range(own):
            at, key = cu_q[r] + t, slice(cu_k[r], cu_k[r + 1])
            alone = oracle.select(
                q[:, at : at + 1], k[:, key], w[:, at : at + 1], method, query_positions=[[length - own + t]]
            )
            np.testing.assert_array_equal(packed.indices[at], alone.indices[0, 0])
            np.testing.assert_array_equal(packed.token_scores[at], alone.token_scores[0, 0])


def test_packed_queries_of_no_request_select_nothing():
    q, k, w = draw(7, 1, 6, 10, 1, 2)
    got = oracle.select_packed(q[0], k[0], w[0], [1, 3, 4], [0, 4, 10], Hisa(4, 2, 2))
    assert got.positions.tolist() == [-1, 2, 3, 5, -1, -1]
    assert got.count.tolist() == [0, 3, 4, 4, 0, 0]


def test_quantised_keys_select_like_their_dequantised_values():
    q, k, w = draw(8, 2, 6, 30, 2, 8)
    values, scales = oracle.quantize_keys(k)
    keys = types.SimpleNamespace(values=values, scales=scales)
    for method in METHODS:
        got = oracle.select(q, keys, w, method)
        wanted = oracle.select(q, oracle.dequantize(values, scales), w, method)
        oracle.assert_same_selection(got.indices, got.count, wanted, 1e-12)


def test_a_method_that_lets_a_future_mean_decide_is_refused():
    with pytest.raises(ValueError, match="mean would decide"):
        oracle.select(*one_query([1, 2]), Hisa(2, 1, 2, 0, 0))
    with pytest.raises(ValueError, match="wanted Hisa, Dsa, BlockSparse or Scan"):
        oracle.select(*one_query([1, 2]), types.SimpleNamespace(topk=1))
