"""Keys sharded over devices, by the kernels: tests/tpu/context_parallel.py on emulated ones."""

import os
import subprocess
import sys

import pytest


@pytest.mark.exhaustive  # test_pods.py compiles it, tests/test_context.py has the promises by XLA
@pytest.mark.slow
def test_a_selection_over_two_devices_keeps_the_contract():
    command = [sys.executable, "-W", "error", "-m", "tests.tpu.context_parallel"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=900, env=os.environ | {"JAX_PLATFORMS": "cpu"}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("kept:") == 2
