"""The oracle's scores and block means."""

import numpy as np

from tests import oracle
from tests.oracle.cases import draw


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
