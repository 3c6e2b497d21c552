"""The tutorials: listed where readers look, in plain words, and each runs as the program that it is, too."""

import ast
import importlib.util
import os
import pathlib
import subprocess
import sys

import pytest

from .test_docs import assert_plain

ROOT = pathlib.Path(__file__).parent.parent
TUTORIALS = sorted((ROOT / "docs/tutorials").glob("*.py"))
NEEDS = {"own_questions": "lm_eval", "serving": "openai"}  # beside the extras models, bench and serve


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_a_tutorial_is_listed_and_has_prose_and_a_picture(path):
    text = path.read_text()
    ast.parse(text)
    assert f"- tutorials/{path.stem}.md\n" in (ROOT / "mkdocs.yml").read_text()
    assert f"]({path.name})" in (path.parent / "README.md").read_text()
    assert text.startswith("# %% [markdown]\n# # ") and "plt.show()" in text and "\nassert " in text
    for number, line in enumerate(text.splitlines(), 1):
        assert_plain(line, f"{path.name}:{number}")


@pytest.mark.exhaustive
@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_a_tutorial_runs(path):
    """10 to 90 seconds of CPU each."""
    if (needed := NEEDS.get(path.stem)) and importlib.util.find_spec(needed) is None:
        pytest.skip(f"{needed} is not installed; make docs runs it")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "MPLBACKEND": "Agg"}
    subprocess.run([sys.executable, path], cwd=ROOT, env=environment, check=True, timeout=600)
