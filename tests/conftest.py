"""Strict JAX for the tests of the library, what the marks of pyproject.toml do, and `--each-value`."""

import collections
import gc
import itertools
import pathlib
import re

import hypothesis
import jax
import pytest

# Examples are drawn the same way in every run, and a first call that compiles is no failure.
hypothesis.settings.register_profile("fixed", derandomize=True, deadline=None, print_blob=True)
hypothesis.settings.load_profile("fixed")


def pytest_collection_finish():
    """Modules and tests stay to the end: nothing of them is looked at again."""
    gc.collect()
    gc.freeze()


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


@pytest.hookimpl(wrapper=True)  # marks before `-m` chooses, deselects after it
def pytest_collection_modifyitems(config, items):
    unknown = _mark_exhaustive(items)
    if unknown and not any("::" in argument for argument in config.args):
        raise pytest.UsageError(f"marks name cases that are not there: {unknown}")
    result = yield
    items.sort(key=_is_compiled_fast, reverse=True)  # each change forgets what is compiled
    for item in items:
        if item.get_closest_marker("gpu") and jax.default_backend() != "gpu":
            item.add_marker(pytest.mark.skip(reason=f"needs an NVIDIA GPU, this machine has {jax.default_backend()}"))
    if config.getoption("--each-value"):
        few, others = _each_value(items)
        config.hook.pytest_deselected(items=others)
        items[:] = few
    return result


def _mark_exhaustive(items) -> dict[str, set]:
    """Marks the cases that a mark `gate` does not name, and unmarks those that a mark `oldest` does not.

    Returns what they name and no test is, by test.
    """
    unknown = {}
    for item in items:
        if "_family_" in item.name:
            item.add_marker(pytest.mark.exhaustive)
        if (oldest := item.get_closest_marker("oldest")) and oldest.args:
            found = {case for case in oldest.args if _is_case(item.name, case)}
            if not found:
                item.own_markers.remove(oldest)
            unknown.setdefault(id(oldest), [item.nodeid, set(oldest.args)])[1].difference_update(found)
        if gate := item.get_closest_marker("gate"):
            found = {case for case in gate.args if _is_case(item.name, case)}
            if not found:
                item.add_marker(pytest.mark.exhaustive)
            unknown.setdefault(id(gate), [item.nodeid, set(gate.args)])[1].difference_update(found)
    return {test: cases for test, cases in unknown.values() if cases}


def _is_case(name: str, case: int | str) -> bool:
    """Whether a test's name ends with this case: its number or its name."""
    name = name.removesuffix("]").removesuffix("__with_jit")
    return re.search(rf"(\D|^){case}$" if isinstance(case, int) else rf"[_\[]{re.escape(case)}$", name) is not None


@pytest.fixture(autouse=True)
def compiled_as_marked(request):
    """Unoptimised if JAX_DISABLE_MOST_OPTIMIZATIONS is set or the test says so, but for tests marked `optimised`.

    What was compiled the other way is forgotten: JAX does not compile a traced function anew.
    """
    is_fast = _is_compiled_fast(request.node)
    if is_fast != jax.config.read("jax_disable_most_optimizations"):
        jax.config.update("jax_disable_most_optimizations", is_fast)
        jax.clear_caches()


def _is_compiled_fast(item) -> bool:
    if item.get_closest_marker("optimised"):
        return False
    return _COMPILE_FAST or (item.get_closest_marker("unoptimised") is not None and jax.default_backend() == "cpu")


_COMPILE_FAST = jax.config.read("jax_disable_most_optimizations")
_FINISHED = itertools.count(1)
_MAPS = 30_000  # a test may add some thousands


@pytest.fixture(autouse=True, scope="module")
def forget_what_was_traced_with_patches(request):
    """What a module patches, no other one's programs may have, nor its programs what others do not patch."""
    is_patched = any(item.path == request.path and "monkeypatch" in item.fixturenames for item in request.session.items)
    if is_patched:
        jax.clear_caches()
    yield
    if is_patched:
        jax.clear_caches()


@pytest.fixture(autouse=True)
def forget_compiled_programs_before_they_are_too_many():
    """Each holds memory maps, and Linux ends a process of 65,530 by a segmentation fault."""
    yield
    if next(_FINISHED) % 10 == 0 and _count_maps() > _MAPS:
        jax.clear_caches()


def _count_maps() -> int:
    maps = pathlib.Path("/proc/self/maps")
    return maps.read_bytes().count(b"\n") if maps.exists() else 0


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
