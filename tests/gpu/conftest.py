"""Setup for the kernel tests."""

import os
import pathlib

import pytest
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call  # what was found has no public name
from jax.experimental.pallas import mosaic_gpu as plgpu

from tests.gpu.gpus import take_one

# GPU interpret mode blocks a thread of XLA's CPU pool for every warp-group that waits: fewer threads than
# warp-groups, as on a machine of two cores, and it stands still. Read when the CPU backend starts.
os.environ.setdefault("NPROC", "32")
take_one(os.environ)  # before JAX looks for GPUs


@pytest.fixture
def interpret():
    """Interpret parameters; no race may have been found by the end."""
    interpret_pallas_call.reset_gpu_interpret_mode_state()
    yield plgpu.InterpretGPUParams(detect_races=True)
    assert not interpret_pallas_call.get_races().races_found


def pytest_collection_modifyitems(items):
    """To compile the interpreter's programs takes longer than to run them."""
    for item in items:
        if pathlib.Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.unoptimised)
