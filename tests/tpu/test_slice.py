"""On the devices of a real slice: what a mesh of all of them computes is what one of them computes.

On several hosts run it on all of them at once. `tests/tpu/slices.py` has the checks, which emulated devices run, too.
"""

import os
import subprocess
import sys

import jax
import pytest

from tests.tpu import slices

pytestmark = pytest.mark.slow


@pytest.mark.tpu
@pytest.mark.parametrize("name", slices.CHECKS)
def test_a_slice(name):
    if jax.device_count() < 4:
        pytest.skip(f"needs a slice of at least 4 devices, there are {jax.device_count()}")
    slices.CHECKS[name]()


@pytest.mark.exhaustive
def test_emulated_devices_pass_the_checks_of_a_slice():
    command = [sys.executable, "-m", "tests.tpu.slices"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=900, env=os.environ | {"JAX_PLATFORMS": "cpu"}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("passed") == len(slices.CHECKS)
