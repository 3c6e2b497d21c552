"""What indexers differ in, by the TPU kernels, interpreted."""

import pytest
from jax.experimental.pallas import tpu as pltpu

from tests import kernel_entries

CASES = kernel_entries.entries(64) | kernel_entries.heads(64)
CASES |= {name: case for name, case in kernel_entries.limits(64).items() if case.listed in (0, 64)}
CASES |= {name: case for name, case in kernel_entries.best_tokens(64).items() if "odd" not in name}  # of 12 tokens


@pytest.mark.exhaustive
@pytest.mark.parametrize("case", CASES)
def test_kernels_take_what_indexers_differ_in(case, monkeypatch):
    how = pltpu.InterpretParams(dma_execution_mode="on_wait", uninitialized_memory="nan")
    kernel_entries.check(monkeypatch, "mosaic_tpu", 64, CASES[case], how)
