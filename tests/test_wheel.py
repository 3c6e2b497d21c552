"""What is installed: names that begin with `hisa_jax` and nothing large, and imports that say what they lack."""

import ast
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile

import pytest

from hisa_jax import checks

ROOT = pathlib.Path(__file__).parent.parent
_PARTS = ("hisa_jax", "kernels_pallas", "models", "pyproject.toml", "README.md", "LICENSE")


def run(*command, cwd, **variables):
    """What a command prints, without the checkout on its path."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | variables
    done = subprocess.run(list(map(str, command)), cwd=cwd, env=environment, text=True, capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built in a copy, as setuptools leaves its work where it builds."""
    folder = tmp_path_factory.mktemp("checkout")
    for part in _PARTS:
        source, target = ROOT / part, folder / part
        if source.is_dir():
            shutil.copytree(source, target, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, target)
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    run(*pip, "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index", "-w", folder / "dist", ".", cwd=folder)
    (built,) = (folder / "dist").glob("*.whl")
    return built


def test_the_wheel_has_names_that_begin_with_hisa_jax_and_no_weights(wheel):
    files = zipfile.ZipFile(wheel).namelist()
    assert {file.split("/")[0].split("-")[0] for file in files} == {"hisa_jax"}
    folders = {file.split("/")[1] for file in files if file.count("/") > 1}
    assert {"kernels_pallas", "models", "sharded", "xla"} <= folders
    kinds = {pathlib.Path(file).suffix for file in files if not file.startswith("hisa_jax-")}
    # Without an ending: what the harness' tasks include, which must not look like a task itself.
    assert kinds == {"", ".html", ".json", ".py", ".typed", ".yaml"}, "weights or figures among them"
    assert "hisa_jax/kernels_pallas/tuned.json" in files and "hisa_jax/py.typed" in files
    for folder in ("hisa_jax", "kernels_pallas", "models"):
        installed = "hisa_jax" if folder == "hisa_jax" else f"hisa_jax/{folder}"
        for source in (ROOT / folder).rglob("*.py"):  # through no links
            assert f"{installed}/{source.relative_to(ROOT / folder)}" in files


def test_the_installed_wheel_runs_the_readme_and_loads_a_checkpoint_beside_folders_of_the_same_names(wheel, tmp_path):
    """A clean environment, which finds its dependencies where this one has them, in a folder with other `models`."""
    environment, elsewhere = tmp_path / "environment", tmp_path / "elsewhere"
    venv.create(environment, with_pip=False)
    python = environment / ("Scripts" if os.name == "nt" else "bin") / "python"
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python)
    run(*pip, "install", "-q", "--no-deps", "--no-index", wheel, cwd=tmp_path)
    (packages,) = environment.rglob("site-packages")
    assert {path.name.split("-")[0] for path in packages.iterdir() if "hisa" in path.name} == {"hisa_jax"}
    # The .pth files in these are not read then, so an editable installation of this checkout stays out of sight.
    (packages / "dependencies.pth").write_text("\n".join(path for path in sys.path if path.endswith("-packages")))
    for name in ("models", "kernels_pallas", "bench"):
        (elsewhere / name).mkdir(parents=True)
        (elsewhere / name / "__init__.py").write_text("raise RuntimeError('another package of this name')\n")
    (readme,) = re.findall(r"## Ten lines\n\n```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    script = f"""
{readme}
from hisa_jax import models
model = models.from_pretrained({str(ROOT / "tests/golden/glm5")!r})
print(hj.__file__, models.__file__, model.config.model_type, sep="\\n")
"""
    *_, package, models, kind = run(python, "-c", script, cwd=elsewhere, JAX_PLATFORMS="cpu").splitlines()
    assert pathlib.Path(package).parent == packages / "hisa_jax"
    assert pathlib.Path(models).parent == packages / "hisa_jax/models" and kind == "glm_moe_dsa"


def test_no_file_imports_a_part_by_the_name_of_its_folder():
    """They are `hisa_jax.models` and `hisa_jax.kernels_pallas`: by another name they would be loaded twice."""
    found = []
    # Of files without such a line the imports need not be told apart: to parse all takes 6 s.
    line = re.compile(r"^\s*(?:import|from)\b.*(?<![.\w])(?:models|kernels_pallas)\b", re.MULTILINE)
    for folder in ("hisa_jax", "kernels_pallas", "models", "bench", "tests"):
        for path in (ROOT / folder).rglob("*.py"):
            text = path.read_text()
            names = {
                name
                for node in (ast.walk(ast.parse(text)) if line.search(text) else ())
                for name in (
                    [alias.name for alias in node.names]
                    if isinstance(node, ast.Import)
                    else [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
                )
            }  # fmt: skip
            found += [(path, name) for name in names if name.split(".")[0] in ("models", "kernels_pallas")]
    folders = ("docs", "models", "kernels_pallas", "tests", ".github")
    for page in [*ROOT.glob("*.md"), *(page for folder in folders for page in (ROOT / folder).rglob("*.md"))]:
        text = page.read_text()
        found += [(page, line) for line in re.findall(r"^(?:import|from) (?:models|kernels_pallas)\b.*", text, re.M)]
    assert found == []


_BLOCKED = """
import contextlib, io, sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == package:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

def imported():
    from hisa_jax import models

def bench(command):
    from bench.__main__ import main
    with contextlib.redirect_stderr(io.StringIO()) as told:
        assert main([command]) == 1
    raise ImportError(told.getvalue())

def gguf():
    from bench.smollm2.gguf_file import read_weights
    read_weights("a file", None, None)

import hisa_jax
loaded = dict(sys.modules)
sys.meta_path.insert(0, Blocked())
for package, call in (
    ("flax", imported), ("flax", lambda: bench("serve")), ("orbax", imported), ("rich", lambda: bench("memory")),
    ("matplotlib", lambda: bench("gpu-report")), ("gguf", gguf),
):
    try:
        call()
        print(package, "was not missed")
    except ImportError as error:
        print(str(error).strip())
    for name in sys.modules.keys() - loaded.keys():
        if name.partition(".")[0] in ("hisa_jax", "bench", package):
            del sys.modules[name]
"""


def test_an_import_that_lacks_an_extra_names_it():
    told = run(sys.executable, "-c", _BLOCKED, cwd=ROOT, JAX_PLATFORMS="cpu", PYTHONPATH=str(ROOT)).splitlines()
    assert told == [
        "the package flax is missing: pip install 'hisa_jax[models]'",
        "python -m bench serve: error: the package flax is missing: pip install 'hisa_jax[models]'",
        "the package orbax is missing: pip install 'hisa_jax[models]'",
        "python -m bench memory: error: the package rich is missing: pip install 'hisa_jax[bench]'",
        "python -m bench gpu-report: error: the package matplotlib is missing: pip install 'hisa_jax[bench]'",
        "the package gguf is missing: pip install 'hisa_jax[lab]'",
    ]


def test_what_is_missing_is_brought_by_the_extra_that_is_named():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    brought = {
        name: {re.match(r"[a-z_\d]+", need)[0] for need in extras[name]}
        for name in ("models", "bench", "serve", "lab", "evaluate")
    }
    assert all(package in brought[name] for package, name in checks._EXTRAS.items())
    assert set.union(*brought.values()) - {"hisa_jax"} == checks._EXTRAS.keys()
    with pytest.raises(ModuleNotFoundError, match="No module named 'another'"), checks.optional_packages():
        raise ModuleNotFoundError("No module named 'another'", name="another")
