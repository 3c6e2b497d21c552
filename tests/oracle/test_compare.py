"""The comparison fails on every kind of broken list of tokens, and on nothing else."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hisa_jax.testing.oracle.methods import block_size_of, has_blocks, is_scan
from hisa_jax.testing.oracle.scan import slack
from tests import oracle
from tests.oracle.cases import METHODS, Dsa, Hisa, chosen, draw, one_query
from tests.oracle.comparing import compare, flat_reference, refuses


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_the_oracle_agrees_with_itself_at_tolerance_zero(method):
    q, k, w = draw(11, 2, 12, 40, 2, 3)
    got = oracle.select(q, k, w, method, lengths=[40, 9])
    blocks = None
    if not isinstance(method, Dsa):
        blocks = np.full((2, 12, 12), -1, np.int32)
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
    for part in ("chosen 2 has score 1", "left out 4 has 5.001", "threshold 5 of 6 candidates"):
        assert part in str(error.value)


def test_a_left_out_token_far_above_the_cut_fails():
    # 5 for 1: token 5 ties with the threshold, but token 1 (7) is far above it.
    refuses("token 1 was left out", [0, 3, 4, 5], flat_reference(), 1e-4)


def test_an_exact_tie_must_go_to_the_lower_position_at_tolerance_zero():
    refuses("token 5 was chosen", [1, 3, 4, 5], flat_reference(), 0.0)
    compare([1, 3, 4, 5], flat_reference(), 1e-9)


def test_a_near_tie_may_be_swapped_within_the_tolerance_only():
    # token 4 (5.001) for token 5 (5): 0.001 above the threshold; the scale is 7.5.
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


def test_tokens_of_score_minus_infinity_tie_too():
    got = oracle.select(*one_query([np.nan, 1, np.nan]), Dsa(2))
    compare([1, 2], got, 1e-6)
    compare([0, 1], got, 0.0, scores=np.array([[[np.nan, 1.0]]]))
    refuses("token 2 was chosen", [1, 2], got, 0.0)
    refuses("token 1 was left out", [0, 2], got, 1e-6)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from(METHODS), st.sampled_from([1e-9, 1e-3, 0.05]))
def test_a_selection_from_slightly_wrong_scores_passes_and_another_token_fails(seed, method, tolerance):
    rng = np.random.default_rng(seed)
    q, k, w = draw(seed, 1, 3, 30, 2, 4)
    got = oracle.select(q, k, w, method)
    # Scores off by less than half the tolerance: what a worse float format does, here on both stages at once.
    for t in range(3):
        size = block_size_of(method) if has_blocks(method) else 1
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
        if is_scan(method) and slack(got.scanned[0, t], tolerance, got.token_scale[0, t]):
            continue  # other slopes could make anything a candidate
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
