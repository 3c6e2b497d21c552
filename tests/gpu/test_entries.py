"""What indexers differ in, by the Triton kernels, interpreted."""

import pytest

from tests import kernel_entries

CASES = {}
for some in (kernel_entries.entries, kernel_entries.heads, kernel_entries.best_tokens, kernel_entries.limits):
    CASES |= some(32)


@pytest.mark.gate("four_heads_over_pools", "each_head_by_its_best_token")
@pytest.mark.parametrize("case", CASES)
def test_kernels_take_what_indexers_differ_in(case, monkeypatch):
    kernel_entries.check(monkeypatch, "triton", 32, CASES[case], True)
