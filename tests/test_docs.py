"""The documentation runs, and there is some for every public name."""

import doctest
import inspect
import pathlib
import re

import jax
import jax.numpy as jnp
import pytest

import hisa_jax as hj

pytestmark = pytest.mark.oldest
ROOT = pathlib.Path(__file__).parent.parent
FUNCTIONS = [name for name in hj.__all__ if inspect.isfunction(getattr(hj, name))]


def test_every_public_name_exists_and_is_documented():
    for name in hj.__all__:
        value = getattr(hj, name)
        if name != "Method":  # a union of the three documented ones
            assert inspect.getdoc(value), name


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_argument_of_a_public_function_is_described(name):
    function = getattr(hj, name)
    doc = inspect.getdoc(function)
    described = set(re.findall(r"\b[A-Za-z_]+\b", doc[doc.index("Args:") :]))
    assert set(inspect.signature(function).parameters) <= described


@pytest.mark.parametrize("name", FUNCTIONS)
def test_examples_of_public_functions_run(name):
    finder = doctest.DocTestFinder(recurse=False)
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    for example in finder.find(getattr(hj, name), name, globs={"hj": hj, "jax": jax, "jnp": jnp}):
        assert runner.run(example).failed == 0


@pytest.mark.parametrize("page", ["README.md", "docs/serving.md"])
def test_the_examples_of_a_page_run(page):
    code = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    assert code, f"{page} shows no Python"
    namespace: dict = {}
    for block in code:
        exec(compile(block, page, "exec"), namespace)


def test_links_of_the_readme_and_docs_lead_somewhere():
    for page in (ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("*/README.md")):
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page.name} links to {target}"
