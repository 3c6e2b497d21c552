"""Keys that are entries, by the TPU kernels, interpreted."""

import pytest
from jax.experimental.pallas import tpu as pltpu

from tests import kernel_entries


@pytest.mark.exhaustive
@pytest.mark.parametrize("method", kernel_entries.methods(64))
def test_kernels_take_entries(method, monkeypatch):
    how = pltpu.InterpretParams(dma_execution_mode="on_wait", uninitialized_memory="nan")
    kernel_entries.check(monkeypatch, "mosaic_tpu", 64, method, how)
