"""The tables of mistakes (tests/mutants) fit the tree: each can still be made, and its test is in the gate. 7 s.

That the tests fail of them, `make mutants` looks.
"""

import ast
import os
import pathlib
import subprocess
import sys

import pytest

from tests.mutants import table

ROOT = pathlib.Path(__file__).parents[1]


@pytest.mark.parametrize("file", sorted({mutant.file for mutant in table.read()}))
def test_every_mistake_can_still_be_made(file):
    right = (ROOT / file).read_text()
    meaning = ast.dump(ast.parse(right))
    for mutant in table.read():
        if mutant.file == file:
            assert ast.dump(ast.parse(mutant.applied(right))) != meaning, mutant


def test_the_test_of_every_mistake_is_in_the_gate():
    tests = sorted({mutant.test for mutant in table.read()})
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", "not exhaustive", *tests]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0 and "deselected" not in done.stdout, done.stdout + done.stderr


def test_a_mistake_is_made_where_it_is_meant():
    mutant = table.Mutant(breaks="", file="f", before="a", after="b", test="")
    assert mutant.applied("x a y") == "x b y"
    for text in ("x", "a a"):
        with pytest.raises(LookupError, match=f"f has 'a' {text.count('a')} times, wanted once"):
            mutant.applied(text)
    second = table.Mutant(breaks="", file="f", before="a", after="b", test="", nth=2)
    assert second.applied("a a a") == "a b a"
    with pytest.raises(LookupError, match="f has 'a' 1 times, wanted 2 times"):
        second.applied("a")
