"""Keys and pages over the processes of `jax.distributed`; test_processes.py starts each of them in this module."""

import functools
import os
import re
import sys

import jax

jax.config.update("jax_num_cpu_devices", 1)
jax.config.update("jax_disable_most_optimizations", True)

import numpy as np  # noqa: E402
from jax.sharding import NamedSharding, PartitionSpec  # noqa: E402

import hisa_jax as hj  # noqa: E402
from hisa_jax.page_pool import PagePool  # noqa: E402
from tests import draw  # noqa: E402

HEARTBEAT_TIMEOUT_S = 10
METHODS = {
    "dsa": hj.Dsa(topk=24),
    "hisa": hj.Hisa(topk=24, block_size=16, block_topk=3),
    "block_sparse": hj.BlockSparse(topk=64, block_size=16),
}
B, T, S, H, D = 1, 5, 256, 4, 32


def mesh():
    return jax.make_mesh((jax.process_count(),), ("context",))


def globally(x, *axes):
    """One array over all processes, of which each gives its part."""
    return jax.make_array_from_callback(x.shape, NamedSharding(mesh(), PartitionSpec(*axes)), lambda at: x[at])


def inputs():
    """Global arrays, and the same on this process."""
    q, k, w = (np.asarray(x) for x in draw.inputs(B, T, S, H, D))
    return (globally(q), globally(k, None, "context"), globally(w)), (q, k, w)


def select(arrays, method):
    def call(q, k, w):
        return hj.select(q, k, w, method, mesh=mesh(), context_axis="context", return_scores=True)

    return jax.jit(call)(*arrays)


def selections_are_those_of_one_device():
    arrays, here = inputs()
    hj.check_processes("select", **dict(zip("qkw", arrays, strict=True)))
    for name, method in METHODS.items():
        got = select(arrays, method)
        if jax.process_index() == 0:
            wanted = hj.select(*here, method, implementation="xla", return_scores=True)
            jax.tree.map(lambda x, y: np.testing.assert_array_equal(x.addressable_data(0), y), got, wanted)
        print("kept:", name, flush=True)


def sparse_mla_is_that_of_one_device_and_exchanges_one_sum():
    rng, N, Dk, V = np.random.default_rng(1), 3, 24, 16
    q, kv = (rng.normal(size=size).astype(np.float32) for size in ((B, T, N, Dk), (B, S, Dk)))
    indices = np.stack([rng.choice(S, 12, replace=False) for _ in range(B * T)]).reshape(B, T, 12).astype(np.int32)
    indices[:, 0], indices[:, 1, 1:] = -1, -1  # of nothing, and of one token
    options = dict(value_dim=V, scale=0.2, return_lse=True, sink=np.linspace(-1, 1, N, dtype=np.float32))

    def call(q, kv, indices):
        return hj.sparse_mla(q, kv, indices, mesh=mesh(), context_axis="context", **options)

    arrays = globally(q), globally(kv, None, "context"), globally(indices)
    compiled = jax.jit(call).lower(*arrays).compile()
    got, wanted = compiled(*arrays), hj.sparse_mla(q, kv, indices, **options)
    for x, y in zip(got, wanted, strict=True):
        np.testing.assert_allclose(x.addressable_data(0), y, rtol=1e-5, atol=1e-6)
    for b in range(B):
        kv[b, np.setdiff1d(np.arange(S), indices[b])] = np.nan
    poisoned = compiled(arrays[0], globally(kv, None, "context"), arrays[2])
    for x, y in zip(poisoned, got, strict=True):
        np.testing.assert_array_equal(x.addressable_data(0), y.addressable_data(0))
    text = compiled.as_text()
    assert not re.search(r"(all-gather|all-to-all|collective-permute)(-start)?\(", text)
    reduced = re.findall(r"= f32\[([0-9,]*)\][^=]*? all-reduce(?:-start)?\(", text)
    bytes_per_query = sum(4 * np.prod(list(map(int, shape.split(",")))) for shape in reduced) // (B * T)
    assert bytes_per_query == 4 * N * (V + 2), (bytes_per_query, reduced)
    print("merged:", bytes_per_query, "bytes a query", flush=True)


def pages_on_all_processes_serve_as_on_one():
    n, page, length, lengths = jax.process_count(), 16, 150, np.array([145], np.int32)
    pool, method = PagePool(16 * n, page, n_devices=n, stripe=16), METHODS["hisa"]
    pool.add("a")
    pool.extend("a", length)
    (_, _, _), (q, k, w) = inputs()
    arrays = (
        k[0, :length],
        q[0],
        w[0],
        pool.table(["a"], 12),
        np.array([0, length], np.int32),
        np.array([0, T], np.int32),
    )
    axes = dict(mesh=mesh(), context_axis="context")

    def step(append, select, cache, k, q, w, tables, offsets, own, before, **axes):
        cache = append(cache, k, tables, offsets, before * 0, **axes)
        return select(q, w, cache, tables, own, before + T, method, return_scores=True, **axes)

    empty = functools.partial(hj.init_cache, 16 * n, page, D, "float32")
    cache = jax.jit(empty, out_shardings=NamedSharding(mesh(), PartitionSpec("context")))()
    run = jax.jit(functools.partial(step, hj.append, hj.select_paged, **axes))
    got = run(cache, *map(globally, (*arrays, lengths)))
    if jax.process_index() == 0:
        wanted = jax.jit(functools.partial(step, hj.append, hj.select_paged))(empty(), *arrays, lengths)
        jax.tree.map(lambda x, y: np.testing.assert_array_equal(x.addressable_data(0), y), got, wanted)
    print("paged", flush=True)


def shapes_that_disagree_are_an_error_on_all():
    k = np.zeros((B, S + 16 * jax.process_index(), D), np.float32)
    try:
        hj.check_processes("step", k=k)
    except ValueError as error:
        print("refused:", error, flush=True)


def a_process_that_dies_ends_the_others():
    arrays, _ = inputs()
    if jax.process_index() == 1:
        os._exit(3)
    jax.block_until_ready(select(arrays, METHODS["hisa"]))


if __name__ == "__main__":
    port, n, i, *promises = sys.argv[1:]
    jax.distributed.initialize(
        f"localhost:{port}", int(n), int(i), initialization_timeout=60, heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT_S
    )
    for promise in promises:
        globals()[promise]()
