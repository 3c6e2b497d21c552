"""One query's tokens held against a reference, for the tests of the comparison."""

import numpy as np
import pytest

from tests import oracle
from tests.oracle.cases import Dsa, Hisa, one_query


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
