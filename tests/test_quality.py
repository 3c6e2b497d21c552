"""Recall, IoU and captured score mass, by hand and against sets."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import hisa_jax as hj


def selection(*rows, scores=None):
    """A Selection of [1, T] from lists of positions."""
    topk = max(map(len, rows))
    indices = np.full((1, len(rows), topk), -1, np.int32)
    for row, positions in enumerate(rows):
        indices[0, row, : len(positions)] = positions
    count = np.array([[len(row) for row in rows]], np.int32)
    return hj.Selection(indices=jnp.asarray(indices), count=jnp.asarray(count), scores=scores)


def test_a_case_worked_by_hand():
    # Reference 1 5 8 with scores 4, -2, 1; selected 1 3 8: both 1 8, either 1 3 5 8; relu mass 5 of 5.
    reference = selection([1, 5, 8], scores=jnp.array([[[4.0, -2.0, 1.0]]]))
    got = hj.compare(selection([1, 3, 8]), reference)
    assert got.recall.tolist() == [[pytest.approx(2 / 3)]]
    assert got.iou.tolist() == [[0.5]]
    assert got.mass is not None and got.mass.tolist() == [[1.0]]
    # Selected 5 8: only the 1 of 5 is captured.
    assert hj.compare(selection([5, 8]), reference).mass.tolist() == [[pytest.approx(0.2)]]


@given(
    st.lists(
        st.tuples(st.sets(st.integers(0, 30), max_size=8), st.sets(st.integers(0, 30), max_size=8)),
        min_size=3,
        max_size=3,
    )
)
def test_measures_are_those_of_sets(pairs):
    got, wanted = (selection(*(sorted(pair[i]) for pair in pairs), range(8)) for i in (0, 1))
    compared = hj.compare(got, wanted)
    for t, (a, b) in enumerate(pairs):
        assert compared.recall[0, t] == pytest.approx(len(a & b) / len(b) if b else 1)
        assert compared.iou[0, t] == pytest.approx(len(a & b) / len(a | b) if a | b else 1)
        assert bool(compared.is_real[0, t]) == bool(b)


def test_the_summary_leaves_padding_out():
    compared = hj.compare(selection([1, 2], [], [3, 4]), selection([1, 2], [], [5, 6]))
    summary = compared.summary()
    assert summary["queries"] == 2 and summary["recall"] == 0.5 and summary["recall_min"] == 0
    assert "mass" not in summary


def test_nothing_to_compare_has_no_mean():
    empty = hj.Selection(indices=jnp.full((1, 2, 4), -1), count=jnp.zeros((1, 2), jnp.int32))
    summary = hj.compare(empty, empty).summary()
    assert summary["queries"] == 0 and np.isnan(summary["recall"]) and np.isnan(summary["iou_p5"])


def test_without_positive_scores_nothing_is_missed():
    reference = selection([1, 5], scores=jnp.array([[[-4.0, -2.0]]]))
    assert hj.compare(selection([3]), reference).mass.tolist() == [[1.0]]


def test_compare_works_under_jit_and_for_other_topk():
    a, b = selection([1, 2, 3], [4]), selection([2, 3], [4])
    compared = jax.jit(hj.compare)(a, b)
    assert compared.recall.tolist() == [[1, 1]] and compared.iou.tolist() == [[pytest.approx(2 / 3), 1]]
