"""The oracle keeps the contract, and its comparison fails on every kind of broken selection."""

import dataclasses
import itertools
import math
import types

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import oracle


# The names and attributes of hisa_jax's methods, which the oracle reads without importing them.
@dataclasses.dataclass(frozen=True)
class Dsa:
    topk: int


@dataclasses.dataclass(frozen=True)
class Hisa:
    topk: int
    block_size: int = 128
    block_topk: int = 64
    keep_first: int = 1
    keep_last: int = 1


@dataclasses.dataclass(frozen=True)
class BlockSparse:
    topk: int
    block_size: int = 128
    keep_first: int = 1
    keep_last: int = 1


METHODS = [Dsa(6), Hisa(6, 4, 3), Hisa(5, 2, 4, 0, 2), BlockSparse(12, 4), BlockSparse(8, 2, 2, 1)]


def draw(seed, B, T, S, H, D, dtype=np.float32):
    rng = np.random.default_rng(seed)
    arrays = rng.normal(size=(B, T, H, D)), rng.normal(size=(B, S, D)), rng.normal(size=(B, T, H))
    return [array.astype(dtype) for array in arrays]


def one_query(scores):
    """q, k, w of B = T = H = D = 1 whose token scores are `scores`, all at least 0."""
    return np.ones((1, 1, 1, 1)), np.array(scores, float).reshape(1, -1, 1), np.ones((1, 1, 1))


def chosen(selection, *at):
    return selection.indices[at][: selection.count[at]].tolist()


# ---- scores


def test_a_score_is_the_weighted_relu_of_the_products_times_the_key_scale():
    # q0.k = 1*3 + 2*(-1) = 1, q1.k = -3 + 0 = -3 -> relu 0; q0.k' = -1, q1.k' = 1.
    q, w = np.array([[[1, 2], [-1, 0]]]), np.array([[5, -7]])
    k = np.array([[3, -1], [-1, 0]])
    np.testing.assert_array_equal(oracle.token_scores(q, k, w), [[5, -7]])
    np.testing.assert_array_equal(oracle.token_scores(q, k, w, np.array([0.5, 2])), [[2.5, -14]])


def test_scores_agree_with_a_plain_product_also_across_tiles():
    (q,), (k,), (w,) = draw(0, 1, 3, 2500, 16, 8)
    wanted = np.einsum("th,ths->ts", *(w.astype(float), np.maximum(q.astype(float) @ k.T.astype(float), 0)))
    np.testing.assert_allclose(oracle.token_scores(q, k, w), wanted, rtol=1e-12, atol=1e-12)


def test_equal_keys_tie_exactly_and_cutting_the_input_changes_no_bit():
    (q,), (k,), (w,) = draw(1, 1, 5, 700, 13, 37)
    k[1::2] = k[0]
    scores = oracle.token_scores(q, k, w)
    assert (scores[:, 1::2] == scores[:, :1]).all()
    np.testing.assert_array_equal(oracle.token_scores(q[3:4], k[:101], w[3:4]), scores[3:4, :101])


def test_nan_and_infinity_follow_ieee_without_a_warning():
    # H = 2, w = (1, 0): inf * 0 = NaN in the second head. D = 1: 0 * inf = NaN. relu(-inf) = 0.
    q, w = np.array([[[1.0], [1.0]]]), np.array([[1.0, 0.0]])
    scores = oracle.token_scores(q, np.array([[np.inf], [np.nan], [-np.inf], [2.0]]), w)
    np.testing.assert_array_equal(scores, [[np.nan, np.nan, 0, 2]])
    assert oracle.token_scores(q, np.array([[np.inf]]), np.ones((1, 2))) == np.inf


def test_a_block_mean_is_over_the_present_tokens_and_an_empty_block_is_zero():
    # blocks of 2, length 3 of 6: (1 + 3) / 2, 5 / 1, nothing; with scales (1*2 + 3*4) / 2, 5 * 6.
    k = np.array([[1], [3], [5], [np.nan], [9], [11]])
    np.testing.assert_array_equal(oracle.block_means(k, None, 2, 3), [[2], [5], [0]])
    np.testing.assert_array_equal(oracle.block_means(k, np.array([2, 4, 6, 1, 1, 1]), 2, 3), [[7], [30], [0]])
    assert oracle.block_means(k[:5], None, 2, 5).shape == (3, 1)


# ---- selection


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

        tokens = list(range(visible))
        if not isinstance(method, Dsa):
            size = method.block_size
            budget = method.block_topk if isinstance(method, Hisa) else method.topk // size
            rank = {}
            for j in range(math.ceil(visible / size)):
                members = [k[b, s].astype(float) for s in range(j * size, min(j * size + size, length))]
                is_forced = j < method.keep_first or j >= math.ceil(visible / size) - method.keep_last
                rank[j] = (not is_forced, -score(sum(members) / len(members)), j)
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
    with pytest.raises(ValueError, match="wanted Hisa, Dsa or BlockSparse"):
        oracle.select(*one_query([1, 2]), types.SimpleNamespace(topk=1))


# ---- quantisation


def test_e4m3_takes_the_largest_value_to_448():
    # amax 2: scale = 2 * float32(1/448), 2 -> 448, 1 -> 224, -0.5 -> -112.
    values, scales = oracle.quantize_keys(np.array([[1, -0.5, 2, 0]]))
    assert values.dtype == ml_dtypes.float8_e4m3fn and scales.dtype == np.float32
    assert values.astype(float).tolist() == [[224, -112, 448, 0]]
    assert scales[0] == np.float32(2) * np.float32(1 / 448)


def test_e4m3_rounds_half_to_even_down_to_subnormals():
    grid = np.arange(0, 0x7F, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)  # 0 .. 448
    middle = (grid[:-1] + grid[1:]) / 2
    below, above = np.nextafter(middle, np.float32(0)), np.nextafter(middle, np.float32(448))
    for x, wanted in (
        (middle, np.arange(126) + np.arange(126) % 2),
        (below, np.arange(126)),
        (above, np.arange(1, 127)),
    ):
        values, scales = oracle.quantize_keys(np.append(x, np.float32(448)), scale="ue8m0")
        assert scales == 1  # so that nothing but the rounding of the value is seen
        np.testing.assert_array_equal(values[:-1].view(np.uint8), wanted)


def test_ue8m0_rounds_the_scale_up_to_a_power_of_two():
    # 448 -> 1 exactly; the next float32 above -> 2; 1 / 448 = 0.0022.. -> 2^-8; floor 1e-4 / 448 = 2.2e-7 -> 2^-22.
    amax = np.array([448, np.nextafter(np.float32(448), np.float32(449)), 1, 0, 3.5 * 2**20], np.float32)
    _, scales = oracle.quantize_keys(amax[:, None], scale="ue8m0")
    assert scales.tolist() == [1, 2, 2**-8, 2**-22, 2**13]
    rng = np.random.default_rng(0)
    amax = np.exp(rng.uniform(-8, 20, 2000)).astype(np.float32)
    for dtype, largest in (("float8_e4m3fn", 448), ("int8", 127)):
        _, scales = oracle.quantize_keys(amax[:, None], dtype, "ue8m0")
        np.testing.assert_array_equal(scales, 2.0 ** np.ceil(np.log2(amax.astype(float) / largest)))


def test_int8_is_symmetric_and_rounds_half_to_even():
    # amax 127 -> scale 127 * float32(1/127) = 1: 0.5 -> 0, 1.5 -> 2, -2.5 -> -2.
    values, scales = oracle.quantize_keys(np.array([127, 0.5, 1.5, -2.5, -127]), np.int8)
    assert scales == 1 and values.dtype == np.int8 and values.tolist() == [127, 0, 2, -2, -127]


def test_a_key_that_is_not_finite_never_looks_good():
    k = np.array([[1, np.nan], [np.inf, 1], [1, 1]])
    for dtype, scale in itertools.product(("float8_e4m3fn", "int8"), ("float32", "ue8m0")):
        values, scales = oracle.quantize_keys(k, dtype, scale)
        scores = oracle.token_scores(np.ones((1, 1, 2)), values, np.ones((1, 1)), scales)
        assert np.isnan(scores[0, :2]).all() and np.isfinite(scores[0, 2])


def test_the_query_scale_is_folded_into_the_weights():
    (q,), _, (w,) = draw(9, 1, 3, 1, 2, 16)
    values, folded = oracle.quantize_queries(q, w)
    assert folded.dtype == np.float32 and values.shape == q.shape
    keys_values, scales = oracle.quantize_keys(q)
    np.testing.assert_array_equal(values.view(np.uint8), keys_values.view(np.uint8))
    np.testing.assert_array_equal(folded, w * scales)


def test_quantisation_errs_by_at_most_half_a_step():
    (_, (k,), _) = draw(10, 1, 1, 50, 1, 128)
    for dtype, scale in itertools.product(("float8_e4m3fn", "int8"), ("float32", "ue8m0")):
        values, scales = oracle.quantize_keys(k, dtype, scale)
        step = scales[:, None] * 0.5 if dtype == "int8" else np.maximum(np.abs(k) * 2**-4, scales[:, None] * 2**-10)
        assert (np.abs(oracle.dequantize(values, scales) - k) <= step * (1 + 1e-5)).all()


# ---- sparse attention


def test_sparse_mla_by_hand():
    # one head, Dk = 2, value_dim = 1, scale 1: logits ln 1, ln 3 -> p = 1/4, 3/4, out = 4/4 + 8 * 3/4 = 7, lse = ln 4.
    # With a sink of ln 4 the denominator is 8: out = 3.5, lse as before.
    q, kv = np.array([[[[0.0, 1.0]]]]), np.array([[[4, 0], [99, 99], [8, math.log(3)]]])
    for indices in ([[[0, 2, -1]]], [[[0, 2, 3]]], [[[-7, 0, 2]]]):
        out, lse = oracle.sparse_mla(q, kv, indices, 1, 1.0)
        np.testing.assert_allclose([out.item(), lse.item()], [7, math.log(4)])
    out, lse = oracle.sparse_mla(q, kv, [[[0, 2]]], 1, 1.0, sink=np.array([math.log(4)]))
    np.testing.assert_allclose([out.item(), lse.item()], [3.5, math.log(4)])


def test_sparse_mla_of_nothing_is_zero():
    q, kv = np.ones((1, 2, 3, 4)), np.ones((1, 5, 4))
    out, lse = oracle.sparse_mla(q, kv, np.full((1, 2, 3), -1), 2, 1.0, sink=np.zeros(3))
    assert out.shape == (1, 2, 3, 2) and (out == 0).all() and (lse == -np.inf).all()


def test_sparse_mla_of_everything_is_dense_attention_and_large_logits_do_not_overflow():
    rng = np.random.default_rng(1)
    q, kv = 30 * rng.normal(size=(2, 3, 4, 6)), 30 * rng.normal(size=(2, 7, 6))
    out, lse = oracle.sparse_mla(q, kv, np.broadcast_to(rng.permutation(7), (2, 3, 7)), 5, 0.5)
    logits = 0.5 * np.einsum("btnd,bsd->btns", q, kv)
    p = np.exp(logits - logits.max(-1, keepdims=True))
    np.testing.assert_allclose(out, np.einsum("btns,bsd->btnd", p / p.sum(-1, keepdims=True), kv[..., :5]), atol=1e-10)
    np.testing.assert_allclose(lse, np.log(p.sum(-1)) + logits.max(-1))


# ---- the comparison


def compare(tokens, reference, tolerance=0.0, *, topk=None, count=None, **reported):
    """Compares one query whose implementation chose `tokens`."""
    topk = topk or reference.method.topk
    row = np.array(list(tokens) + [-1] * (topk - len(tokens)), np.int32).reshape(1, 1, topk)
    count = np.array([[sum(token != -1 for token in tokens) if count is None else count]], np.int32)
    if "blocks" in reported:
        reported["blocks"] = np.array(reported["blocks"], np.int32).reshape(1, 1, -1)
    oracle.assert_same_selection(row, count, reference, tolerance, **reported)


def refuses(message, tokens, reference, tolerance=0.0, **options):
    with pytest.raises(AssertionError, match=message):
        compare(tokens, reference, tolerance, **options)


def flat_reference():
    # scores 5 7 1 7.5 5.001 5, query at 5 of 8 tokens: visible 6; top-4 is 0 1 3 4 (5, 7, 7.5, 5.001), cut 5.
    return oracle.select(*one_query([5, 7, 1, 7.5, 5.001, 5, 9, 9]), Dsa(4), query_positions=[[5]])


def hisa_reference(third=4.0, fourth=3.0):
    # blocks of 2: (0 .5) (third third+1) (fourth fourth+.5) (1 1) (2 0); m = 3 keeps 0, the best of 1 2 3, and 4.
    k = [0, 0.5, third, third + 1, fourth, fourth + 0.5, 1, 1, 2, 0]
    return oracle.select(*one_query(k), Hisa(4, 2, 3))


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_the_oracle_agrees_with_itself_at_tolerance_zero(method):
    q, k, w = draw(11, 2, 12, 40, 2, 3)
    got = oracle.select(q, k, w, method, lengths=[40, 9])
    blocks = None
    if not isinstance(method, Dsa):
        blocks = np.full((2, 12, 9), -1, np.int32)
        for at in np.ndindex(2, 12):
            blocks[at][: len(got.blocks[at])] = got.blocks[at]
    oracle.assert_same_selection(got.indices, got.count, got, 0.0, scores=got.scores)
    oracle.assert_same_selection(got.indices, got.count, got, 0.0, blocks=blocks)
    oracle.assert_same_selection(got.indices, got.count, got, 1e-3, blocks=blocks)


def test_a_wrong_token_fails_and_the_message_says_which_and_why():
    with pytest.raises(AssertionError) as error:
        compare([0, 1, 2, 3], flat_reference(), 1e-6)
    for part in ("b=0, t=0", "position 5", "6 visible", "count 4", "tolerance 1e-06", "token 2 was chosen"):
        assert part in str(error.value)
    for part in ("chosen 2 has score 1", "left out 4 has 5.001", "cut 5 of 6 candidates"):
        assert part in str(error.value)


def test_a_left_out_token_far_above_the_cut_fails():
    # 5 for 1: token 5 ties with the cut, but token 1 (7) is far above it.
    refuses("token 1 was left out", [0, 3, 4, 5], flat_reference(), 1e-4)


def test_an_exact_tie_must_go_to_the_lower_position_at_tolerance_zero():
    refuses("token 5 was chosen", [1, 3, 4, 5], flat_reference(), 0.0)
    compare([1, 3, 4, 5], flat_reference(), 1e-9)


def test_a_near_tie_may_be_swapped_within_the_tolerance_only():
    # token 4 (5.001) for token 5 (5): 0.001 above the cut; the scale is 7.5.
    compare([0, 1, 3, 5], flat_reference(), 2e-4)
    refuses("token 4 was left out", [0, 1, 3, 5], flat_reference(), 1e-4)


def test_the_tolerance_scales_with_the_scores():
    for factor in (1e-12, 1e12):
        q, k, w = one_query([5, 7, 1, 7.5, 5.001, 5])
        reference = oracle.select(q, k, factor * w, Dsa(4))
        compare([0, 1, 3, 5], reference, 2e-4)
        refuses("token 4 was left out", [0, 1, 3, 5], reference, 1e-4)


def test_scores_that_cancel_are_not_judged_by_digits_they_do_not_have():
    # weights +1 and -1 on equal heads cancel to 0 but for the last bits of a float32 sum: any two tokens will do.
    q, k, w = np.ones((1, 1, 2, 1)), np.arange(1.0, 5).reshape(1, 4, 1), np.array([[[1.0, -1.0 + 1e-9]]])
    reference = oracle.select(q, k, w, Dsa(2))
    assert chosen(reference, 0, 0) == [2, 3]
    compare([0, 1], reference, 1e-5)
    refuses("token 0 was chosen", [0, 1], reference, 0.0)


def test_an_invisible_token_fails():
    refuses("token 6 is not visible", [0, 1, 3, 6], flat_reference(), 10.0)
    refuses("token -2 is not visible", [-2, 0, 1, 3], flat_reference(), 10.0)


def test_a_duplicate_fails():
    refuses("token 3 is given twice", [0, 1, 3, 3], flat_reference(), 10.0)
    refuses("token 3 is given twice", [3, 0, 1, 3], flat_reference(), 10.0)


def test_a_list_that_does_not_ascend_fails():
    refuses("not ascending: token 3 stands after 4", [0, 1, 4, 3], flat_reference(), 10.0)


def test_a_hole_before_the_end_fails():
    refuses("slot 1 holds -1", [0, -1, 1, 3], flat_reference(), 10.0)


def test_a_wrong_count_fails():
    refuses("count is 3, but 4 tokens", [0, 1, 3, 4], flat_reference(), count=3)
    refuses("count is -1", [0, 1, 3, 4], flat_reference(), count=-1)
    refuses("3 tokens were chosen, wanted .* 4", [0, 1, 3], flat_reference(), 10.0)
    empty = oracle.select(*one_query([1, 2]), Dsa(2), query_positions=[[-1]])
    compare([], empty)
    refuses("token 0 is not visible", [0], empty, 10.0)


def test_a_wrong_dtype_or_shape_fails():
    got = flat_reference()
    for indices, count, message in (
        (got.indices.astype(np.int64), got.count, "indices is int64, wanted int32"),
        (got.indices, got.count.astype(np.float32), "count is float32, wanted int32"),
        (got.indices[..., :3], got.count, r"indices is \[1, 1, 3\], wanted \[1, 1, 4\]"),
        (got.indices[0], got.count, r"indices is \[1, 4\]"),
    ):
        with pytest.raises(AssertionError, match=message):
            oracle.assert_same_selection(indices, count, got, 1.0)


def test_a_wrong_score_fails():
    got = flat_reference()
    compare([0, 1, 3, 4], got, 1e-6, scores=got.scores + 1e-6)
    refuses("token 0 was given score 5.1", [0, 1, 3, 4], got, 1e-6, scores=got.scores + 0.1)


def test_a_missing_forced_block_fails():
    # right: blocks 0 1 4, tokens 1 2 3 8. Left out: block 0 for block 2, then block 4 for block 2.
    got = hisa_reference()
    compare([1, 2, 3, 8], got, blocks=[0, 1, 4, -1])
    refuses("block 0 was left out", [2, 3, 5, 8], got, 1e-3, blocks=[1, 2, 4])
    refuses("block 4 was left out", [1, 2, 3, 5], got, 1e-3, blocks=[0, 1, 2])
    sparse = oracle.select(*one_query([0, 0.5, 4, 5, 3, 3.5, 1, 1, 2, 0]), BlockSparse(6, 2))
    compare([0, 1, 2, 3, 8, 9], sparse)
    refuses("block 0 was left out", [2, 3, 4, 5, 8, 9], sparse, 1e-3)
    refuses("block 4 was left out", [0, 1, 2, 3, 4, 5], sparse, 1e-3)


def test_a_missing_forced_block_shows_in_the_tokens_alone():
    # (0 0) (4 5) (4 5) (1 1) (9 9), m = 4: right are blocks 0 1 2 4. Keeping 0 1 2 3 loses tokens 8 and 9.
    got = oracle.select(*one_query([0, 0, 4, 5, 4, 5, 1, 1, 9, 9]), Hisa(4, 2, 4))
    compare([3, 5, 8, 9], got, 1e-3)
    refuses("token 2 was chosen: .* left out [89] has 9", [2, 3, 4, 5], got, 1e-3)
    # m = 3 and a tie of blocks 1 and 2: keeping 0 1 2 takes a block too many beside the forced ones.
    got = oracle.select(*one_query([0, 0, 4, 5, 4, 5, 1, 1, 9, 9]), Hisa(4, 2, 3))
    refuses("4 blocks were kept, wanted 3", [2, 3, 4, 5], got, 1e-3)


def test_a_near_tie_of_blocks_swaps_all_their_tokens():
    # means 4.5 and 4.4999: block 2 for block 1 is right too, and brings tokens 4 and 5 for 2 and 3.
    got = hisa_reference(third=4.0, fourth=4.2499)
    assert chosen(got, 0, 0) == [1, 2, 3, 8]
    compare([1, 4, 5, 8], got, 1e-4)
    compare([1, 4, 5, 8], got, 1e-4, blocks=[0, 2, 4])
    refuses("block 2 .* was kept", [1, 4, 5, 8], got, 1e-6)
    refuses("block 2 .* was kept", [1, 4, 5, 8], got, 0.0, blocks=[0, 2, 4])


def test_blocks_that_tie_cannot_both_be_kept():
    got = hisa_reference(third=4.0, fourth=4.2499)
    refuses("4 blocks were kept, wanted 3", [2, 3, 4, 5], got, 1e-4)
    refuses("4 blocks were kept, wanted 3", [2, 3, 4, 5], got, 1e-4, blocks=[0, 1, 2, 4])
    refuses("2 blocks were kept, wanted 3", [0, 1, 8, 9], got, 1e-4, blocks=[0, 4])


def test_after_a_swap_of_blocks_the_tokens_are_judged_in_the_kept_ones():
    # block 2 kept for block 1: its tokens 4 and 5 must be there; leaving 5 out for token 0 is wrong in any kept set.
    got = hisa_reference(third=4.0, fourth=4.2499)
    refuses("token 0 was chosen", [0, 1, 4, 8], got, 1e-4)
    refuses("its block is not among the kept", [1, 2, 3, 8], got, 1e-4, blocks=[0, 2, 4])


def test_reported_blocks_must_be_a_list_like_the_tokens():
    got = hisa_reference()
    refuses("not ascending: block 1", [1, 2, 3, 8], got, blocks=[0, 4, 1])
    refuses("block 4 is given twice", [1, 2, 3, 8], got, blocks=[0, 4, 4])
    refuses("block 5 is not eligible", [1, 2, 3, 8], got, blocks=[0, 1, 5])
    refuses("slot 1 holds -1", [1, 2, 3, 8], got, blocks=[0, -1, 4])


def test_a_kept_block_may_give_no_token():
    # m = 4 of 6 blocks of 2, topk 2: the best two tokens lie in block 5, so blocks 1 to 4 never show in the tokens.
    k = [0, 0, 3, 3, 2, 2, 1, 1, 2, 2, 9, 9]
    got = oracle.select(*one_query(k), Hisa(2, 2, 4))
    assert chosen(got, 0, 0) == [10, 11]
    compare([10, 11], got)
    compare([10, 11], got, 1e-6, blocks=[0, 1, 4, 5])  # blocks 2 and 4 tie
    refuses("block 4 .* was kept", [10, 11], got, blocks=[0, 1, 4, 5])
    refuses("token 2 was chosen", [2, 10], got, 1e-6)


def test_a_block_far_above_the_block_cut_cannot_make_room_for_near_ties():
    # means 0, 9, 4, 4, 1, m = 4: blocks 0 1 2 4. Keeping both 2 and 3 in place of 1 is wrong whatever the tolerance.
    got = oracle.select(*one_query([0, 0, 9, 9, 4, 4, 4, 4, 1, 1]), Hisa(2, 2, 4))
    assert got.blocks[0, 0].tolist() == [0, 1, 2, 4]
    refuses("block 1 was left out with score 9", [4, 5], got, 1e-3, blocks=[0, 2, 3, 4])
    refuses("5 blocks were kept, wanted 4", [4, 6], got, 1e-3)


def test_the_kept_blocks_are_inferred_among_very_many_ties():
    # 40 blocks tie, any 6 of them may be kept; only those with the least large token explain the choice of 5.
    k = [0, 0, *([4, 0] * 34 + [2, 2] * 6), 5, 5]
    got = oracle.select(*one_query(k), Hisa(2, 2, 8))
    compare([82, 83], got, 1e-6)
    refuses("token 0 was chosen", [0, 83], got, 1e-6)
    got = oracle.select(*one_query([*k[:-2], 3, 3]), Hisa(2, 2, 8))  # now the 4s are better than the last block
    assert chosen(got, 0, 0) == [2, 4]
    compare([82, 83], got, 1e-6)


def test_a_set_of_kept_blocks_that_is_not_the_likeliest_is_found():
    # blocks (3 3 0) (4.9 2.9 2.9) (5 4 4) (3 0 0), m = 3, tokens may lie 1.005 from the cut, blocks 0.87.
    # Three 3s are right if (5 4 4) was kept, cut 4, and wrong if (4.9 2.9 2.9) was: 4.9 is 1.9 above the cut 3.
    got = oracle.select(*one_query([3, 3, 0, 4.9, 2.9, 2.9, 5, 4, 4, 3, 0, 0]), Hisa(3, 3, 3))
    compare([0, 1, 9], got, 0.201)
    compare([0, 1, 9], got, 0.201, blocks=[0, 2, 3])
    refuses("token 3 was left out", [0, 1, 9], got, 0.201, blocks=[0, 1, 3])


def test_tokens_of_score_minus_infinity_tie_too():
    got = oracle.select(*one_query([np.nan, 1, np.nan]), Dsa(2))
    compare([1, 2], got, 1e-6)
    compare([0, 1], got, 0.0, scores=np.array([[[np.nan, 1.0]]]))
    refuses("token 2 was chosen", [1, 2], got, 0.0)
    refuses("token 1 was left out", [0, 2], got, 1e-6)


def test_a_block_sparse_selection_is_whole_blocks():
    got = oracle.select(*one_query([0, 0, 5, 5, 5, 5, 1, 1, 2, 2]), BlockSparse(6, 2))
    compare([0, 1, 4, 5, 8, 9], got, 1e-6)  # blocks 1 and 2 tie
    refuses("block 2 .* was kept", [0, 1, 4, 5, 8, 9], got, 0.0)
    refuses("4 blocks were kept, wanted 3", [0, 1, 3, 4, 8, 9], got, 1e-6)
    refuses("block 3 .* was kept", [0, 1, 6, 7, 8, 9], got, 1e-6)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from(METHODS), st.sampled_from([1e-9, 1e-3, 0.05]))
def test_a_selection_from_slightly_wrong_scores_passes_and_another_token_fails(seed, method, tolerance):
    rng = np.random.default_rng(seed)
    q, k, w = draw(seed, 1, 3, 30, 2, 4)
    got = oracle.select(q, k, w, method)
    # Scores off by less than half the tolerance: what a worse float format does, here on both stages at once.
    for t in range(3):
        size = getattr(method, "block_size", 1)
        tokens = got.token_scores[0, t] + rng.uniform(-0.49, 0.49, 28 + t) * tolerance * got.token_scale[0, t]
        visible = np.arange(28 + t)
        kept = np.zeros(0)
        if not isinstance(method, Dsa):
            n = len(got.block_scores[0, t])
            off = got.block_scores[0, t] + rng.uniform(-0.49, 0.49, n) * tolerance * got.block_scale[0, t]
            off[: method.keep_first] = off[n - method.keep_last :] = np.inf
            kept = np.argsort(-off, kind="stable")[: len(got.blocks[0, t])]
            visible = visible[np.isin(visible // size, kept)]
        mine = np.sort(visible[np.argsort(-tokens[visible], kind="stable")][: method.topk])
        one = row_of(got, t)
        compare(mine.tolist(), one, tolerance)
        if not isinstance(method, Dsa):
            compare(mine.tolist(), one, tolerance, blocks=np.sort(kept))
        # The worst visible token for the best chosen one is never right, unless hardly anything separates them.
        scores = got.token_scores[0, t]
        worst, best = np.argmin(scores), mine[np.argmax(scores[mine])]
        if worst not in mine and scores[best] - scores[worst] > 2.1 * tolerance * got.token_scale[0, t]:
            swapped = sorted({*mine.tolist(), int(worst)} - {int(best)})
            with pytest.raises(AssertionError):
                compare(swapped, one, tolerance)


def row_of(selection, t):
    fields = {f.name: getattr(selection, f.name) for f in dataclasses.fields(selection) if f.name != "method"}
    return dataclasses.replace(selection, **{name: value[:1, t : t + 1] for name, value in fields.items()})


def test_a_packed_selection_is_compared_request_by_request():
    q, k, w = draw(12, 1, 5, 20, 1, 3)
    got = oracle.select_packed(q[0], k[0], w[0], [0, 2, 5], [0, 8, 20], Hisa(4, 2, 3))
    oracle.assert_same_selection(got.indices, got.count, got, 0.0)
    broken = got.indices.copy()
    broken[3, 3] = 19
    with pytest.raises(AssertionError, match=r"query \(t=3\): position 10, 11 visible[^\0]*token 19 is not visible"):
        oracle.assert_same_selection(broken, got.count, got, 1.0)


def test_a_negative_tolerance_is_refused():
    with pytest.raises(ValueError, match="tolerance=-1"):
        compare([0, 1, 3, 4], flat_reference(), -1)
