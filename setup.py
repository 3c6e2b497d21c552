"""Refuses an older Python in a sentence, where pip would list every version of jax. All else is in pyproject.toml."""

import sys

from setuptools import setup

if sys.version_info < (3, 12):  # noqa: UP036
    sys.exit(
        f"hisa_jax needs Python 3.12 or newer, this is {sys.version.split()[0]}: "
        "python3.12 -m venv .venv makes an environment with one"
    )

setup()
