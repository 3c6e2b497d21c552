"""On the devices of a real slice: what a mesh of all of them computes is what one of them computes.

On several hosts run it on all of them at once. `tests/tpu/slices.py` has the checks, which emulated devices run, too.
"""

import jax
import pytest

from tests.tpu import slices

pytestmark = [pytest.mark.tpu, pytest.mark.slow]


@pytest.fixture(scope="module", autouse=True)
def several_devices():
    if jax.default_backend() == "tpu" and jax.device_count() < 4:
        pytest.skip(f"needs a slice of at least 4 devices, there are {jax.device_count()}")


@pytest.mark.parametrize("name", slices.CHECKS)
def test_a_slice(name):
    slices.CHECKS[name]()
