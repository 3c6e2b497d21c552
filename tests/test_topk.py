"""The exact top-k: order-preserving sort key, k-th value, compaction in order."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from hisa_jax.xla import topk

INT_MIN, INT_MAX = np.iinfo(np.int32).min, np.iinfo(np.int32).max
ALL_FLOATS = hnp.arrays(np.float32, (2, 40), elements=st.floats(width=32, allow_nan=False, allow_subnormal=False))


@given(ALL_FLOATS)
def test_the_sort_key_orders_as_the_scores_and_can_be_inverted(scores):
    sort_key = np.asarray(topk.sort_key_of(jnp.asarray(scores)))
    for compare in (np.less, np.equal):
        wanted = compare(scores[0][:, None], scores[0][None, :])
        np.testing.assert_array_equal(compare(sort_key[0][:, None], sort_key[0][None, :]), wanted)
    np.testing.assert_array_equal(topk.score_of(jnp.asarray(sort_key)), scores)
    assert (sort_key > topk.INVISIBLE).all() and (sort_key < topk.FORCED).all()


def test_nan_has_the_sort_key_of_minus_infinity_and_zero_has_one():
    sort_key = topk.sort_key_of(jnp.array([[np.nan, -np.nan, -np.inf, 0.0, -0.0]]))
    assert sort_key[0, 0] == sort_key[0, 1] == sort_key[0, 2] < sort_key[0, 3] == sort_key[0, 4]


@given(
    st.sampled_from([1, 2, 20, 39, 40]),
    hnp.arrays(np.int32, (3, 40), elements=st.integers(-3, 3) | st.sampled_from([INT_MIN, INT_MAX])),
)
def test_the_k_best_are_chosen_in_order_with_ties_to_the_left(k, sort_key):
    positions = np.broadcast_to(np.arange(40, dtype=np.int32) * 2, (3, 40))
    got_sort_key, got_positions = jax.jit(topk.topk_in_order, static_argnums=2)(sort_key, positions, k)
    for row in range(3):
        best = np.argsort(-sort_key[row].astype(np.int64), kind="stable")[:k]
        best = np.sort(best[sort_key[row, best] > INT_MIN])
        np.testing.assert_array_equal(got_positions[row], [*(2 * best), *[-1] * (k - len(best))])
        np.testing.assert_array_equal(got_sort_key[row], [*sort_key[row, best], *[INT_MIN] * (k - len(best))])


@given(
    st.lists(st.sampled_from([0, 1, 2, 20, 39, 40]), min_size=3, max_size=3),
    hnp.arrays(np.int32, (3, 40), elements=st.integers(-3, 3) | st.sampled_from([INT_MIN, INT_MAX])),
)
def test_every_row_may_choose_as_many_as_it_wants(k, sort_key):
    got = np.asarray(jax.jit(topk.chosen_mask)(sort_key, np.array(k, np.int32)))
    for row in range(3):
        best = np.argsort(-sort_key[row].astype(np.int64), kind="stable")[: k[row]]
        assert np.flatnonzero(got[row]).tolist() == sorted(best[sort_key[row, best] > INT_MIN])


@given(
    st.sampled_from([1, 2, 20, 39, 40]),
    hnp.arrays(np.int32, (3, 40), elements=st.integers(-3, 3) | st.sampled_from([INT_MIN, INT_MAX])),
    st.permutations(range(40)),
)
def test_the_k_best_are_the_same_in_whatever_order_candidates_stand(k, sort_key, order):
    positions = np.broadcast_to(np.arange(40, dtype=np.int32) * 2, (3, 40))
    wanted = jax.jit(topk.topk_in_order, static_argnums=2)(sort_key, positions, k)
    positions = np.where(sort_key > INT_MIN, positions, -1)  # what is invisible has no position
    got = jax.jit(topk.topk_of_any_order, static_argnums=2)(sort_key[:, order], positions[:, order], k)
    jax.tree.map(np.testing.assert_array_equal, got, wanted)


@pytest.mark.parametrize("S", [1, 31, 32, 33, 64, 100])
def test_compaction_finds_every_set_bit(S):
    rng = np.random.default_rng(S)
    for share in (0.0, 0.1, 0.5, 1.0):
        mask = rng.random((4, S)) < share
        columns, filled = map(np.asarray, jax.jit(lambda mask: topk.columns_of(topk.words_of(mask), 20))(mask))
        for row in range(4):
            wanted = np.flatnonzero(mask[row])[:20]
            np.testing.assert_array_equal(columns[row], [*wanted, *[0] * (20 - len(wanted))])
            assert filled[row].tolist() == [True] * len(wanted) + [False] * (20 - len(wanted))


def test_all_patterns_of_eight_candidates():
    # Every subset of visible candidates, equal scores: the first k visible.
    patterns = (np.arange(256)[:, None] >> np.arange(8)) & 1 == 1
    sort_key = np.where(patterns, 7, INT_MIN).astype(np.int32)
    places = np.broadcast_to(np.arange(8, dtype=np.int32), (256, 8))
    _, positions = jax.jit(topk.topk_in_order, static_argnums=2)(sort_key, places, 3)
    positions = np.asarray(positions)
    for row in range(256):
        wanted = np.flatnonzero(patterns[row])[:3]
        assert positions[row].tolist() == [*wanted, *[-1] * (3 - len(wanted))]
