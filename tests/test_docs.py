"""The documentation runs, and there is some for every public name."""

import ast
import contextlib
import doctest
import inspect
import io
import pathlib
import re

import jax
import jax.numpy as jnp
import pytest

import hisa_jax as hj
from hisa_jax import models

ROOT = pathlib.Path(__file__).parent.parent
# Every page that people write or that a command writes for them.
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("*/README.md"), *ROOT.glob("[mt]*/*/README.md")]
# Words that only their author would understand, and what to say in their place.
PRIVATE = {
    r"behind": "after, past, below",
    r"(?:no|every)body's": "padding, unused, of no request, plain",
    r"dealt": "distributed, assigned, split",
    r"so and so": "the name",
    r"as it stands": "the current form, as it is",
    r"found out": "noticed, detected",
    r"(?:score|key|order-preserving) images?|images? of (?:scores?|each key|queries)": "sort key",
    r"the cut": "the threshold",
    r"whoever asks": "a process that asks",
}
# Whose docstrings are read for them, too; the links in hisa_jax lead to the other two folders.
FOLDERS = ("bench", "hisa_jax", "kernels_pallas", "models", "tests")
SOURCES = sorted({path.resolve() for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")})
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
def test_a_public_function_says_what_it_returns_and_raises_and_has_an_example(name):
    doc = inspect.getdoc(getattr(hj, name))
    returns = [] if inspect.signature(getattr(hj, name)).return_annotation is None else ["Returns:"]
    for part in ("Args:", *returns, "Raises:", "Example:"):
        assert f"\n{part}" in doc, f"{name}: no {part!r} in its docstring"


@pytest.mark.oldest
@pytest.mark.parametrize("name", FUNCTIONS)
def test_examples_of_public_functions_run(name):
    finder = doctest.DocTestFinder(recurse=False)
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    for example in finder.find(getattr(hj, name), name, globs={"hj": hj, "jax": jax, "jnp": jnp}):
        assert runner.run(example).failed == 0


@pytest.mark.gate("README.md", "docs/serving.md", "docs/attention.md")
@pytest.mark.oldest("README.md")
@pytest.mark.parametrize(
    "page", [
        "README.md", "docs/serving.md", "docs/research.md", "docs/integrations.md", "docs/conformance.md",
        "docs/lighthouse.md", "docs/latents.md", "docs/attention.md", "docs/indexers.md",
        "docs/together.md",
    ],
)  # fmt: skip
def test_the_examples_of_a_page_run(page):
    code = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    assert code, f"{page} shows no Python"
    namespace: dict = {}
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        for block in code:
            exec(compile(block, page, "exec"), namespace)
    shown = [float(line) for line in re.findall(r"^[\d.]+$", printed.getvalue(), re.MULTILINE)]
    for figure in re.findall(r"^print\(.*\)  # (0\.\d+)", "\n".join(code), re.MULTILINE):
        assert figure in [f"{value:.{len(figure) - 2}f}" for value in shown]


def test_links_lead_somewhere():
    for page in PAGES:
        for target, heading in re.findall(r"\]\(([^)#\s]*)#?([^)\s]*)\)", page.read_text()):
            if not target.startswith("http"):
                file = page.parent / target if target else page
                assert file.exists(), f"{page.name} links to {target}"
                if heading and file.suffix == ".md":
                    headings = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE)
                    names = [re.sub(r"[^\w -]", "", text.lower()).replace(" ", "-") for text in headings]
                    assert heading in names, f"{page.name} links to {target}#{heading}"


def test_files_that_pages_name_exist():
    """`stages.py`, `xla/stages.py`: in some folder. `STAGE.py`, `host_<name>.py` and the files of hosts are none."""
    folders = ("bench", "docs", "hisa_jax", "kernels_pallas", "models", "tests")
    files = [f"/{path.relative_to(ROOT)}" for folder in folders for path in (ROOT / folder).rglob("*.py")]
    for page in PAGES:
        text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
        for name in set(re.findall(r"`([a-z_\d/]+\.py)`", text)) - {"main.py"}:
            assert any(file.endswith(f"/{name}") for file in files), f"{page.name} names {name}, which is not there"


def test_the_readme_of_the_models_names_every_file():
    text = (ROOT / "models/README.md").read_text()
    for folder in ("models", "models/replay", "models/training"):
        for path in (ROOT / folder).glob("*.py"):
            assert path.name == "__init__.py" or f"`{path.name}`" in text, f"models/README.md lacks {path.name}"


def test_the_readme_of_the_kernels_names_what_they_import():
    head = (ROOT / "kernels_pallas/README.md").read_text().split("\n\n")[1]
    for path in (ROOT / "kernels_pallas").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            module = getattr(node, "module", None) or ""
            if isinstance(node, ast.ImportFrom) and re.match(r"hisa_jax\.(?!kernels_pallas)", module):
                name = module.removeprefix("hisa_jax.").replace(".", "/")
                is_file = (ROOT / "hisa_jax" / f"{name}.py").exists()
                for file in [name] if is_file else [f"{name}/{alias.name}" for alias in node.names]:
                    assert f"`{file}.py`" in head, f"{path.relative_to(ROOT)} imports {file}"


def test_the_table_of_stages_names_the_files_of_each_backend():
    text = (ROOT / "kernels_pallas/README.md").read_text()
    table = text[text.index("| stage | what |") :].split("\n\n")[0].splitlines()
    backends, _, *rows = [line.split("|")[1:-1] for line in table]
    for stage, _, *cells in rows:
        for backend, cell in zip(backends[2:], cells, strict=True):
            for name in re.findall(r"`(.*?)`", cell):
                path = ROOT / "kernels_pallas" / backend.strip(" `") / f"{name}.py"
                assert path.exists(), f"{stage}: no {path.relative_to(ROOT)}"


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 130


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_lines_of_a_page_are_short_and_its_words_are_plain(page):
    for number, line in enumerate(page.read_text().splitlines(), 1):
        # A row of a table is one line, whatever it holds.
        assert len(line) <= 120 or line.startswith("|"), f"{page.name}:{number} has {len(line)} characters, wanted 120"
        assert_plain(line, f"{page.name}:{number}")


def test_words_of_docstrings_are_plain():
    private = re.compile("|".join(PRIVATE), re.IGNORECASE)
    for path in SOURCES:
        text = path.read_text()
        # To parse all takes 7 s.
        for node in ast.walk(ast.parse(text)) if private.search(text) else ():
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                name = getattr(node, "name", "its docstring")
                assert_plain(ast.get_docstring(node) or "", f"{path.relative_to(ROOT)}: {name}")


def assert_plain(text, where):
    for word, better in PRIVATE.items():
        assert not re.search(rf"\b{word}\b", text, re.IGNORECASE), f"{where} {word!r}: say {better}"


@pytest.mark.parametrize(("page", "package"), [("api.md", hj), ("api_models.md", models)])
def test_the_reference_has_every_public_name(page, package):
    named = re.findall(r"^::: hisa_jax[\w.]*\.(\w+)$", (ROOT / "docs" / page).read_text(), re.MULTILINE)
    assert set(package.__all__) <= set(named)
