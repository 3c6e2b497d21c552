"""The scan of the oracle, by hand."""

import ml_dtypes
import numpy as np
import pytest

from hisa_jax.testing.oracle.scan import slopes_of, step_of
from tests import oracle
from tests.oracle.cases import Dsa, Scan, chosen, draw


@pytest.mark.parametrize(
    ("visible", "step"), [(0, 1), (1, 1), (256, 1), (257, 2), (512, 2), (513, 4), (131072, 512), (131073, 1024)]
)
def test_the_step_is_the_least_power_of_two_that_leaves_at_most_256(visible, step):
    assert step_of(visible) == step
    assert step == 2 ** np.ceil(np.log2(max(visible, 256) / 256))


def test_slopes_are_shares_of_open_heads_among_the_32_best_samples():
    # 36 samples of falling score: the last four count for nothing. Head 0 is open at every second, head 1 nowhere else.
    products = np.array([[1.0, -1.0] * 18, [-1.0] * 32 + [1.0] * 4])
    assert slopes_of(products, -np.arange(36.0)).tolist() == [0.5, 0.0]
    assert slopes_of(products, np.zeros(36)).tolist() == [0.5, 0.0]  # a tie goes to the lower position
    assert slopes_of(products[:, :3], np.zeros(3)).tolist() == [2 / 3, 0.0]  # fewer samples than 32


def test_candidates_are_the_best_by_the_virtual_head():
    # One head of weight 1, always open: the scan scores are the exact ones, and half of the candidates lose.
    q, k, w = np.ones((1, 1, 1, 1)), np.arange(1.0, 11).reshape(1, 10, 1)[:, ::-1], np.ones((1, 1, 1))
    got = oracle.select(q, k, w, Scan(topk=2, candidates=4))
    assert got.blocks[0, 0].tolist() == [0, 1, 2, 9]  # token 9, the last, is always one
    assert chosen(got, 0, 0) == [0, 1]
    units = oracle.select(q, k, w, Scan(topk=2, candidates=4, unit=2, keep_first=0))
    assert units.blocks[0, 0].tolist() == [0, 4]


def test_a_head_that_is_open_nowhere_near_the_best_counts_for_nothing():
    # Head 1 points the other way, with weight 3: at the best tokens by exact score, those of k = -1, it alone is open.
    q = np.array([[[[1.0], [-1.0]]]])
    k = np.array([1.0] * 40 + [-1.0] * 40).reshape(1, 80, 1)
    w = np.array([[[1.0, 3.0]]])
    got = oracle.select(q, k, w, Scan(topk=8, candidates=16, keep_first=0))
    assert got.blocks[0, 0].tolist() == [*range(40, 55), 79]  # v = 3 * -1: the second half scores 3


def test_the_heads_of_greatest_weight_times_query_are_exact():
    # Head 1 is 2 * 3 = 6 in size, head 0 is 5: it keeps its relu, and the first half, where it is closed, scores 0.
    q, w = np.array([[[[5.0], [3.0]]]]), np.array([[[-1.0, 2.0]]])
    k = np.array([-2.0] * 20 + [1.0] * 20).reshape(1, 40, 1)
    got = oracle.select(q, k, w, Scan(topk=4, candidates=8, exact_heads=1, slopes="plain", keep_first=0))
    assert got.blocks[0, 0].tolist() == [*range(7), 39]  # head 0 in the virtual head: -5 * -2 = 10 in the first half


def test_the_virtual_head_is_rounded_unless_keys_are_float32():
    # v = (1 + 2**-9, 1) is rounded to (1, 1): the second token then ties with the first.
    q, w = np.array([[[[1 + 2**-9, 1.0]]]]), np.ones((1, 1, 1))
    k = np.array([[[0.0, 1.0], [1.0, 0.0], [0.0, 0.0]]])
    method = Scan(topk=2, candidates=2, keep_first=0)
    for dtype, best in ((np.float32, 1), (ml_dtypes.bfloat16, 0), (ml_dtypes.float8_e4m3fn, 0)):
        assert oracle.select(q, k.astype(dtype), w, method).blocks[0, 0].tolist() == [best, 2]


def test_where_all_are_candidates_it_is_the_flat_indexer():
    q, k, w = draw(3, 2, 5, 40, 3, 4)
    flat, scan = (oracle.select(q, k, w, method) for method in (Dsa(6), Scan(6, 40)))
    np.testing.assert_array_equal(flat.indices, scan.indices)
