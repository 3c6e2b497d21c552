"""What indexers differ in, by the kernels: on a GPU, and Triton's interpreted without one."""

import pytest

import hisa_jax as hj
from tests import kernel_entries

pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")
CASES = {}
for some in (kernel_entries.entries, kernel_entries.heads, kernel_entries.best_tokens, kernel_entries.limits):
    CASES |= some(32)


@pytest.mark.exhaustive
@pytest.mark.parametrize("case", CASES)
def test_kernels_take_what_indexers_differ_in(case, monkeypatch):
    kernel_entries.check(monkeypatch, "triton", 32, CASES[case], True)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["mosaic_gpu", "triton"])
@pytest.mark.parametrize("case", CASES)
def test_kernels_on_a_gpu_take_what_indexers_differ_in(name, case, monkeypatch):
    if reason := hj.implementations()[name]:
        pytest.skip(reason)
    kernel_entries.check(monkeypatch, name, 32, CASES[case], False)
