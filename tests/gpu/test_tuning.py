"""Tuned configurations are data: found by device and shape, and replaceable."""

import json

import jax
import pytest

from bench.gpu import tune
from hisa_jax.kernels_pallas import tuning
from hisa_jax.kernels_pallas.triton.refine import Config

SHAPE = {"H": 64, "D": 128, "block_size": 128, "itemsize": 2}


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.setattr(tuning, "FILE", tmp_path / "tuned.json")
    tuning._entries.cache_clear()
    yield tuning.FILE
    tuning._entries.cache_clear()


def target(**shape):
    return tune.Target(kernel="triton.refine", shape=SHAPE | shape, heuristic=None, candidates=[], make=lambda: None)


def test_a_tuned_shape_is_found_and_no_other(file):
    device = jax.devices()[0].device_kind
    found = {"config": {"tile_s": 32, "tile_m": 16, "num_warps": 8, "num_stages": 2}, "ms": 1.0, "heuristic_ms": 1.1}
    tune.write(device, target(), found)
    assert tuning.tuned(Config, "triton.refine", **SHAPE) == Config(tile_s=32, tile_m=16, num_warps=8, num_stages=2)
    assert tuning.tuned(Config, "triton.refine", **SHAPE | {"H": 32}) is None
    assert tuning.tuned(Config, "mosaic_gpu.refine", **SHAPE) is None


def test_a_new_measurement_replaces_the_old_one_and_leaves_other_devices(file):
    for device, ms in (("NVIDIA H200", 1.0), ("NVIDIA A100", 2.0), ("NVIDIA H200", 0.9)):
        tune.write(device, target(), {"config": {}, "ms": ms, "heuristic_ms": ms})
    assert [(x["device"], x["ms"]) for x in json.loads(file.read_text())] == [
        ("NVIDIA A100", 2.0),
        ("NVIDIA H200", 0.9),
    ]


def test_the_committed_file_has_configurations_of_the_kernels():
    configs = {target.kernel: type(target.heuristic) for target in tune.targets()}
    for x in json.loads(tuning.FILE.read_text()):
        configs[x["kernel"]](**x["config"])
        assert x["ms"] <= x["heuristic_ms"]
