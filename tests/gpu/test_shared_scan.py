"""A scan of keys that several devices share: whole on emulated devices, one device's part by Mosaic's kernels.
In the gate 6 s, the rest is exhaustive.

Of emulated devices Triton's kernels are run, by `tests.shared_scan`: the interpreter of Mosaic GPU knows one device.
"""

import dataclasses
import functools
import os
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

import hisa_jax as hj
from hisa_jax.kernels_pallas import mosaic_gpu, scan, triton
from hisa_jax.kernels_pallas.flat_call import FlatCall
from hisa_jax.kernels_pallas.indexer import Indexer
from hisa_jax.kernels_pallas.select_shard import SelectShard
from hisa_jax.kernels_pallas.sequences import Sequences
from hisa_jax.kernels_pallas.sort_key import INVISIBLE
from tests.gpu.test_lowering import E4M3
from tests.gpu.test_select_shard import lowered_over_eight, own_call

pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")

PROMISES = {
    "heads": ("heads_are_those_of_one_device",),
    "batch": (
        "heads_of_few_queries_are_those_of_one_device",
        "a_batch_over_two_devices",
        "each_device_finds_thresholds_for_a_share",
    ),
    "search": ("the_best_keys_on_one_device", "misleading_samples", "ties_beyond_the_room"),
    "others": ("other_methods", "few_queries_are_the_flat_indexers"),
    "pages": ("pages_and_sketches", "what_others_hold_leaves_no_trace"),
}


@pytest.mark.parametrize(
    "promises", ["heads", *(pytest.param(name, marks=pytest.mark.exhaustive) for name in list(PROMISES)[1:])]
)
def test_keys_shared_by_emulated_devices_are_scanned_by_triton(promises):
    command = [sys.executable, "-m", "tests.shared_scan", *PROMISES[promises]]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("kept:") == len(PROMISES[promises])


@pytest.mark.parametrize("n_sms", [3, pytest.param(16, marks=pytest.mark.exhaustive)])
def test_mosaic_finds_the_best_of_lists_of_any_length(interpret, monkeypatch, n_sms):
    """In one kernel, or of few queries in two: more and fewer than are chosen, one token, none."""
    monkeypatch.setattr(mosaic_gpu.stages, "n_sms", lambda: n_sms)
    rng, (T, S, H, D), k = np.random.default_rng(0), (4, 1200, 16, 128), 24
    q, keys, w = (jnp.asarray(rng.integers(-1, 2, shape), jnp.float32) for shape in ((T, H, D), (S, D), (T, H)))
    starts = np.array([0], np.int32)
    sequences = Sequences(query_starts=np.append(starts, T), key_starts=starts, lengths=starts + S, max_keys=S)
    call = FlatCall(
        q=q.astype(E4M3), w=w, visible=jnp.full((T,), S, jnp.int32), k=keys.astype(E4M3),
        k_scale=jnp.asarray(2.0 ** rng.integers(-1, 2, S), jnp.float32), sequences=sequences,
    )  # fmt: skip
    count = np.array([500, 11, 1, 0], np.int32)
    tokens = np.full((T, 512), -1, np.int32)
    for t, n in enumerate(count):
        tokens[t, :n] = np.sort(rng.choice(S, n, replace=False))
    lists = call, jnp.asarray(tokens), jnp.asarray(count), k
    got = map(np.asarray, mosaic_gpu.stages.best_listed(*lists, interpret))
    wanted = map(np.asarray, triton.stages.best_listed(*lists, True))
    for x, y in zip(got, wanted, strict=True):
        np.testing.assert_array_equal(x[count > 0], y[count > 0])


class Alone:
    """`Communicator` of one device."""

    n = 1
    owns = staticmethod(lambda positions: positions >= 0)
    own = total = staticmethod(lambda x: x)
    map_rows = staticmethod(lambda rows, fill: lambda f, column: f(rows, column))


@pytest.mark.exhaustive
@pytest.mark.parametrize("n_sms", [3, 16])
def test_mosaics_part_of_a_scan_is_tritons(interpret, monkeypatch, n_sms):
    """Few tokens are listed, of whole numbers, whose sums are exact."""
    for name, value in dict(FEW=0, _RANK=16, _DEVIATIONS=1).items():
        monkeypatch.setattr(scan, name, value)
    monkeypatch.setattr(mosaic_gpu.stages, "n_sms", lambda: n_sms)
    call, _ = own_call(E4M3)
    method, visible = hj.Scan(topk=40, candidates=80, exact_heads=2), np.asarray(call.visible)
    for options in ({}, dict(slopes="plain")):
        found = []
        for module, how in ((mosaic_gpu, interpret), (triton, True)):
            shard = SelectShard(Indexer(module.stages, way_of_scan=scan.way_of))
            arguments = call, call.visible, dataclasses.replace(method, **options), 40, Alone
            found.append(functools.partial(shard.best_scanned, *arguments)(interpret=how))
        for x, y in zip(*found, strict=True):
            np.testing.assert_array_equal(np.asarray(x)[visible > 0], np.asarray(y)[visible > 0])
        assert ((np.asarray(found[0][0]) == INVISIBLE) == (np.asarray(found[0][1]) < 0)).all()


@pytest.mark.exhaustive
@pytest.mark.parametrize("backend", ["mosaic_gpu", "triton"])
def test_many_queries_over_eight_gpus_lower(backend):
    """Keys of samples are added up, their scan scores go to whom looks for thresholds, and counts are added up."""
    text = lowered_over_eight(backend, 2, 525, [hj.Scan()], S=1 << 20)
    assert text.count("custom_call") > 8
    for exchange in ("all_reduce", "all_to_all", "all_gather"):
        assert f"stablehlo.{exchange}" in text
