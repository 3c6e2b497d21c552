"""Whole pods: 256 chips of v5e and v6e, 128 of v5p and v7x, compiled from here.

Sequences are sharded over `data`, the queries of each over `context`; a kernel sees one device's share under
`shard_map`. What may cross the network and what a device may hold is asserted from the compiled program.
"""

import functools
import math
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import hisa_jax as hj
from bench import shapes
from bench.tpu import aot
from bench.tpu.chips import CHIPS
from hisa_jax import dispatch
from hisa_jax.kernels_pallas import mosaic_tpu
from tests import kernel_calls

pytestmark = pytest.mark.slow
MODEL = shapes.DSV32
CONTEXT = 131072
COLLECTIVES = re.compile(r"(all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(")
KINDS = ("all-to-all", "all-gather", "all-reduce")
METHOD = dict(topk=MODEL.topk, block_size=MODEL.block_size, block_topk=MODEL.block_topk)


def compiled(chip, mesh, B, T, queries):
    """`select_hisa` of [B, T] queries that are sharded as `queries` says, keys over the sequences."""

    def sharded(spec, *shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    operands = (
        sharded(P(*queries, None, None), B, T, MODEL.H, MODEL.D),
        sharded(P(queries[0], None, None), B, CONTEXT, MODEL.D),
        sharded(P(*queries, None), B, T, MODEL.H, dtype=jnp.float32),
        sharded(P(*queries), B, T, dtype=jnp.int32),
    )

    def one_device(q, k, w, visible):
        return kernel_calls.select_hisa(mosaic_tpu, q, k, None, w, visible, **METHOD)

    f = jax.shard_map(
        one_device,
        mesh=mesh,
        in_specs=tuple(x.sharding.spec for x in operands),
        out_specs=(P(*queries, None), P(*queries), P(*queries, None)),
        check_vma=False,
    )
    return aot.compile_sharded(chip, f, mesh, *operands)


def devices(chip):
    return CHIPS[chip].pod_chips * CHIPS[chip].devices_per_chip


@pytest.mark.exhaustive  # in the gate test_pod_steps.py compiles a step of whole layers
def test_prefill_shares_sequences_and_queries(chip):
    context = CHIPS[chip].pod_chips // 16  # an axis of the mesh is whole axes of the torus
    data = devices(chip) // context
    mesh = aot.pod_mesh(chip, data=data, context=context)
    program = compiled(chip, mesh, data, context * 512, ("data", "context"))
    assert not COLLECTIVES.findall(program.compiled.as_text()), "queries and keys are where they are needed"
    memory = program.compiled.memory_analysis()
    keys, queries = CONTEXT * MODEL.D * 2, 512 * MODEL.H * (MODEL.D * 2 + 4)
    assert memory.argument_size_in_bytes < 1.3 * (keys + queries)
    assert memory.temp_size_in_bytes < keys + queries, "nothing of [T, S]"


@pytest.mark.exhaustive
def test_decode_shares_sequences(chip):
    n = devices(chip)
    mesh = aot.pod_mesh(chip, data=n, context=1)
    program = compiled(chip, mesh, 4 * n, 1, ("data", "context"))
    assert not COLLECTIVES.findall(program.compiled.as_text())
    memory = program.compiled.memory_analysis()
    keys = 4 * CONTEXT * MODEL.D * 2
    assert memory.argument_size_in_bytes < 1.3 * keys
    assert memory.temp_size_in_bytes < keys


def compiled_on_a_pod(chip, T, implementation, monkeypatch):
    """`select` of T queries a sequence over a whole pod; devices of `context` that share one's keys."""
    monkeypatch.setattr(dispatch.Device, "default", lambda: dispatch.Device(platform="tpu", kind=CHIPS[chip].kind))
    context = CHIPS[chip].pod_chips // 16
    data = devices(chip) // context
    mesh = aot.pod_mesh(chip, data=data, context=context)

    def sharded(spec, *shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    def select(q, k, w):
        axes = dict(mesh=mesh, context_axis="context", data_axis="data")
        return hj.select(q, k, w, MODEL.methods()["hisa"], **axes, implementation=implementation)

    q, k = sharded(P("data"), data, T, MODEL.H, MODEL.D), sharded(P("data", "context"), data, CONTEXT, MODEL.D)
    w = sharded(P("data"), data, T, MODEL.H, dtype=jnp.float32)
    return aot.compile_sharded(chip, select, mesh, q, k, w), context


def exchanged(program):
    """Dtype and elements of the results of each collective, on one device."""
    found = []
    for line in program.compiled.as_text().splitlines():
        if match := COLLECTIVES.search(line):
            results = re.findall(r"(\w+)\[([0-9,]+)\]", line.split(match[0])[0])
            found += [(match[1], dtype, math.prod(map(int, shape.split(",")))) for dtype, shape in results]
    assert found
    return found


def test_kernels_exchange_candidates_alone(chip, monkeypatch):
    """Keys split over `context`: what crosses the network is an sort key and a position of every candidate.

    Prefill on two generations, decode on the others; all eight compile (docs/tpu.md).
    """
    T = shapes.PREFILL.T if chip in ("v5e", "v7x") else 1
    program, context = compiled_on_a_pod(chip, T, "mosaic_tpu", monkeypatch)
    rows = -(-T // context) * context
    for _, dtype, n in exchanged(program):
        assert dtype in ("s32", "u32") and n <= rows * MODEL.topk
    text = program.compiled.as_text()
    assert all(f"hisa_{stage}" in text for stage in ("block_filter", "refine", "merge"))
    # At most the candidates, in and out, and what they are merged into: [T, S] would be 64 times one of them.
    assert program.temp_bytes < 12 * rows * MODEL.topk * 4 + (64 << 20)


@pytest.mark.exhaustive
def test_xla_exchanges_candidates_alone(monkeypatch):
    """The same without kernels."""
    chip, T = "v6e", 1
    if reason := aot.why_not():
        pytest.skip(reason)
    program, context = compiled_on_a_pod(chip, T, "xla", monkeypatch)
    for _, dtype, n in exchanged(program):
        # XLA may gather by adding up.
        assert dtype in ("s32", "u32") and n <= T * context * MODEL.topk
    keys = CONTEXT // context * MODEL.D * 2
    assert program.temp_bytes < max(32 * keys, 160 << 20), "nothing of [T, S]"


MLA = 128, 576, 512  # heads, sizes of key and value
R, PAGE = 32, 128  # requests a device, or devices that share their pages, has; tokens of a page


def paged_step(mesh, chip, monkeypatch, dtype, n, cache_spec, rows_spec, queries=1):
    """A step's operands for n times R requests of CONTEXT tokens and their queries, on a machine that has this chip."""
    monkeypatch.setattr(dispatch.Device, "default", lambda: dispatch.Device(platform="tpu", kind=CHIPS[chip].kind))

    def sharded(shape, dtype, spec):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    n_pages = CONTEXT // PAGE
    cache = jax.eval_shape(lambda: hj.init_cache(n * R * n_pages, PAGE, MODEL.D, dtype))
    cache = jax.tree.map(lambda leaf: sharded(leaf.shape, leaf.dtype, cache_spec), cache)
    q = sharded((n * R * queries, MODEL.H, MODEL.D), jnp.dtype(dtype), rows_spec)
    w = sharded((n * R * queries, MODEL.H), jnp.float32, rows_spec)
    ints = (sharded(shape, jnp.int32, rows_spec) for shape in ((n * R, n_pages), (n * (R + 1),), (n * R,)))
    return q, w, cache, *ints


@pytest.mark.parametrize(
    ("chip", "dtype"),
    [
        pytest.param("v5e", "int8", marks=pytest.mark.exhaustive),
        pytest.param("v7x", "float8_e4m3fn", marks=pytest.mark.exhaustive),
        pytest.param("v5e", "bfloat16", marks=pytest.mark.exhaustive),
        pytest.param("v7x", "bfloat16", marks=pytest.mark.exhaustive),
    ],
)
def test_decode_from_pages_shares_requests(chip, dtype, monkeypatch):
    """Each device has a server's cache of its own: 32 requests of 128K tokens, one query each."""
    if reason := aot.why_not():
        pytest.skip(reason)
    n = devices(chip)
    mesh = aot.pod_mesh(chip, data=n)
    operands = paged_step(mesh, chip, monkeypatch, dtype, n, P("data"), P("data"))
    select = functools.partial(hj.select_paged, method=MODEL.methods()["hisa"], implementation="mosaic_tpu")
    f = jax.shard_map(select, mesh=mesh, in_specs=P("data"), out_specs=P("data"), check_vma=False)
    program = aot.compile_sharded(chip, f, mesh, *operands)
    text = program.compiled.as_text()
    assert not COLLECTIVES.findall(text)
    assert all(f"hisa_{stage}" in text for stage in ("pool", "block_filter", "refine"))
    keys = R * CONTEXT * MODEL.D * jnp.dtype(dtype).itemsize
    means = R * CONTEXT // MODEL.block_size * MODEL.D * 4
    memory = program.compiled.memory_analysis()
    assert memory.argument_size_in_bytes < 1.1 * keys + 2 * means
    # The means of blocks are brought together; keys stay where they are.
    assert program.temp_bytes < 2 * means + (32 << 20)


def on_shared_pages(chip, monkeypatch, method, implementation, queries=1):
    """A step of 32 requests of 128K tokens whose pages lie on 16 devices; the rest of the pod has copies."""
    if reason := aot.why_not():
        pytest.skip(reason)
    n_context = 16
    mesh = aot.pod_mesh(chip, data=devices(chip) // n_context, context=n_context)
    operands = paged_step(mesh, chip, monkeypatch, "bfloat16", 1, P("context"), P(), queries)
    over = dict(mesh=mesh, context_axis="context", implementation=implementation)
    select = functools.partial(hj.select_paged, method=MODEL.methods()[method], **over)
    return aot.compile_sharded(chip, select, mesh, *operands)


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("chip", "method", "queries"),
    [("v5e", "hisa", 1), ("v6e", "hisa", 128), ("v5e", "dsa", 1)],
    ids=["decode", "chunks", "flat"],
)
def test_kernels_over_shared_pages_exchange_candidates_alone(chip, method, queries, monkeypatch):
    """No operand of a kernel is gathered: what crosses are int32 candidates, and the merged."""
    program = on_shared_pages(chip, monkeypatch, method, "auto", queries)
    rows, n_blocks = R * queries, MODEL.block_topk if method == "hisa" else 0
    found = exchanged(program)
    assert {dtype for _, dtype, _ in found} <= {"s32", "u32"}
    sent, merged, checked = (sum(n for kind, _, n in found if kind == k) for k in KINDS)
    assert sent == 2 * 16 * (rows // 16) * (n_blocks + MODEL.topk), found
    # Sort keys of blocks, and of tokens where no scores are asked for, stay where they are merged.
    assert merged <= 2 * rows * (n_blocks + MODEL.topk) and checked <= R, found
    stages = (
        ("hisa_block_filter", "hisa_refine", "hisa_merge") if method == "hisa" else ("dsa_select_flat", "hisa_merge")
    )
    assert all(stage in program.compiled.as_text() for stage in stages)
    keys = R * CONTEXT // 16 * MODEL.D * 2
    assert program.temp_bytes < keys + 12 * rows * MODEL.topk * 4, "the candidates, and what tiles hold"


@pytest.mark.exhaustive
def test_pages_shared_by_devices_exchange_candidates_alone(monkeypatch):
    """The same by XLA."""
    program = on_shared_pages("v5e", monkeypatch, "hisa", "xla")
    for _, dtype, n in exchanged(program):
        assert dtype in ("s32", "u32") and n <= R * MODEL.topk
    assert program.temp_bytes < R * CONTEXT // 16 * MODEL.D * 2, "the candidates, and a tile's scores"


@pytest.mark.exhaustive
@pytest.mark.parametrize(("chip", "T"), [("v5e", 32), ("v6e", 512)], ids=["decode", "chunks"])
def test_attention_over_shared_pages_exchanges_sums_alone(chip, T, monkeypatch):
    """Latents of 32 requests of 128K tokens on 16 devices, each of which attends to 256 entries at a time."""
    if reason := aot.why_not():
        pytest.skip(reason)
    monkeypatch.setattr(dispatch.Device, "default", lambda: dispatch.Device(platform="tpu", kind=CHIPS[chip].kind))
    mesh, n_pages, (N, key_dim, V) = aot.pod_mesh(chip, data=devices(chip) // 16, context=16), CONTEXT // PAGE, MLA

    def sharded(shape, dtype, *axes):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*axes)))

    cache = jax.eval_shape(lambda: hj.init_cache(R * n_pages, PAGE, 0, latent_dim=key_dim))
    cache = jax.tree.map(lambda leaf: sharded(leaf.shape, leaf.dtype, "context"), cache)
    ints = (sharded(shape, jnp.int32) for shape in ((T, MODEL.topk), (R, n_pages), (R + 1,)))
    over = dict(mesh=mesh, context_axis="context", implementation="auto", scale=0.1, value_dim=V)
    attend = functools.partial(hj.sparse_mla_paged, **over)
    program = aot.compile_sharded(chip, attend, mesh, sharded((T, N, key_dim), jnp.bfloat16), cache, *ints)
    found = exchanged(program)
    if T == R:  # one sum
        assert {(kind, dtype) for kind, dtype, _ in found} == {("all-reduce", "f32")}
        assert sum(n for *_, n in found) == T * N * (V + 2)
    else:  # each device sums an equal share of the queries
        assert {kind for kind, *_ in found} == {"all-to-all", "all-gather"}
        assert sum(n for *_, dtype, n in found if dtype == "bf16") == 2 * T * N * V
        assert sum(n for *_, dtype, n in found if dtype == "f32") <= 2 * T * N
    # Its list of entries is a part: no kernel is handed one of topk.
    text = program.compiled.as_text()
    calls = [line for line in text.splitlines() if "tpu_custom_call" in line]
    assert calls and not any(f"{MODEL.topk}]" in line for line in calls)


@pytest.mark.exhaustive
def test_ranks_share_the_queries_of_chunks_and_exchange_the_chosen(monkeypatch):
    """128 new tokens of each of 32 requests, by the kernels on 16 ranks that have the same pages."""
    chip, n_ranks = "v6e", 16
    if reason := aot.why_not():
        pytest.skip(reason)
    mesh = aot.pod_mesh(chip, data=devices(chip) // n_ranks, model=n_ranks)
    operands = paged_step(mesh, chip, monkeypatch, "bfloat16", 1, P(), P(), queries=128)
    over = dict(mesh=mesh, query_axis="model", implementation="mosaic_tpu")
    select = functools.partial(hj.select_paged, method=MODEL.methods()["hisa"], **over)
    program = aot.compile_sharded(chip, select, mesh, *operands)
    found = exchanged(program)
    assert {dtype for _, dtype, _ in found} == {"s32"} and {kind for kind, *_ in found} == {"all-gather"}
    assert sum(n for *_, n in found) == R * 128 * (MODEL.topk + 1)


@pytest.mark.parametrize("chip", CHIPS, indirect=True)
def test_pods_are_as_large_as_they_say(chip):
    assert aot.pod_mesh(chip, data=devices(chip)).size == devices(chip)
