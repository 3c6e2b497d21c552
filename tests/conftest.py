"""Strict JAX for the tests of the library, GPU tests skipped where there is no GPU, and `--each-value`."""

import collections
import itertools
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


def pytest_addoption(parser):
    parser.addoption(
        "--each-value", action="store_true", help="of a test's cases, those that bring a new parameter value"
    )


@pytest.hookimpl(trylast=True)  # after `-m` has chosen
def pytest_collection_modifyitems(config, items):
    for item in items:
        if item.get_closest_marker("gpu") and jax.default_backend() != "gpu":
            item.add_marker(pytest.mark.skip(reason=f"needs an NVIDIA GPU, this machine has {jax.default_backend()}"))
    if config.getoption("--each-value"):
        few, others = _each_value(items)
        config.hook.pytest_deselected(items=others)
        items[:] = few


@pytest.fixture(autouse=True, scope="module")
def forget_compiled_programs():
    """Each compiled program holds memory maps, and Linux allows a process only so many: forget a module's."""
    yield
    jax.clear_caches()


_FINISHED = itertools.count(1)


@pytest.fixture(autouse=True)
def forget_compiled_programs_of_a_large_module():
    """The contract alone is more than Linux allows: a process that reaches its limit dies by a segmentation fault."""
    yield
    if next(_FINISHED) % 150 == 0:
        jax.clear_caches()


def _each_value(items):
    """Cases that bring a value which no case of the same test before had, and the others.

    Cases that `-m` leaves out or that this machine skips count for nothing.
    """
    few, others, seen = [], [], collections.defaultdict(set)
    for item in items:
        if item.get_closest_marker("skip"):
            few.append(item)
            continue
        params = item.callspec.params if hasattr(item, "callspec") else {}
        values = {(name, repr(value)) for name, value in params.items()}
        known = seen[item.path, getattr(item, "originalname", item.name), item.cls]
        (others if values and values <= known else few).append(item)
        known |= values
    return few, others
