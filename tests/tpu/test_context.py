"""Keys sharded over devices, by the kernels: tests/tpu/context_parallel.py on emulated ones."""

import pytest

from tests import emulated


@pytest.mark.exhaustive  # test_pods.py compiles it, tests/test_context.py has the promises by XLA
@pytest.mark.slow
def test_a_selection_over_two_devices_keeps_the_contract():
    emulated.assert_kept("tests.tpu.context_parallel", n=2)
