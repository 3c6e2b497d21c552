"""One device's part of a selection over several, by GPU kernels: stages of both backends, and the whole lowered.

Mosaic's stages, interpreted with races detected, are those of Triton; on emulated devices that share pages Triton's are
run by `tests.shared_pages`.
"""

import functools
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.mesh import AbstractDevice
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import hisa_jax as hj
from hisa_jax import dispatch
from hisa_jax.kernels_pallas import mosaic_gpu, triton
from hisa_jax.kernels_pallas.sort_key import INVISIBLE
from hisa_jax.layout import Call, last_visible
from hisa_jax.sharded import select_kernels
from hisa_jax.sharded.stripes import Shard
from hisa_jax.xla import topk
from tests.gpu.test_lowering import _CUSTOM_CALLS, BF16, E4M3
from tests.gpu.test_paged import PREFILL_AND_DECODE, draw

pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")


@pytest.fixture
def few_sms(monkeypatch):
    monkeypatch.setattr(mosaic_gpu.stages, "n_sms", lambda: 3)


def own_call(dtype, page_size=32):
    """Requests of which a device has all pages, and how many blocks of 64 each query may keep."""
    requests = draw(**PREFILL_AND_DECODE, page_size=page_size, dtype=dtype)
    offsets = requests.cu_seqlens_q
    visible = last_visible(offsets, requests.lengths, requests.q.shape[0])
    where = dict(query_offsets=offsets, table=requests.tables, cache=requests.cache)
    return Call(q=requests.q, w=requests.w, visible=visible, **where), -(-visible // 64)


def both(stage, n, *arguments, interpret):
    """Rows with a candidate, `n` [T] of them, of what Mosaic and Triton find."""
    rows = np.asarray(n) > 0
    found = (getattr(module.select_shard, stage) for module in (mosaic_gpu, triton))
    got, wanted = (f(*arguments, interpret=i) for f, i in zip(found, (interpret, True), strict=True))
    for x, y in zip(got, wanted, strict=True):
        np.testing.assert_array_equal(np.asarray(x)[rows], np.asarray(y)[rows])
    assert ((np.asarray(got[0]) == INVISIBLE) == (np.asarray(got[1]) < 0))[rows].all()
    return got


@pytest.mark.exhaustive
@pytest.mark.parametrize("dtype", [E4M3, BF16], ids=["e4m3", "bf16"])
def test_mosaics_stages_find_what_tritons_find(interpret, few_sms, dtype):
    call, eligible = own_call(dtype)
    own = functools.partial(both, interpret=interpret)
    _, ids = own("best_blocks", eligible, call, eligible, 4, 64)
    ids = jnp.where((eligible > 0)[:, None], ids, -1)
    own("best_in_blocks", eligible, call, ids, 150, 64)
    own("best_tokens", eligible, call, 40)


def test_mosaic_merges_rows_with_holes(interpret, few_sms):
    """Sort keys that tie, a row of few candidates, one of none. Narrower rows are Triton's."""
    rng, k, width = np.random.default_rng(0), 40, 2500
    sort_keys = rng.integers(-30, 30, (4, width)).astype(np.int32)
    sort_keys[1, 3:-3], sort_keys[2], sort_keys[3, ::2] = INVISIBLE, INVISIBLE, INVISIBLE
    positions = jnp.asarray(np.where(sort_keys > INVISIBLE, 3 * np.arange(width), -1), jnp.int32)
    merged = mosaic_gpu.select_shard.merge(jnp.asarray(sort_keys), positions, k, interpret=interpret)
    best, wanted = topk.topk_in_order(jnp.asarray(sort_keys), positions, k)
    np.testing.assert_array_equal(merged[0], wanted)
    np.testing.assert_array_equal(merged[1], best)


def test_rows_beyond_the_widest_are_merged_in_parts(monkeypatch):
    monkeypatch.setattr("hisa_jax.kernels_pallas.select_shard._MAX_WIDTH", 64)
    sort_keys = jnp.asarray(np.random.default_rng(0).integers(-30, 30, (3, 150)), jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(150, dtype=jnp.int32), sort_keys.shape)
    got = triton.select_shard.merge(sort_keys, positions, 20, interpret=True)
    wanted = topk.topk_in_order(sort_keys, positions, 20)
    jax.tree.map(np.testing.assert_array_equal, got, wanted[::-1])


PROMISES = {
    "two": ("hisa_over_two_devices",),
    "four": ("flat_over_four_devices", "hisa_over_four_devices"),
    "others": ("stripes_of_two_blocks_and_8_bits", "the_other_methods", "candidates_alone_are_exchanged"),
    "isolation": ("what_others_hold_leaves_no_trace", "keys_in_one_piece"),
}


@pytest.mark.exhaustive
@pytest.mark.parametrize("promises", PROMISES)
def test_pages_shared_by_emulated_devices_are_searched_by_triton(promises):
    command = [sys.executable, "-m", "tests.shared_pages", "triton", *PROMISES[promises]]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("kept:") == len(PROMISES[promises])


@pytest.mark.parametrize(
    ("backend", "R", "queries"),
    [
        ("mosaic_gpu", 32, 1),
        pytest.param("mosaic_gpu", 8, 525, marks=pytest.mark.exhaustive),
        pytest.param("triton", 32, 1, marks=pytest.mark.exhaustive),
    ],
)
def test_a_selection_over_eight_gpus_lowers_and_gathers_candidates_alone(backend, R, queries):
    methods = hj.Hisa(topk=2048, block_size=128, block_topk=64), hj.Dsa(topk=2048)
    text, n, T = lowered_over_eight(backend, R, queries, methods), 8, R * queries
    assert text.count("custom_call") > 8
    gathered = re.findall(r'"?stablehlo\.all_gather"?.*?-> tensor<([^>]*)>', text, re.DOTALL)
    rows, to_all = -(-T // n) * n, T == R  # few queries' candidates go to all devices, others' to whom merges them
    widths = (n * 64, n * 2048) if to_all else (62, 64, 2048)
    assert set(gathered) <= {f"{rows}x{k}xi32" for k in widths} and gathered, gathered
    assert ("stablehlo.all_to_all" in text) != to_all


def lowered_over_eight(backend, R, queries, methods, S=131072):
    """StableHLO of selections from requests of S tokens in pages of 64, over eight GPUs."""
    n, page_size, T = 8, 64, R * queries
    n_pages = R * S // page_size
    device = AbstractDevice("NVIDIA H200", 132, "gpu")
    auto = dict(axis_types=(AxisType.Auto,), abstract_device=device)
    mesh = jax.sharding.AbstractMesh((n,), ("context",), **auto)

    def one_device(q, w, visible, table, offsets, cache, method):
        call = Call(q=q, w=w, visible=visible, query_offsets=offsets, table=table, cache=cache)
        shard = Shard(axis="context", n_devices=n, stripe=128, max_keys=S)
        options = dict(tiles=hj.Tiles(), shard=shard, return_scores=False, return_blocks=False)
        return select_kernels.select_shard(lambda: dispatch.backend(backend), call, method, **options)

    def select(*arrays):
        specs, found = (*(P(),) * 5, P("context")), []
        for method in methods:
            run = functools.partial(one_device, method=method)
            found.append(jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=False)(*arrays))
        return found

    shaped = jax.ShapeDtypeStruct
    cache = jax.eval_shape(lambda: hj.init_cache(n_pages, page_size, 128, E4M3))
    ints = (shaped(shape, jnp.int32) for shape in ((T,), (R, S // page_size // n), (R + 1,)))
    arrays = shaped((T, 64, 128), E4M3), shaped((T, 64), jnp.float32), *ints, cache
    checks = [jax.export.DisabledSafetyCheck.custom_call(name) for name in _CUSTOM_CALLS]
    with jax.sharding.use_abstract_mesh(mesh):
        return jax.export.export(jax.jit(select), platforms=["cuda"], disabled_checks=checks)(*arrays).mlir_module()
