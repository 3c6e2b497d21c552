"""The models' tests compile many programs and run most of them once: compile fast, run slowly."""

import pathlib

import pytest


def pytest_collection_modifyitems(items):
    for item in items:
        if pathlib.Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.unoptimised)
