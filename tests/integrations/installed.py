"""Files of an installed package that cannot be imported by name: its tests, and folders whose parents want more."""

import importlib.util
import pathlib
import re
import sys
import sysconfig
import types

SITE = pathlib.Path(sysconfig.get_paths()["purelib"])
SOURCE = pathlib.Path(sys.prefix) / "source"  # the repository that hosts.toml names


def namespace(package: str, folder: pathlib.Path | None = None) -> None:
    """Makes a package importable without what its __init__.py imports."""
    module = types.ModuleType(package)
    module.__path__ = [str(folder or SITE.joinpath(*package.split(".")))]
    sys.modules[package] = module


def load_tests(file: str, folder: pathlib.Path = SITE) -> dict:
    """The tests of a file and the marks of all of them, for pytest to find in another module."""
    path = folder / file
    spec = importlib.util.spec_from_file_location(f"installed_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = {name: value for name, value in vars(module).items() if name.startswith(("test_", "Test", "pytestmark"))}
    if not found:
        raise LookupError(f"{path} has no tests")
    return found


def run_example(host: str) -> None:
    """Runs the blocks of docs/integrations.md that are titled with a host."""
    page = pathlib.Path(__file__).parent.parent.parent / "docs" / "integrations.md"
    blocks = re.findall(rf'```python title="{host}"\n(.*?)```', page.read_text(), re.DOTALL)
    if not blocks:
        raise LookupError(f"{page.name} has no example of {host}")
    for block in blocks:
        exec(compile(block, page.name, "exec"), {})
