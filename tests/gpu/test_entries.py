"""Keys that are entries, by the Triton kernels, interpreted."""

import pytest

from tests import kernel_entries


@pytest.mark.exhaustive
@pytest.mark.parametrize("method", kernel_entries.methods(32))
def test_kernels_take_entries(method, monkeypatch):
    kernel_entries.check(monkeypatch, "triton", 32, method, True)
