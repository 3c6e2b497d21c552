"""Interpret mode that finds races, missing waits and what was never written; compile tests where libtpu is."""

import collections

import jax
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call  # what was found has no public name
from jax.experimental.pallas import tpu as pltpu

from bench.tpu import aot
from bench.tpu.chips import CHIPS
from hisa_jax import dispatch
from hisa_jax.kernels_pallas.mosaic_tpu import scan_stages
from hisa_jax.pallas import Kernels

if aot.why_not() is None:
    aot.prepare()  # before anything asks JAX for its devices, which loads libtpu


@pytest.fixture
def interpret():
    yield pltpu.InterpretParams(detect_races=True, dma_execution_mode="on_wait", uninitialized_memory="nan")
    races = interpret_pallas_call.races
    assert races is not None, "nothing was interpreted"
    assert not races.races_found


@pytest.fixture(params=[pytest.param("mosaic_tpu", marks=pytest.mark.tpu), "interpreted"])
def implementation(request, monkeypatch):
    """The kernels on a TPU where there is one; interpreted everywhere."""
    if request.param == "interpreted":
        interpret = request.getfixturevalue("interpret")
        kernels = Kernels(lambda: dispatch.backend("mosaic_tpu"), flat_if_all_kept=True, interpret=interpret)
        able = dispatch.Implementation(why_not=lambda device, problem: None, select=kernels.select)
        monkeypatch.setitem(dispatch.IMPLEMENTATIONS, request.param, able)
    return request.param


@pytest.fixture
def few_share(monkeypatch):
    """Sequences are scanned whatever they have of queries, in tiles of 16: interpreted, one of 64 takes minutes."""
    monkeypatch.setattr(scan_stages, "_LEAST_QUERIES", 8)
    monkeypatch.setattr(scan_stages, "_TILE", 16)


@pytest.fixture(params=CHIPS)
def chip(request):
    """Each chip that kernels are compiled for."""
    reason = aot.why_not()
    if reason:
        pytest.skip(reason)
    return request.param


@pytest.hookimpl(tryfirst=True)  # before `-m` chooses
def pytest_collection_modifyitems(items):
    """A case has its turn on one chip; on the others it is marked `exhaustive`.

    What parametrises itself by chip asks for all. To compile the interpreter's programs takes longer than to run them.
    """
    turns = collections.defaultdict(dict)
    for item in items:
        chip = item.callspec.params.get("chip") if hasattr(item, "callspec") else None
        if chip and not any("chip" in mark.args[0] for mark in item.iter_markers("parametrize")):
            of_file, case = turns[item.path], item.nodeid.replace(chip, "")
            turn = of_file.setdefault(case, len(of_file))
            if chip != list(CHIPS)[turn % len(CHIPS)]:
                item.add_marker(pytest.mark.exhaustive)
        if {"interpret", "implementation", "kernel"} & set(item.fixturenames) and "tests/tpu" in item.nodeid:
            item.add_marker(pytest.mark.unoptimised)
        if item.get_closest_marker("tpu") and jax.default_backend() != "tpu":
            item.add_marker(pytest.mark.skip(reason=f"needs a TPU, this machine has {jax.default_backend()}"))
