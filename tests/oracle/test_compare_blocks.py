"""The comparison of selections by blocks: kept blocks are reported, or inferred from the tokens."""

import dataclasses

import numpy as np
import pytest

from tests import oracle
from tests.oracle.cases import SCANS, BlockSparse, Hisa, Scan, chosen, draw, one_query
from tests.oracle.comparing import compare, hisa_reference, refuses


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
    # blocks (3 3 0) (4.9 2.9 2.9) (5 4 4) (3 0 0), m = 3, tokens may lie 1.005 from the threshold, blocks 0.87.
    # Three 3s are right if (5 4 4) was kept, cut 4, and wrong if (4.9 2.9 2.9) was: 4.9 is 1.9 above the threshold 3.
    got = oracle.select(*one_query([3, 3, 0, 4.9, 2.9, 2.9, 5, 4, 4, 3, 0, 0]), Hisa(3, 3, 3))
    compare([0, 1, 9], got, 0.201)
    compare([0, 1, 9], got, 0.201, blocks=[0, 2, 3])
    refuses("token 3 was left out", [0, 1, 9], got, 0.201, blocks=[0, 1, 3])


def test_a_block_sparse_selection_is_whole_blocks():
    got = oracle.select(*one_query([0, 0, 5, 5, 5, 5, 1, 1, 2, 2]), BlockSparse(6, 2))
    compare([0, 1, 4, 5, 8, 9], got, 1e-6)  # blocks 1 and 2 tie
    refuses("block 2 .* was kept", [0, 1, 4, 5, 8, 9], got, 0.0)
    refuses("4 blocks were kept, wanted 3", [0, 1, 3, 4, 8, 9], got, 1e-6)
    refuses("block 3 .* was kept", [0, 1, 6, 7, 8, 9], got, 1e-6)


def scan_reference(scan, exact, topk=2):
    """A scan of 4 candidates: the scores of tokens by the virtual head and, at least as high, by the heads."""
    scan, exact = np.array(scan, float), np.array(exact, float)
    q, w, k = np.eye(2).reshape(1, 1, 2, 2), np.ones((1, 1, 2)), np.stack([exact, scan - exact], axis=1)[None]
    return oracle.select(q, k, w, Scan(topk, 4, slopes="plain", keep_first=0))


def test_a_scan_that_may_keep_more_chooses_the_best_of_any_set_that_holds_the_kept():
    more = dict(may_keep_more=True)
    got = scan_reference([0, 0, -2, 3, 4, 5, 1, 1, 1, 0], [9, 8, 2, 3, 4, 5, 1, 1, 1, 0])
    assert got.blocks[0, 0].tolist() == [3, 4, 5, 9] and chosen(got, 0, 0) == [4, 5]
    compare([4, 5], got, **more)
    compare([0, 1], got, **more)  # both were kept, too
    compare([0, 5], got, **more)
    refuses("block 0 .* was kept|blocks were kept", [0, 1], got)
    refuses("token 4 was chosen", [0, 4], got, **more)
    refuses("token 3 was chosen", [3, 5], got, **more)
    refuses("token 2 was chosen", [2, 5], got, 1e-3, **more)
    refuses("1 tokens were chosen", [5], got, **more)


def test_a_scan_that_may_keep_more_breaks_exact_ties_as_any_other():
    got = scan_reference([3, 3, 3, 0, 0], [5, 5, 5, 5, 0])
    assert got.blocks[0, 0].tolist() == [0, 1, 2, 4]
    compare([0, 1], got, may_keep_more=True)
    refuses("token 2 was chosen", [0, 2], got, may_keep_more=True)
    refuses("token 3 was chosen", [0, 3], got, may_keep_more=True)
    compare([0, 3], got, 1e-6, may_keep_more=True)


def test_of_units_near_the_cut_no_more_are_left_out_than_there_are_too_many():
    # Three of tokens 0 to 4, which tie in the scan, are kept beside the last one: two may be missing.
    more = dict(may_keep_more=True)
    got = scan_reference([3, 3, 3, 3, 3, 0], [3, 4, 5, 6, 7, 0])
    compare([1, 2], got, 1e-6, **more)
    compare([2, 4], got, 1e-6, **more)
    compare([3, 4], got, 1e-6, **more)
    refuses("blocks .2 3 4. near the block threshold .* at most 2", [0, 1], got, 1e-6, **more)


@pytest.mark.parametrize("candidates", [12, 16, 32])
def test_a_scan_of_more_candidates_is_one_that_keeps_more(candidates):
    arrays = draw(11, 2, 12, 40, 2, 3)
    for method in SCANS:
        fewer = oracle.select(*arrays, method)
        got = oracle.select(*arrays, dataclasses.replace(method, candidates=candidates))
        for tolerance in (0.0, 1e-3):
            oracle.assert_same_selection(got.indices, got.count, fewer, tolerance, may_keep_more=True)
