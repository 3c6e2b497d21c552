"""The scan of few queries keeps the contract: the tests of test_scan.py, with all sort keys of each query written."""

import pytest

from hisa_jax.kernels_pallas import scan
from tests.gpu import test_scan
from tests.gpu.test_scan import (  # noqa: F401
    select,
    test_a_batch_of_any_lengths,
    test_a_packed_batch_some_queries_at_a_time,
    test_any_input_may_hold_nan_or_infinity,
    test_keys_in_pages,
    test_methods,
    test_numbers_that_are_no_e4m3,
    test_of_tokens_that_tie_the_first_are_scored,
    test_sketches_in_pages,
    test_the_first_and_the_last_token_are_scored_whatever_the_scan_makes_of_them,
    test_what_a_query_does_not_see_changes_nothing,
    test_where_samples_mislead_other_thresholds_are_tried,
)

pytestmark = [*test_scan.pytestmark, pytest.mark.exhaustive]


@pytest.fixture(autouse=True)
def short_lists(monkeypatch):
    """128 tokens, and every fourth key is sampled."""
    monkeypatch.setattr(scan, "_LISTED", 128)
    monkeypatch.setattr(scan, "_RANK", 16)
