"""The oracle's attention to listed blocks, worked by hand."""

import math

import numpy as np

from tests import oracle


def test_two_groups_with_blocks_of_two_by_hand():
    # Four heads in two groups, D = V = 1, q = scale = 1, so a key is its logit. Group 0 has ln 1, ln 3, ln 4; group 1
    # zeros. Values are 4, 8, 1 and 1, 2, 3. The query is at token 2 of 4, so of block 1 token 2 alone counts.
    k = np.array([[[0, 0], [math.log(3), 0], [math.log(4), 0], [99, 99]]])[..., None]
    v = np.array([[[4, 1], [8, 2], [1, 3], [np.nan, np.nan]]])[..., None]
    q, at = np.ones((1, 1, 4, 1)), [[2]]
    out, lse = oracle.sparse_attention(q, k, v, [[[[1, -1, 0], [0, 2, -5]]]], 1.0, 2, at)
    # Group 0: (4 + 3 * 8 + 4 * 1) / 8 = 4, of sum 8; group 1: block 0 alone, (1 + 2) / 2, of sum 2.
    np.testing.assert_allclose(out[0, 0, :, 0], [4, 4, 1.5, 1.5])
    np.testing.assert_allclose(lse[0, 0], np.log([8, 8, 2, 2]))
    # One list for all; a sink as heavy as all of it; a block listed twice has two shares.
    out, lse = oracle.sparse_attention(q, k, v, [[[0, 1, 1]]], 1.0, 2, at, np.log([12.0, 12, 4, 1e-300]))
    np.testing.assert_allclose(out[0, 0, :, 0], [36 / 24, 36 / 24, 9 / 8, 9 / 4])
    np.testing.assert_allclose(lse[0, 0], np.log([12, 12, 4, 4]))


def test_tokens_without_positions_and_a_list_of_nothing():
    q, k = np.ones((1, 2, 1, 1)), np.zeros((1, 3, 1, 1))
    v = np.arange(3.0).reshape(1, 3, 1, 1)
    out, lse = oracle.sparse_attention(q, k, v, [[[2, 1, 3], [-1, 3, -7]]], 1.0)
    np.testing.assert_allclose(out[0, :, 0, 0], [1.5, 0])
    np.testing.assert_allclose(lse[0, :, 0], [math.log(2), -math.inf])
