"""python -m tests.mutants [words]: makes each mistake of the tables in a copy of the tree and runs its test there.

It is killed if an assertion of the test fails. It survives if the test passes. It is broken if it no longer applies,
or ends otherwise: an import that fails, an exception that is no assertion, minutes of nothing.
"""

import argparse
import collections
import concurrent.futures
import contextlib
import os
import pathlib
import queue
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence

from tests.mutants import table
from tests.mutants.table import Mutant

ROOT = pathlib.Path(__file__).parents[2]
COPIED = ("hisa_jax", "kernels_pallas", "models", "bench", "tests", "docs", "pyproject.toml")
KERNEL_TESTS = ("tests/gpu", "tests/tpu")
_SECONDS = 300
# What pytest says of a failure: the first line of an assertion, or of what was to be raised and was not.
_ASSERTION = re.compile(r"^FAILED \S+.* - (assert |AssertionError|Failed: |ExceptionGroup)", re.MULTILINE)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.add_argument("words", nargs="*", help="only mistakes with one of these in their file, phrase or test")
    parser.add_argument("--workers", type=int, default=2, help="how many at a time")
    options = parser.parse_args(arguments)
    mutants = [
        mutant
        for mutant in table.read()
        if not options.words or any(word in f"{mutant.file} {mutant.breaks} {mutant.test}" for word in options.words)
    ]
    if not mutants:
        parser.error(f"no mistake has any of {options.words} in its file, phrase or test")
    if options.workers < 1:
        parser.error(f"--workers is {options.workers}, wanted at least 1")
    start = time.perf_counter()
    with trees(options.workers) as free, concurrent.futures.ThreadPoolExecutor(options.workers) as pool:
        for said in pool.map(lambda tests: unharmed(free, tests), by_kind({m.test for m in mutants})):
            if said:
                print(f"tests fail without a mistake:\n{said}")
                return 1
        print(f"without a mistake all tests pass ({time.perf_counter() - start:.0f} s)", flush=True)
        verdicts = collections.Counter(pool.map(lambda mutant: fate(free, mutant), mutants))
    print(f"{len(mutants)} mutants: {dict(verdicts)}, {time.perf_counter() - start:.0f} s")
    return 0 if set(verdicts) == {"killed"} else 1


@contextlib.contextmanager
def trees(n: int) -> Iterator[queue.Queue]:
    """Copies of the tree, without the trained model, as many as are used at a time."""
    free: queue.Queue = queue.Queue()
    with tempfile.TemporaryDirectory() as folder:
        for i in range(n):
            tree = pathlib.Path(folder, str(i))
            tree.mkdir()
            for name in COPIED:
                if (ROOT / name).is_dir():
                    ignored = shutil.ignore_patterns("bytes", "__pycache__")
                    shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=ignored)
                else:
                    shutil.copy2(ROOT / name, tree / name)
            free.put(tree)
        yield free


def by_kind(tests: set[str]) -> list[list[str]]:
    """Tests of interpreted kernels have an environment of their own."""
    kernels = sorted(test for test in tests if test.startswith(KERNEL_TESTS))
    return [kind for kind in (sorted(tests - set(kernels)), kernels) if kind]


def unharmed(free: queue.Queue, tests: list[str]) -> str:
    """What pytest says of failures without a mistake, nothing if there are none."""
    tree = free.get()
    try:
        code, said = run(tree, tests)
        return said if code else ""
    finally:
        free.put(tree)


def fate(free: queue.Queue, mutant: Mutant) -> str:
    """Makes the mistake, runs its test, takes it back: "killed", "survives" or "broken"."""
    tree, start, said = free.get(), time.perf_counter(), ""
    file = tree / mutant.file
    right = file.read_text()
    try:
        file.write_text(mutant.applied(right))
        code, said = run(tree, [mutant.test])
        is_killed = code == 1 and _ASSERTION.search(said)
        verdict = "survives" if code == 0 else "killed" if is_killed else "broken"
    except (LookupError, subprocess.TimeoutExpired) as error:
        verdict, said = "broken", str(error)
    finally:
        file.write_text(right)
        free.put(tree)
    seconds = time.perf_counter() - start
    why = "" if verdict != "broken" else "".join(line for line in said.splitlines(keepends=True) if line[0] not in "=!")
    line = f"{verdict:8} {seconds:4.0f} s  {mutant.file}: {mutant.breaks}  [{mutant.test}]\n{why}"
    print(line, end="", flush=True)  # one write: others print at the same time
    return verdict


def run(tree: pathlib.Path, tests: list[str]) -> tuple[int, str]:
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(tree), "COLUMNS": "300"}
    if tests[0].startswith(KERNEL_TESTS):
        environment.pop("JAX_COMPILATION_CACHE_DIR", None)
        environment["NPROC"] = "32"
    options = ["-q", "-x", "-rfE", "--tb=line", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", *options, *tests]
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, timeout=_SECONDS)
    return done.returncode, done.stdout + done.stderr


if __name__ == "__main__":
    sys.exit(main())
