"""`select` on 8 emulated devices against one; run by test_context.py in a process of its own, a part of the promises.

The number of devices is fixed when JAX starts, so it cannot be set for one test among others.
"""

import functools
import inspect
import re
import sys
import time

import jax

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_disable_most_optimizations", True)

import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

import hisa_jax as hj  # noqa: E402
from hisa_jax.sharded import gathered  # noqa: E402
from tests import draw, isolation  # noqa: E402
from tests.collectives import collectives, elements  # noqa: E402
from tests.own_scores import FUNCTIONS  # noqa: E402

METHODS = {
    "dsa": hj.Dsa(topk=24),
    "hisa": hj.Hisa(topk=24, block_size=16, block_topk=5),
    "scan": hj.Scan(topk=24, candidates=64, exact_heads=1),
    "scan_units": hj.Scan(topk=24, candidates=64, exact_heads=0, unit=8, keep_first=2, keep_last=3),
    "hisa_ratio": hj.Hisa(topk=24, block_size=16, block_topk=48, block_ratio=4, keep_first=2, keep_last=3),
    "own": hj.Hisa(topk=24, block_size=16, block_topk=5, **FUNCTIONS),
    "all_blocks_kept": hj.Hisa(topk=24, block_size=16, block_topk=32),
    "block_sparse": hj.BlockSparse(topk=64, block_size=16),
}
B, T, S, H, D = 2, 11, 512, 4, 32
LAST = np.broadcast_to(np.arange(S - T, S, dtype=np.int32), (B, T))


def mesh(data, context):
    return jax.make_mesh((data, context), ("data", "context"), devices=jax.devices()[: data * context])


def inputs(dtype):
    q, k, w = draw.inputs(B, T, S, H, D, dtype="bfloat16" if dtype == "float8_e4m3fn" else dtype)
    keys = draw.quantized(k, dtype, "float32") if dtype == "float8_e4m3fn" else jnp.asarray(k)
    return jnp.asarray(q), keys, jnp.asarray(w)


@functools.cache
def compiled(method, data, context, **options):
    """`select` on one device and `select` on data x context of them; (q, k, w, lengths, positions) -> ..."""

    def call(select, q, k, w, lengths, query_positions):
        return select(q, k, w, method, lengths=lengths, query_positions=query_positions, **options)

    axes = dict(mesh=mesh(data, context), context_axis="context", data_axis="data")
    one = functools.partial(hj.select, implementation="xla")
    return [jax.jit(functools.partial(call, f)) for f in (one, functools.partial(hj.select, **axes))]


def check(method, data, context, dtype="float32", lengths=(S, S), query_positions=LAST, return_scores=True):
    one, sharded = compiled(
        method, data, context, return_scores=return_scores, return_blocks=return_scores and method.has_blocks
    )
    arrays = *inputs(dtype), jnp.array(lengths, jnp.int32), query_positions
    jax.tree.map(np.testing.assert_array_equal, sharded(*arrays), one(*arrays))
    return functools.partial(sharded.lower, *arrays)


# Which are in the gate, each on a mesh; the others take the same ways or, from pages, are in context_paged.py.
SOME = {"hisa_ratio": (2, 4)}
OTHERS = {name: (1, 8) for name in METHODS if SOME.get(name) != (1, 8)}


def same_bits_for_lengths_that_end_on_any_device(meshes):
    positions = jnp.asarray(np.stack([np.arange(-1, 10) * 50, np.arange(11) * 7]).astype(np.int32))
    for name, mesh in meshes.items():
        check(METHODS[name], *mesh)
        for lengths in ([512, 65], [1, 0], [63, 64]):
            check(METHODS[name], *mesh, lengths=lengths, query_positions=positions)


def same_bits_for_some_methods():
    same_bits_for_lengths_that_end_on_any_device(SOME)


def same_bits_for_the_other_methods():
    same_bits_for_lengths_that_end_on_any_device(OTHERS)


def same_bits_without_scores_for_8_bits():
    check(METHODS["block_sparse"], 1, 8, "float8_e4m3fn", return_scores=False)


def same_bits_for_other_dtypes():
    for dtype in ("bfloat16", "float8_e4m3fn"):
        check(METHODS["hisa"], 2, 4, dtype)
    check(METHODS["block_sparse"], 1, 8, "bfloat16", return_scores=False)


def what_other_devices_hold_leaves_no_trace(name="hisa", dtype="float8_e4m3fn"):
    """Some devices, and part of one, hold only NaN or infinity of a sequence, and all do of the other."""
    select = functools.partial(hj.select, mesh=mesh(1, 8), context_axis="context", data_axis="data")
    method = METHODS[name]
    run = jax.jit(select, static_argnames=("method", "return_scores", "return_blocks"))
    isolation.assert_isolated(isolation.batch(run, method, dtype, S=S), method)


def what_other_devices_hold_leaves_no_trace_in_the_flat_indexer():
    what_other_devices_hold_leaves_no_trace("dsa", "bfloat16")


def same_bits_for_entries_heads_lists_and_budgets():
    rng = np.random.default_rng(0)
    q, keys, w = inputs("float32")
    lists = jnp.asarray(rng.integers(-1, 64, (B, T, 9)), jnp.int32)
    budget = jnp.asarray(rng.integers(0, 30, (B, T)), jnp.int32)
    axes = dict(mesh=mesh(2, 4), context_axis="context", data_axis="data")
    for method in (
        hj.Dsa(topk=12, entry_size=4, tail="open"),
        hj.BlockSparse(topk=64, block_size=16, keep_first=0, scored_by="max", activation=None, per_head=True),
        hj.Hisa(topk=12, block_size=16, block_topk=3, entry_size=16, tail="open", per_head=True),
        hj.Scan(topk=12, candidates=64, exact_heads=1, unit=8, entry_size=8, returns="entries"),
    ):
        given = dict(lengths=jnp.array([S * method.entry_size - 1, 70 * method.entry_size], jnp.int32), budget=budget)
        given |= dict(candidates=hj.CandidateBlocks(lists, 8)) if isinstance(method, hj.Dsa) else {}
        options = dict(method=method, return_scores=True, return_blocks=method.has_blocks)
        weights = None if method.per_head else w
        wanted = jax.jit(functools.partial(hj.select, **options))(q, keys, weights, **given)
        got = jax.jit(functools.partial(hj.select, **options, **axes))(q, keys, weights, **given)
        jax.tree.map(np.testing.assert_array_equal, got, wanted)


def only_candidates_are_exchanged():
    """Of a query: sort key and id of each device's best to whom merges them, and the merged to all."""
    method, n_queries = METHODS["hisa"], 24  # 22 in equal shares
    found = collectives(check(method, 1, 8, "bfloat16", return_scores=False)().compile())
    assert {dtype for _, dtype, _ in found} == {"s32"}, found
    sent, merged = (4 * elements(found, kind) for kind in ("all-to-all", "all-gather"))
    assert sent + merged == 4 * sum(n for *_, n in found), found
    # A device has 4 blocks of a sequence.
    assert sent == 8 * n_queries * (4 + method.topk) and merged == 4 * n_queries * (method.block_topk + method.topk)
    print(f"{sent // n_queries} + {merged // n_queries} bytes a query")


def many_queries_get_the_keys(name="hisa", dtype="float8_e4m3fn"):
    """The same bits by shares of the queries. Keys and results go to all devices, and nothing else."""
    method, n, (q, keys, w) = METHODS[name], 6 * T + 1, inputs(dtype)
    q, w = (jnp.concatenate([x] * 7, axis=1)[:, :n] for x in (q, w))
    assert gathered.of_keys(gathered.nbytes(keys), q, method)
    assert not gathered.of_keys(gathered.nbytes(keys), q[:, :T], method)
    one, sharded = compiled(method, 2, 4)
    positions = np.stack([np.arange(n) * 7 - 1, np.arange(n)[::-1] * 3]).astype(np.int32)
    arrays = q, keys, w, jnp.array([S, 131], jnp.int32), positions
    jax.tree.map(np.testing.assert_array_equal, sharded(*arrays), one(*arrays))
    found = collectives(sharded.lower(*arrays).compile())
    assert {kind for kind, *_ in found} == {"all-gather"}, found
    n_keys, n_found = S * D, (n + 1) * (method.topk + 1)  # of one of two sequences a device; a list, and its length
    assert max(n for *_, n in found) == n_keys, found
    assert sum(n for _, dtype, n in found if dtype == "s32") == n_found, found


def many_queries_of_other_methods_get_the_keys():
    many_queries_get_the_keys("dsa", "bfloat16")
    many_queries_get_the_keys("scan_units")
    before, gathered._MERGED = gathered._MERGED, 10**6  # however few these are
    same_bits_for_entries_heads_lists_and_budgets()
    gathered._MERGED = before


def latents_go_to_many_queries_and_gradients_come_back():
    """29 queries over 4 devices, in 2 groups."""
    rng, axes = np.random.default_rng(0), dict(mesh=mesh(2, 4), context_axis="context", data_axis="data")
    q, kv = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((2, 29, 4, 24), (2, 64, 24)))
    indices = jnp.asarray(rng.integers(-1, 64, (2, 29, 9)), jnp.int32)
    assert gathered.of_latents(kv.nbytes, 4 * 2 * 29 * 4 * 16)

    def loss(q, kv, **axes):
        out, lse = hj.sparse_mla(q, kv, indices, value_dim=16, scale=0.2, return_lse=True, **axes)
        return jnp.sum(out**2) + jnp.sum(jnp.sin(lse)), (out, lse)

    gradients = [jax.jit(jax.grad(functools.partial(loss, **x), (0, 1), has_aux=True)) for x in ({}, axes)]
    wanted, got = (f(q, kv) for f in gradients)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), got, wanted)
    attend = jax.jit(functools.partial(hj.sparse_mla, value_dim=16, scale=0.2, **axes))
    found = collectives(attend.lower(q, kv, indices).compile())
    assert sorted((kind, n) for kind, _, n in found) == [("all-gather", 64 * 24), ("all-gather", 32 * 4 * 16)], found


def what_is_on_all_devices_gets_the_gradient_of_all():
    """In `jax.shard_map` over queries, its checks on, with latents that do not vary: outside and inside."""
    rng = np.random.default_rng(0)
    devices = jax.make_mesh((2,), ("data",), devices=jax.devices()[:2], axis_types=(jax.sharding.AxisType.Auto,))
    q, kv = (jnp.asarray(rng.normal(size=(n, 9, *heads, 8)), jnp.float32) for n, heads in ((2, (2,)), (1, ())))
    indices, split, whole = jnp.asarray(rng.integers(0, 9, (2, 9, 5)), jnp.int32), jax.P("data"), jax.P()

    def loss(q, kv, indices):
        return jnp.sum(hj.sparse_mla(q, kv, indices, scale=0.3, value_dim=6) ** 2)

    def of_all(q, kv, indices):
        return jax.lax.psum(loss(q, kv, indices), "data")

    specs = dict(mesh=devices, in_specs=(split, whole, split))
    outside = jax.grad(jax.shard_map(of_all, **specs, out_specs=whole), (0, 1))
    inside = jax.shard_map(jax.grad(of_all, (0, 1)), **specs, out_specs=(split, whole))
    want = jax.grad(loss, (0, 1))(q, jnp.broadcast_to(kv, (2, 9, 8)), indices)
    for gradient in (outside, inside):
        d_q, d_kv = jax.jit(gradient)(q, kv, indices)
        np.testing.assert_allclose(d_q, want[0], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(d_kv[0], want[1].sum(0), rtol=1e-5, atol=1e-6)


def lighthouse(n_data, n_context, dtype="float32", T=256, heads=(4, 2), features=(8, 4), **settings):
    """Selection, output and gradients of a mesh are those of one device, bit for bit."""
    method = hj.Lighthouse(**dict(levels=3, pool=2, topk=32, tile=4) | settings)
    rng = np.random.default_rng(0)
    (H, G), (D, V) = heads, features
    shapes = ((H, D), (G, D), (G, V), (H, V))
    q, k, v, d = (jnp.asarray(rng.normal(size=(2, T, *shape)), dtype) for shape in shapes)

    def call(q, k, v, d, **axes):
        attention = functools.partial(hj.lighthouse_attention, method=method, rope_theta=1e4, **axes)
        out, pull = jax.vjp(attention, q, k, v)
        return hj.lighthouse_select(q, k, method, v=v, **axes), out, pull(d)

    axes = dict(mesh=mesh(n_data, n_context), context_axis="context", data_axis="data")
    wanted, got = (jax.jit(functools.partial(call, **x))(q, k, v, d) for x in ({}, axes))
    jax.tree.map(np.testing.assert_array_equal, got, wanted)


def lighthouse_has_the_bits_of_one_device():
    lighthouse(1, 8)


def lighthouse_has_them_for_any_number_of_devices():
    for n in (1, 2, 4):
        lighthouse(1, n)
    lighthouse(2, 4, prefix="release", rope="before")
    lighthouse(1, 4, "bfloat16")


def lighthouse_has_them_for_any_shape():
    """Where XLA, left alone, sums windows of 8 and products of several heads in another order on a mesh."""
    lighthouse(1, 4, heads=(3, 3), features=(6, 5), levels=4, topk=16)
    lighthouse(1, 4, heads=(8, 4), features=(64, 64), T=2048, topk=256, tile=32)


def lighthouse_has_them_by_the_dilated_scorer():
    """Its attention is over all tokens: by heads, of which the last of four devices has none."""
    lighthouse(1, 4, heads=(6, 3), scorer="dilated")
    lighthouse(2, 2, "bfloat16", scorer="dilated")


def lighthouse_selects_the_same_where_jax_splits_it():
    """Arrays that lie on several devices, and a call without `mesh=`."""
    method = hj.Lighthouse(levels=3, pool=2, topk=32, tile=4)
    q, k = (jax.random.normal(jax.random.key(heads), (1, 256, heads, 8)) for heads in (4, 2))
    wanted = hj.lighthouse_select(q, k, method)
    devices = jax.make_mesh((4,), ("c",), devices=jax.devices()[:4], axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.sharding.NamedSharding(devices, jax.P(None, "c"))
    jax.tree.map(np.testing.assert_array_equal, hj.lighthouse_select(*jax.device_put((q, k), split), method), wanted)


def arrays_on_other_devices_are_refused():
    q, k, w = inputs("float32")
    axes = dict(mesh=mesh(1, 8), context_axis="context")
    for name, where in (("q", jax.devices()[3]), ("k", jax.NamedSharding(mesh(1, 4), jax.P(None, "context")))):
        arrays = dict(q=q, k=k, w=w)
        arrays[name] = jax.device_put(arrays[name], where)
        try:
            hj.select(**arrays, method=METHODS["dsa"], **axes)
        except ValueError as error:
            assert f"select: {name} is on the devices" in str(error), error
        else:
            raise AssertionError("nothing was raised")
        jax.eval_shape(lambda arrays=arrays: hj.select(**arrays, method=METHODS["dsa"], **axes))


def arrays_on_the_devices_in_another_order_are_refused():
    """Each array argument of every public function with `mesh=`: where arrays lie is asked before anything else."""
    devices = mesh(1, 8).devices
    backwards = jax.NamedSharding(jax.sharding.Mesh(devices[:, ::-1], ("data", "context")), jax.P("context"))
    moved = jax.device_put(jnp.zeros((8, 8)), backwards)
    said = "is on the devices [7, 6, 5, 4, 3, 2, 1, 0], wanted them in the order of the mesh, [0, 1, 2, 3, 4, 5, 6, 7]"
    functions = [function for name in hj.__all__ if inspect.isfunction(function := getattr(hj, name))]
    n_functions = 0
    for function in functions:
        parameters = inspect.signature(function).parameters
        if "mesh" not in parameters:
            continue
        n_functions += 1
        needed = {name: None for name, parameter in parameters.items() if parameter.default is parameter.empty}
        arrays = [name for name, x in parameters.items() if re.search("Array|IndexCache|Selection", str(x.annotation))]
        assert len(arrays) >= 3, function
        for name in arrays:
            try:
                function(**needed | {name: moved}, mesh=mesh(1, 8), context_axis="context")
            except ValueError as error:
                assert str(error) == f"{function.__name__}: {name} {said}", error
            else:
                raise AssertionError("nothing was raised")
    assert n_functions >= 9


PARTS = {
    "some": (
        arrays_on_other_devices_are_refused,
        arrays_on_the_devices_in_another_order_are_refused,
        lighthouse_has_the_bits_of_one_device,
        same_bits_for_some_methods,
        what_other_devices_hold_leaves_no_trace,
        only_candidates_are_exchanged,
        many_queries_get_the_keys,
        latents_go_to_many_queries_and_gradients_come_back,
        what_is_on_all_devices_gets_the_gradient_of_all,
    ),
    "others": (
        lighthouse_has_them_for_any_number_of_devices,
        lighthouse_has_them_for_any_shape,
        lighthouse_has_them_by_the_dilated_scorer,
        lighthouse_selects_the_same_where_jax_splits_it,
        same_bits_for_the_other_methods,
        same_bits_for_entries_heads_lists_and_budgets,
        same_bits_for_other_dtypes,
        same_bits_without_scores_for_8_bits,
        many_queries_of_other_methods_get_the_keys,
        what_other_devices_hold_leaves_no_trace_in_the_flat_indexer,
    ),
}

if __name__ == "__main__":
    for promise in PARTS[sys.argv[1]]:
        start = time.perf_counter()
        promise()
        print(f"kept: {promise.__name__} ({time.perf_counter() - start:.1f} s)", flush=True)
