"""A scan of keys that emulated devices share, by interpreted kernels of Triton, against the oracle and one device.

Run by tests/gpu/test_shared_scan.py: `python -m tests.shared_scan PROMISE ...`; see tests/shared_pages.py.
"""

import dataclasses
import functools
import sys
import time

# First, since it says how many devices there are.
from tests import shared_pages  # isort: skip
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import hisa_jax as hj
from hisa_jax import dispatch
from hisa_jax.kernels_pallas import scan, triton
from hisa_jax.kernels_pallas.indexer import of_tokens
from hisa_jax.kernels_pallas.scan_samples import of_all_devices
from hisa_jax.layout import Call, Keys
from hisa_jax.sharded.communicator import Communicator
from hisa_jax.sharded.stripes import Shard
from tests import draw, isolation, oracle
from tests.collectives import collectives
from tests.shared_pages import BLOCK, LENGTHS, NEW, PAGE, offsets

METHOD = hj.Scan(topk=40, candidates=80, exact_heads=2)
S, H, D = 768, 16, 64
# Queries of two sequences, some of which see nothing of one device's keys, and padding.
POSITIONS = np.array([[767, 766, 300, 128, 127], [79, 500, 0, -1, 383]], np.int32)


scans = []  # what was scanned, by traced calls


def short_lists():
    """128 tokens, and every fourth key is sampled; no queries are few."""
    best_of_share = scan.best_of_share

    def traced(*arguments):
        scans.append(arguments)
        return best_of_share(*arguments)

    scan.best_of_share = traced
    scan.FEW, scan._LISTED, scan._RANK, scan._DEVIATIONS = 0, 128, 16, 1
    ask = scan.ask_of(METHOD, S)
    assert ask.most == 128 and ask.step == 4 and 64 * METHOD.block_topk < S // 2 * H


def mesh_of(n):
    return jax.make_mesh((n,), ("context",), (AxisType.Auto,), devices=jax.devices()[:n])


def keys_of(k, dtype):
    """Keys of a dtype; e4m3 with scales."""
    k = jnp.asarray(draw.cast(k, dtype))
    scales = 2.0 ** np.random.default_rng(3).integers(-1, 2, k.shape[:-1])
    return k if dtype == "bfloat16" else hj.QuantizedKeys(k, jnp.asarray(scales, jnp.float32))


def check(q, k, w, dtype="bfloat16", method=METHOD, n=2, tolerance=1e-4, positions=POSITIONS, most_to_all=None):
    """That a batch on so many devices keeps the contract; returns what it selects."""
    arrays = jnp.asarray(draw.cast(q, dtype)), keys_of(k, dtype), jnp.asarray(w)
    lengths = np.array([S, S - 100], np.int32)
    options = dict(query_positions=positions, lengths=lengths)
    run = jax.jit(
        functools.partial(
            hj.select, method=method, mesh=mesh_of(n), context_axis="context", implementation="triton",
            return_scores=True,
        )
    )  # fmt: skip
    got = run(*arrays, **jax.tree.map(jnp.asarray, options))
    reference = oracle.select(*arrays, method, **options)
    oracle.assert_same_selection(got.indices, got.count, reference, tolerance, scores=got.scores, may_keep_more=True)
    return got


def normal():
    return draw.inputs(2, 5, S, H, D)


def rows_of_keys(sampled, others):
    """Keys that score by their place: the first feature is high where a sample is, or where none is."""
    q, k, w = (np.zeros_like(x) for x in normal())
    q[..., 0], w[..., 0] = 1, 1
    k[..., 0] = np.where(np.arange(S) % 4 == 0, sampled, others)
    k[..., 0] += np.random.default_rng(0).integers(0, 50, k.shape[:2])
    return q, k, w


def a_batch_over_two_devices():
    """All queries at once, and some at a time."""
    check(*normal(), "float8_e4m3fn")
    at_a_time, scan.queries_at_a_time = scan.queries_at_a_time, lambda *_: 4
    check(*normal())
    scan.queries_at_a_time = at_a_time


def each_device_finds_thresholds_for_a_share():
    """As of many queries: samples go to whom looks for their threshold, and candidates to whom merges them."""
    found, local = [], dataclasses.replace(triton.select_shard, most_to_all=0)
    for shard in (local, triton.select_shard):
        dispatch.backend("triton").select_shard = shard
        found.append(check(*normal(), method=dataclasses.replace(METHOD, topk=41)))  # compiled anew
        jax.clear_caches()
    jax.tree.map(np.testing.assert_array_equal, *found)


def the_best_keys_on_one_device():
    """All candidates are the first device's; and one has none."""
    q, k, w = rows_of_keys(1, 1)
    k[:, S // 2 :, 0] -= 900
    w = np.abs(w)
    check(q, k, w, tolerance=0.0)


def misleading_samples():
    for period in ((200, 1), (1, 200)):
        check(*rows_of_keys(*period), tolerance=0.0)


def ties_beyond_the_room():
    """Of all tokens, then of all but a few better ones: the first win, also those of another device."""
    q, k, w = draw.few_scores(2, 5, S, H, D)
    positions = np.full_like(POSITIONS, 667)
    got = check(q, np.broadcast_to(k[:, :1], k.shape), w, positions=positions)
    np.testing.assert_array_equal(got.indices, np.broadcast_to(np.arange(40), got.indices.shape))
    q, k, w = rows_of_keys(1, 1)
    k[..., 0] = 1
    k[:, [50, 99, 433, 600, 660]] = 9
    got = check(q, k, w, positions=positions, tolerance=0.0)
    np.testing.assert_array_equal(got.indices[0, -1], [*range(35), 50, 99, 433, 600, 660])


def other_methods():
    """Heads without samples; none exact; so many exact that all are: the flat indexer."""
    for options in (dict(slopes="plain", exact_heads=14), dict(exact_heads=0, keep_first=0, keep_last=3)):
        check(*normal(), method=hj.Scan(topk=40, candidates=80, **options))
    check(*normal(), method=hj.Scan(topk=40, candidates=80, exact_heads=H))


def heads_are_those_of_one_device():
    """Bit by bit; sequences have a set of samples for each distance of samples."""
    compare_heads(9)


def heads_of_few_queries_are_those_of_one_device():
    """Queries have a set of samples each."""
    compare_heads(3)


def compare_heads(T):
    shard = Shard(axis="context", n_devices=2, stripe=S // 2, max_keys=S)

    def call_of(q, k, scales, w, visible):
        return Call(q=q, w=w, visible=visible, k=Keys(k, scales), lengths=jnp.full(q.shape[:1], S, jnp.int32))

    def on_two(*arrays):
        call, tokens = call_of(*arrays), shard.stripes()
        seen = call.queries.visible
        flat = of_tokens(dataclasses.replace(call, visible=tokens.before(call.visible)))
        samples = of_all_devices(flat, seen, Communicator("context", tokens, 0))
        return triton.stages.scan_heads(dataclasses.replace(flat, visible=seen), METHOD, True, samples)

    q, k, w = draw.inputs(2, T, S, H, D)
    k = keys_of(k, "float8_e4m3fn")
    visible = np.random.default_rng(T).integers(0, S + 1, (2, T)).astype(np.int32)
    visible[0, :3] = S, 0, 256
    arrays = jnp.asarray(draw.cast(q, "float8_e4m3fn")), k.values, k.scales, jnp.asarray(w), jnp.asarray(visible)
    specs = P(), P(None, "context"), P(None, "context"), P(), P()
    two = jax.shard_map(on_two, mesh=mesh_of(2), in_specs=specs, out_specs=P(), check_vma=False)
    wanted = jax.jit(lambda *arrays: triton.stages.scan_heads(of_tokens(call_of(*arrays)), METHOD, True))(*arrays)
    got = jax.tree.map(functools.partial(np.asarray, dtype=np.float32), jax.jit(two)(*arrays))
    jax.tree.map(np.testing.assert_array_equal, got, jax.tree.map(lambda x: x.astype(jnp.float32), wanted))


def pages_and_sketches():
    """Stripes of requests in pages; scans of keys and of the sketches that pages keep."""
    for n, method in ((2, METHOD), (2, dataclasses.replace(METHOD, sketch="int4"))):
        arrays = q, w, _, tables, cu_q, lengths = served(n, BLOCK, method.sketch)
        run = jax.jit(
            functools.partial(
                hj.select_paged, method=method, mesh=mesh_of(n), context_axis="context", stripe=BLOCK,
                implementation="triton",
            )
        )  # fmt: skip
        got = run(*arrays[:3], tables, cu_q, lengths)
        reference = oracle.select_packed(q, keys(LENGTHS), w, cu_q, np.cumsum([0, *LENGTHS]), method)
        oracle.assert_same_selection(got.indices, got.count, reference, 1e-4, may_keep_more=True)


@functools.cache
def keys(lengths):
    return keys_of(np.random.default_rng(1).normal(size=(sum(lengths), D)), "float8_e4m3fn")


def served(n, stripe, sketch):
    """Requests of `shared_pages`, of normal numbers."""
    _, _, cache, tables, cu_q, lengths = shared_pages.served(n, stripe, "float8_e4m3fn", 1)
    cache = hj.init_cache(cache.n_pages, PAGE, D, jnp.float8_e4m3fn, sketch=sketch)
    cache = hj.append(cache, keys(LENGTHS), tables, offsets(LENGTHS), jnp.zeros(len(LENGTHS), jnp.int32))
    q, _, w = draw.inputs(1, sum(NEW) + 1, 1, H, D)
    return jnp.asarray(draw.cast(q[0], "float8_e4m3fn")), jnp.asarray(w[0]), cache, tables, cu_q, lengths


def what_others_hold_leaves_no_trace():
    select = functools.partial(
        hj.select_paged, mesh=mesh_of(2), context_axis="context", stripe=BLOCK, implementation="triton"
    )
    run = jax.jit(select, static_argnames=("method", "return_scores", "return_blocks"))
    options = dict(page_size=PAGE, n_devices=2, stripe=BLOCK, lengths=(800, 770, 790, 33))
    isolation.assert_isolated(isolation.paged(run, METHOD, "bfloat16", **options), METHOD)


def few_queries_are_the_flat_indexers():
    """Where scans of few queries are: one exchange, of candidates."""
    scan.FEW = 132
    q, k, w = (jnp.asarray(x, jnp.bfloat16) for x in normal())
    options = dict(mesh=mesh_of(2), context_axis="context", implementation="triton")
    run = jax.jit(functools.partial(hj.select, method=METHOD, **options))
    compiled = run.lower(q, k, w.astype(jnp.float32)).compile()
    wanted = hj.select(q, k, w.astype(jnp.float32), hj.Dsa(topk=40), implementation="xla")
    np.testing.assert_array_equal(compiled(q, k, w.astype(jnp.float32)).indices, wanted.indices)
    assert {kind for kind, *_ in collectives(compiled)} == {"all-gather"}
    scan.FEW = 0


if __name__ == "__main__":
    dispatch.IMPLEMENTATIONS["triton"] = shared_pages.interpreted("triton")
    short_lists()
    for promise in sys.argv[1:]:
        start, before = time.perf_counter(), len(scans)
        globals()[promise]()
        assert "heads" in promise or promise.startswith("few") or len(scans) > before
        print(f"kept: {promise} ({time.perf_counter() - start:.1f} s)", flush=True)
