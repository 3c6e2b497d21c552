"""`select_paged` by kernels, interpreted, where emulated devices share the pages of each request, against XLA on one.

Run by tests/tpu/test_shared_pages.py and tests/gpu/test_shared_pages.py: `python -m tests.shared_pages BACKEND
PROMISE ...`. The number of devices is fixed when JAX starts, so it cannot be set for one test among others.
"""

import dataclasses
import functools
import importlib
import os
import sys
import time
import types

# While one device is interpreted the others wait for it in an exchange, on two cores for minutes.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_cpu_collective_call_terminate_timeout_seconds=900"

import jax

jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_disable_most_optimizations", True)  # what is interpreted is compiled first, which takes longest

import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from jax.experimental.pallas import tpu as pltpu  # noqa: E402

import hisa_jax as hj  # noqa: E402
from hisa_jax import dispatch  # noqa: E402
from hisa_jax.page_pool import PagePool  # noqa: E402
from hisa_jax.sharded import select_kernels  # noqa: E402
from tests import draw, isolation  # noqa: E402
from tests.collectives import collectives  # noqa: E402

PAGE, BLOCK, H, D = 32, 64, 16, 64
METHODS = {
    "dsa": hj.Dsa(topk=40),
    "hisa": hj.Hisa(topk=40, block_size=BLOCK, block_topk=3),
    "more_forced": hj.Hisa(topk=150, block_size=BLOCK, block_topk=5, keep_first=2, keep_last=2),
    "all_blocks_kept": hj.Hisa(topk=40, block_size=BLOCK, block_topk=16),
    "block_sparse": hj.BlockSparse(topk=4 * BLOCK, block_size=BLOCK),
}
# A request of nothing, one that lies on one device alone, ends within a page; prefill, drafts and decoding, mixed.
LENGTHS, NEW = (600, 0, 21, 450), (9, 0, 1, 2)
# The interpreter of Mosaic GPU knows one device: tests/gpu/test_select_shard.py has its stages beside Triton's.
INTERPRET = {"mosaic_tpu": pltpu.InterpretParams(uninitialized_memory="nan"), "triton": True}


def both_branches(predicate, if_true, if_false):
    """`lax.cond` for interpreted TPU kernels: each waits for all devices, so all must run the same ones."""
    return jax.tree.map(functools.partial(jnp.where, predicate), if_true(), if_false())


def interpreted(backend):
    """The kernels where no device is asked for."""
    if backend == "mosaic_tpu":
        own = types.SimpleNamespace(**(vars(jax.lax) | {"cond": both_branches}))
        for name in ("hisa_jax.kernels_pallas.mosaic_tpu.select", "hisa_jax.sharded.select_kernels"):
            importlib.import_module(name).lax = own
    run = functools.partial(
        select_kernels.select_shard, lambda: dispatch.backend(backend), interpret=INTERPRET[backend]
    )
    known = dispatch.IMPLEMENTATIONS[backend]
    return dataclasses.replace(known, why_not=lambda device, problem: None, select_shard=run)


@functools.cache
def served(n_devices, stripe, dtype, most):
    """Queries, weights, a cache, tables, offsets and lengths, of whole numbers up to `most`, whose sums are exact."""
    rng, T, N = np.random.default_rng(0), sum(NEW) + 1, sum(LENGTHS)  # the last row of queries is padding
    q, k, w = (rng.integers(-most, most + 1, shape) for shape in ((T, H, D), (N, D), (T, H)))
    pool = PagePool(n_devices * 24, PAGE, n_devices=n_devices, stripe=stripe)
    for r, length in enumerate(LENGTHS):
        pool.add(r)
        pool.extend(r, length)
    tables, starts = jnp.asarray(pool.table(range(len(LENGTHS)), 21)), [0] * len(LENGTHS)
    k = jnp.asarray(k, jnp.float32).astype(dtype)
    if k.dtype.itemsize == 1:
        k = hj.QuantizedKeys(k, jnp.asarray(2.0 ** rng.integers(-1, 2, N), jnp.float32))
    cache = hj.init_cache(pool.n_pages, PAGE, D, dtype)
    cache = hj.append(cache, k, tables, offsets(LENGTHS), jnp.asarray(starts, jnp.int32))
    q = jnp.asarray(q, jnp.float32).astype(dtype)
    return q, jnp.asarray(w, jnp.float32), cache, tables, offsets(NEW), jnp.asarray(LENGTHS, jnp.int32)


def offsets(sizes):
    return jnp.asarray(np.cumsum([0, *sizes]), jnp.int32)


def check(backend, name, n_devices=2, stripe=BLOCK, dtype="bfloat16", most=1, **axes):
    """That the selection on so many devices is that of one by XLA; returns the compiled program."""
    method, arrays = METHODS[name], served(n_devices, stripe, dtype, most)
    options = dict(return_scores=True, return_blocks=method.has_blocks)
    wanted = hj.select_paged(*arrays, method, implementation="xla", **options)
    mesh = jax.make_mesh((n_devices,), ("context",), devices=jax.devices()[:n_devices])
    axes = dict(mesh=mesh, context_axis="context", stripe=stripe) | axes
    run = jax.jit(functools.partial(hj.select_paged, method=method, implementation=backend, **axes, **options))
    compiled = run.lower(*arrays).compile()
    jax.tree.map(np.testing.assert_array_equal, compiled(*arrays), wanted)
    assert wanted.count.max() > method.topk - BLOCK and wanted.count[-1] == 0
    return compiled


def hisa_over_two_devices(backend):
    """Scores that tie everywhere, so that many cuts go through a tie."""
    check(backend, "hisa")


def flat_over_four_devices(backend):
    """Some devices have no token of some requests; scores seldom tie."""
    check(backend, "dsa", 4, PAGE, most=4)


def hisa_over_four_devices(backend):
    check(backend, "hisa", 4)
    check(backend, "more_forced", 4)


def stripes_of_two_blocks_and_8_bits(backend):
    check(backend, "hisa", 2, 2 * BLOCK, "float8_e4m3fn")
    check(backend, "dsa", 2, 2 * BLOCK, "float8_e4m3fn")


def the_other_methods(backend):
    check(backend, "all_blocks_kept")
    check(backend, "block_sparse")


def candidates_alone_are_exchanged(backend):
    """Of a query: sort key and id of each device's best to whom merges them, and the merged to all; on GPUs to all."""
    method, T = METHODS["hisa"], sum(NEW) + 1
    found = collectives(check(backend, "hisa"))
    assert {dtype for _, dtype, _ in found} == {"s32"}, found
    # Sort keys and ids both ways: scores are asked for, and forced blocks are known to all.
    own_m, m, k = 3, method.block_topk - 2, method.topk
    if dispatch.backend(backend).select_shard.most_to_all:
        assert "all-to-all" not in {kind for kind, *_ in found}, found
        assert sum(n for kind, _, n in found if kind == "all-gather") == 2 * 2 * T * (own_m + k), found
        return
    T = -(-T // 2) * 2
    assert sum(n for kind, _, n in found if kind == "all-to-all") == 2 * T * (own_m + k), found
    assert sum(n for kind, _, n in found if kind == "all-gather") <= 2 * T * (m + k), found


def what_others_hold_leaves_no_trace(backend):
    """NaN and infinity in other requests' pages, unused ones and past a request's tokens, on all devices."""
    mesh = jax.make_mesh((2,), ("context",), devices=jax.devices()[:2])
    for name in ("hisa", "dsa"):
        select = functools.partial(
            hj.select_paged, mesh=mesh, context_axis="context", stripe=BLOCK, implementation=backend
        )
        run = jax.jit(select, static_argnames=("method", "return_scores", "return_blocks"))
        call = isolation.paged(run, METHODS[name], "bfloat16", page_size=PAGE, n_devices=2, stripe=BLOCK)
        isolation.assert_isolated(call, METHODS[name])


def keys_in_one_piece(backend):
    """A batch, whose keys each device has a run of: the same stages, by this backend."""
    q, k, w = (jnp.asarray(draw.cast(x, "bfloat16")) for x in draw.few_scores(2, 5, 512, H, D))
    w, lengths = w.astype(jnp.float32), jnp.array([500, 201], jnp.int32)
    positions = jnp.array([[-1, 0, 64, 300, 499], [3, 127, 128, 199, 200]], jnp.int32)
    mesh = jax.make_mesh((2,), ("context",), devices=jax.devices()[:2])
    for name in ("hisa", "dsa"):
        options = dict(return_scores=True, return_blocks=METHODS[name].has_blocks)
        run = functools.partial(
            hj.select, q, k, w, METHODS[name], query_positions=positions, lengths=lengths, **options
        )
        got = run(mesh=mesh, context_axis="context", implementation=backend)
        jax.tree.map(np.testing.assert_array_equal, got, run(implementation="xla"))


if __name__ == "__main__":
    backend = sys.argv[1]
    dispatch.IMPLEMENTATIONS[backend] = interpreted(backend)
    for promise in sys.argv[2:]:
        start = time.perf_counter()
        globals()[promise](backend)
        print(f"kept: {promise} ({time.perf_counter() - start:.1f} s)", flush=True)
