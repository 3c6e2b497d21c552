"""What docs/models.md and models/README.md show is so."""

import contextlib
import io
import re
from pathlib import Path

import pytest

from hisa_jax import models
from hisa_jax.models.dsa import choose_form

ROOT = Path(__file__).parents[2]
README = (ROOT / "models/README.md").read_text()
GUIDE = (ROOT / "docs/models.md").read_text()


def test_the_ten_lines_run_and_print_what_they_promise(monkeypatch):
    monkeypatch.chdir(ROOT)
    code, more = re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL)
    assert len([line for line in code.splitlines() if line]) <= 10
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(code, namespace := {})
    exec(more, namespace)
    flat, second = out.getvalue().splitlines()
    hisa, recall = second.split(" {")
    flat, hisa, recall = eval(flat), eval(hisa), eval("{" + recall)
    assert len(flat[0]) == len(hisa[0]) == 8 and flat != hisa
    assert all(0 < value < 1 for value in recall["prefill"] + recall["decode"])


@pytest.mark.exhaustive
def test_the_example_of_sampling_runs_and_says_the_same_three_times(monkeypatch):
    monkeypatch.chdir(ROOT)
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/sampling.md").read_text(), re.DOTALL)
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(code, space := {})
    tokens, text = space["result"].tokens[0], space["result"].texts[0]
    *pieces, answer, _ = out.getvalue().split("\n")  # other bytes end lines, too, for `splitlines`
    assert answer == text == space["engine"].tokenizer.decode(tokens) and len(pieces) == len(tokens)


def test_every_file_it_lists_is_there_and_every_file_is_listed():
    table = README[README.index("| file | holds |") :]
    listed = set(re.findall(r"`(\w+\.py)`", table[: table.index("\n\n")]))
    assert listed | {"__init__.py"} == {path.name for path in (ROOT / "models").glob("*.py")}


def test_the_context_at_which_the_form_changes_is_as_stated():
    stated = int(re.search(r"up to a context of ([\d,]+) tokens", GUIDE)[1].replace(",", ""))
    assert choose_form(models.dsv32(), 2048, stated - 100, 2048) == "expanded"
    assert choose_form(models.dsv32(), 2048, stated + 100, 2048) == "absorbed"
