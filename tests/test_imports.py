"""What docs/architecture.md says of imports: read from the files, nothing is imported. 4 s."""

import ast
import functools
import graphlib
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[1]
FOLDERS = {"hisa_jax": "hisa_jax", "kernels_pallas": "hisa_jax.kernels_pallas", "models": "hisa_jax.models",
           "bench": "bench"}  # fmt: skip


def modules():
    """Name -> file, but for packages, which hand names on."""
    found = {}
    for folder, prefix in FOLDERS.items():
        for path in (ROOT / folder).rglob("*.py"):  # goes into no link
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            if parts[-1] != "__init__":
                found[".".join((prefix, *parts))] = path
    return found


@functools.cache
def imported(path):
    """Names, wherever in the file the import stands; of `from a import b` both a and a.b."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def test_no_file_is_imported_by_what_it_imports():
    files = modules()
    graph = {name: imported(path) & files.keys() for name, path in files.items()}
    # `Rollout.check` imports it when it is called, so that a record is had without what checks it.
    graph["hisa_jax.models.replay.record"].remove("hisa_jax.models.replay.checking")
    assert len(graph) > 300 and sum(map(len, graph.values())) > 1000
    graphlib.TopologicalSorter(graph).prepare()  # raises for a circle, and names its files


@pytest.mark.parametrize(
    ("folder", "others"),
    [
        ("hisa_jax", ("hisa_jax.kernels_pallas", "hisa_jax.models", "flax", "bench", "tests")),
        ("kernels_pallas", ("hisa_jax.models", "hisa_jax.sharded", "hisa_jax.dispatch", "flax", "bench", "tests")),
        ("models", ("bench", "tests")),
    ],
)
def test_imports_go_one_way(folder, others):
    """Kernels are found by name, by `dispatch.py` and `dispatch_stage.py` alone."""
    for name, path in modules().items():
        if path.relative_to(ROOT).parts[0] != folder:
            continue
        wrong = [x for x in imported(path) if x.startswith(tuple(f"{other}." for other in others)) or x in others]
        assert not wrong, (name, wrong)
        if folder == "hisa_jax" and "import_module(" in (text := path.read_text()) and "kernels_pallas" in text:
            assert path.name in ("dispatch.py", "dispatch_stage.py"), path
