"""Which implementation runs, and the reason why another does not."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hisa_jax as hj
from hisa_jax import dispatch, dispatch_stage
from hisa_jax.layout import Keys

pytestmark = pytest.mark.check

ARRAYS = jnp.ones((1, 3, 4, 16)), jnp.ones((1, 40, 16)), jnp.ones((1, 3, 4))
METHOD = hj.Dsa(topk=4)


def test_every_implementation_is_listed_and_xla_always_runs():
    for listed in (hj.implementations(), hj.implementations(*ARRAYS[:2], METHOD)):
        assert list(listed) == ["mosaic_gpu", "triton", "mosaic_tpu", "xla"]
        assert listed["xla"] is None
        assert all(reason is None or len(reason) > 10 for reason in listed.values())


def test_asking_about_half_a_call_says_what_is_wanted():
    with pytest.raises(ValueError, match="implementations: k is None, wanted all of q, k and method, or none of them"):
        hj.implementations(q=ARRAYS[0])


def test_shapes_are_enough_to_ask_about_a_call():
    q, k = (jax.ShapeDtypeStruct(x.shape, x.dtype) for x in ARRAYS[:2])
    assert hj.implementations(q, k, METHOD)["xla"] is None


def test_auto_takes_the_first_that_can_run(monkeypatch):
    calls = []

    def spy(*args, **kwargs):
        calls.append("spy")
        return dispatch.IMPLEMENTATIONS["xla"].select(*args, **kwargs)

    able = dispatch.Implementation(why_not=lambda device, problem: None, select=spy)
    monkeypatch.setitem(dispatch.IMPLEMENTATIONS, "triton", able)
    monkeypatch.setitem(dispatch.IMPLEMENTATIONS, "mosaic_gpu", refusing("no"))
    hj.select(*ARRAYS, METHOD)
    hj.select(*ARRAYS, METHOD, implementation="triton")
    assert calls == ["spy", "spy"]


def refusing(reason):
    def fail(*args, **kwargs):
        raise AssertionError("ran although it declined")

    return dispatch.Implementation(why_not=lambda device, problem: reason, select=fail)


def test_one_that_cannot_run_says_why_and_which_can(monkeypatch):
    reason = "needs compute capability 9.0, this device is 'NVIDIA A100'"
    monkeypatch.setitem(dispatch.IMPLEMENTATIONS, "mosaic_gpu", refusing(reason))
    usable = ", ".join(name for name, why_not in hj.implementations(*ARRAYS[:2], METHOD).items() if why_not is None)
    message = f'select: implementation="mosaic_gpu" cannot run here: {reason}. Usable: {usable}'
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        hj.select(*ARRAYS, METHOD, implementation="mosaic_gpu")


def test_kernels_decline_tables_beyond_32_bits():
    hopper = dispatch.Device(platform="gpu", kind="NVIDIA H200", compute_capability="9.0")
    problem = dispatch.Problem(
        H=64, D=128, S=1 << 20, q_dtype="bfloat16", k_dtype="bfloat16", method=hj.Hisa(), page_size=64, n_requests=2047
    )
    assert dispatch.reasons(hopper, problem)["mosaic_gpu"] is None
    reasons = dispatch.reasons(hopper, dataclasses.replace(problem, n_requests=2048))
    for name in ("mosaic_gpu", "triton"):
        assert reasons[name] == "needs tables of at most 2147483647 tokens, not 2048 of 1048576"
    assert dispatch.choose("select_paged", "auto", reasons) == "xla"


def test_gpu_kernels_decline_more_candidates_than_a_row_has():
    hopper = dispatch.Device(platform="gpu", kind="NVIDIA H200", compute_capability="9.0")
    for block_topk, sentence in ((128, None), (256, "needs at most 32768 candidates a row, not 65536")):
        method = hj.Hisa(block_size=256, block_topk=block_topk)
        problem = dispatch.Problem(H=64, D=128, S=1 << 17, q_dtype="bfloat16", k_dtype="bfloat16", method=method)
        reasons = dispatch.reasons(hopper, problem)
        assert reasons["mosaic_gpu"] == reasons["triton"] == sentence
        # Of blocks alone there are no candidates.
        blocks = hj.BlockSparse(topk=256 * block_topk, block_size=256)
        reasons = dispatch.reasons(hopper, dataclasses.replace(problem, method=blocks))
        assert reasons["mosaic_gpu"] is reasons["triton"] is None


def test_kernels_decline_what_is_xlas_alone():
    devices = {
        "mosaic_gpu": dispatch.Device(platform="gpu", kind="NVIDIA H200", compute_capability="9.0"),
        "triton": dispatch.Device(platform="gpu", kind="NVIDIA H200", compute_capability="9.0"),
        "mosaic_tpu": dispatch.Device(platform="tpu", kind="TPU v6e"),
    }
    sentences = {
        hj.Hisa(): None,
        hj.Hisa(block_ratio=4): None,
        hj.Hisa(pool=len): "has no kernels for a Hisa of pool=len",
        hj.Hisa(block_score=max): "has no kernels for a Hisa of block_score=max",
        hj.Hisa(token_score=min): "has no kernels for a Hisa of token_score=min",
        hj.BlockSparse(block_score=max): "has no kernels for a BlockSparse of block_score=max",
        hj.Dsa(token_score=min): "has no kernels for a Dsa of token_score=min",
    }
    for method, sentence in sentences.items():
        problem = dispatch.Problem(H=64, D=128, S=1 << 16, q_dtype="bfloat16", k_dtype="bfloat16", method=method)
        for name, device in devices.items():
            assert dispatch.reasons(device, problem)[name] == sentence


def test_kernels_decline_the_scans_that_are_xlas_alone():
    hopper = dispatch.Device(platform="gpu", kind="NVIDIA H200", compute_capability="9.0")
    tpu = dispatch.Device(platform="tpu", kind="TPU v6e")
    problem = dispatch.Problem(H=64, D=128, S=1 << 16, q_dtype="bfloat16", k_dtype="bfloat16", method=hj.Scan())
    with_blocks = dataclasses.replace(problem, returns_blocks=True)
    cases = [
        (problem, None),
        (with_blocks, "has no kernels for a Scan with return_blocks=True: they score more tokens than its blocks hold"),
        (dataclasses.replace(problem, is_split=True), None),
        (
            dataclasses.replace(problem, is_split=True, has_budget=True),
            "has no kernels for a budget of keys that are split over devices",
        ),
    ]
    for method, sentence in {
        hj.Scan(unit=4): "has no kernels for a Scan of unit=4",
        hj.Scan(sketch="int4"): 'has no kernels for a Scan of sketch="int4", but on pages that keep it',
        hj.Scan(exact_heads=15): "needs at most 14 exact heads of a Scan, not 15",
        hj.Scan(candidates=21760): None,
        hj.Scan(candidates=30000): "needs at most 21845 candidates, not 30000",
    }.items():
        cases.append((dataclasses.replace(problem, method=method), sentence))
    for case, sentence in cases:
        for name in ("mosaic_gpu", "triton"):
            assert dispatch.reasons(hopper, case)[name] == sentence
    for case, sentence in (
        (problem, None),
        (with_blocks, cases[1][1]),
        (dataclasses.replace(problem, is_packed=True, q_dtype="int8", k_dtype="int8", D=64), None),
        (dataclasses.replace(problem, is_split=True), "has no kernels for a Scan of keys that are split over devices"),
        (dataclasses.replace(problem, method=hj.Scan(unit=32)), "needs units of up to 16 tokens, not 32"),
    ):
        assert dispatch.reasons(tpu, case)["mosaic_tpu"] == sentence


def test_gpu_kernels_take_lists_and_blocks_by_their_best_token_up_to_a_row():
    hopper = dispatch.Device(platform="gpu", kind="NVIDIA H200", compute_capability="9.0")
    source = hj.BlockSparse(topk=16384, block_size=8, scored_by="max")
    for S, n_listed, method, sentence in (
        (1 << 17, 0, source, None),
        (1 << 19, 0, source, "needs at most 32768 candidates a row, not 65536"),
        (1 << 17, 16384, hj.Dsa(), None),
        (1 << 17, 40000, hj.Dsa(), "needs lists of at most 32768 candidates, not 40000"),
    ):
        problem = dispatch.Problem(
            H=32, D=128, S=S, q_dtype="bfloat16", k_dtype="bfloat16", method=method, n_listed=n_listed
        )
        reasons = dispatch.reasons(hopper, problem)
        assert reasons["mosaic_gpu"] == reasons["triton"] == sentence


def test_kernels_take_few_heads_by_repeating_them():
    hopper = dispatch.Device(platform="gpu", kind="NVIDIA H200", compute_capability="9.0")
    tpu = dispatch.Device(platform="tpu", kind="TPU v6e")
    linear = hj.Dsa(activation=None)
    of_pairs = "needs 1, 2, 4, 8, 16, 32 or 64 heads for a Dsa of activation=None, not {}"
    wanted = "needs 16, 32, 64 or 128 heads of size 64 or 128, not {} of 128"
    opposite = "has no kernels for a Dsa of activation=None with int8 queries: -128 has no opposite"
    flat, many = (
        hj.Scan(exact_heads=4),
        "takes each of 4 heads for 4, and needs at most 14 exact heads of a Scan, not 16",
    )
    units = "has no kernels for a Scan of unit=32"  # whatever heads there are
    for method, H, dtype, sentence in (
        (hj.Dsa(), 1, "bfloat16", None),
        (hj.Hisa(), 8, "bfloat16", None),
        (hj.Dsa(), 12, "bfloat16", wanted.format(12)),
        (hj.Dsa(per_head=True), 12, "bfloat16", None),
        (linear, 4, "bfloat16", None),
        (linear, 64, "float8_e4m3fn", None),
        (linear, 24, "bfloat16", of_pairs.format(24)),
        (linear, 3, "bfloat16", of_pairs.format(3)),
        (linear, 128, "bfloat16", of_pairs.format(128)),
        (linear, 64, "int8", opposite),
        (hj.Scan(exact_heads=3), 4, "bfloat16", None),
        (flat, 4, "bfloat16", None),
        (dataclasses.replace(flat, sketch="int4"), 4, "bfloat16", many),
        (hj.Scan(exact_heads=3, unit=32), 4, "bfloat16", units),
    ):
        q, keys = jax.ShapeDtypeStruct((1, 8, H, 128), dtype), Keys(jax.ShapeDtypeStruct((1, 65536, 128), dtype), None)
        problem = dispatch.Problem.of(q, keys, method)
        problem = dataclasses.replace(problem, keeps_sketch=True)
        assert dispatch.reasons(hopper, problem)["mosaic_gpu"] == sentence
        if sentence not in (many, units):
            assert dispatch.reasons(tpu, problem)["mosaic_tpu"] == sentence


def test_hoppers_attention_is_first_where_its_64_heads_are_full():
    hopper = dispatch.Device(platform="gpu", kind="NVIDIA H200", compute_capability="9.0")
    for N, first in ((16, "triton"), (64, "mosaic_gpu"), (96, "triton"), (128, "mosaic_gpu")):
        problem = dispatch_stage.AttentionProblem(N=N, key_dim=576, value_dim=512, dtype="bfloat16")
        assert next(iter(dispatch_stage.attention_reasons(hopper, problem))) == first


def test_tiles_are_for_xla_alone(monkeypatch):
    able = dispatch.Implementation(why_not=lambda device, problem: None, select=np.zeros)
    monkeypatch.setitem(dispatch.IMPLEMENTATIONS, "triton", able)
    with pytest.raises(ValueError, match=re.escape('with implementation="triton", wanted implementation="xla"')):
        hj.select(*ARRAYS, METHOD, implementation="triton", tiles=hj.Tiles())


def test_the_default_device_decides():
    cpu = jax.devices("cpu")[0]
    with jax.default_device(cpu):
        assert dispatch.Device.default() == dispatch.Device(platform="cpu", kind=cpu.device_kind)
    with jax.default_device("cpu"):
        assert dispatch.Device.default().platform == "cpu"


def test_an_accelerator_gets_more_queries_a_tile():
    assert hj.Tiles.heuristic("gpu").queries > hj.Tiles.heuristic("cpu").queries
