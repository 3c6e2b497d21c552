"""Strict JAX for the tests of the library, and GPU tests skipped where there is no GPU."""

import pathlib

import hypothesis
import jax
import pytest

# Examples are drawn the same way in every run, and a first call that compiles is no failure.
hypothesis.settings.register_profile("fixed", derandomize=True, deadline=None, print_blob=True)
hypothesis.settings.load_profile("fixed")


@pytest.fixture(autouse=True)
def strict_jax(request):
    """Dtypes and ranks must be promoted by hand in the library; what the models are built on is not that strict."""
    if pathlib.Path(request.path).parent != pathlib.Path(__file__).parent:
        yield
        return
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


def pytest_collection_modifyitems(items):
    if jax.default_backend() == "gpu":
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=f"needs an NVIDIA GPU, this machine has {jax.default_backend()}"))


@pytest.fixture(autouse=True, scope="module")
def forget_compiled_programs():
    """Each compiled program holds memory maps, and Linux allows a process only so many: forget a module's."""
    yield
    jax.clear_caches()
