"""The models' tests compile many programs and run most of them once: compile fast, run slowly."""

import jax
import pytest


@pytest.fixture(autouse=True, scope="module")
def fast_compilation():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
