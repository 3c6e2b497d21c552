"""Interpret mode that finds races, missing waits and what was never written; compile tests where libtpu is."""

import jax
import pytest
from jax.experimental.pallas import tpu as pltpu

from bench import tpu_aot
from bench.chips import CHIPS


@pytest.fixture
def interpret():
    return pltpu.InterpretParams(detect_races=True, dma_execution_mode="on_wait", uninitialized_memory="nan")


@pytest.fixture(params=CHIPS)
def chip(request):
    """Each chip that kernels are compiled for."""
    reason = tpu_aot.why_not()
    if reason:
        pytest.skip(reason)
    return request.param


def pytest_collection_modifyitems(items):
    if jax.default_backend() == "tpu":
        return
    for item in items:
        if item.get_closest_marker("tpu"):
            item.add_marker(pytest.mark.skip(reason=f"needs a TPU, this machine has {jax.default_backend()}"))
