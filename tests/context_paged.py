"""Pages split over 8 emulated devices against one; run by test_context_paged.py in a process of its own.

The number of devices is fixed when JAX starts, so it cannot be set for one test among others.
"""

import functools
import math
import re

import jax

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_disable_most_optimizations", True)

import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from jax.sharding import NamedSharding, PartitionSpec  # noqa: E402

import hisa_jax as hj  # noqa: E402
from hisa_jax.pages import PagePool  # noqa: E402
from tests import draw  # noqa: E402

METHODS = {
    "dsa": hj.Dsa(topk=24),
    "hisa": hj.Hisa(topk=24, block_size=32, block_topk=5),
    "hisa_more_forced": hj.Hisa(topk=24, block_size=32, block_topk=6, keep_first=2, keep_last=3),
    "all_blocks_kept": hj.Hisa(topk=24, block_size=32, block_topk=32),
    "block_sparse": hj.BlockSparse(topk=160, block_size=32),
}
PAGE, STRIPE, P, PER_DEVICE, H, D, LATENT = 16, 32, 36, 20, 4, 32, 24
# A request of nothing, one that has no block on some devices, and lengths that end within a page, block and round.
LENGTHS = {"a": 515, "b": 1, "c": 0, "d": 130, "e": 31}
# Prefill chunks, decode steps and drafts, mixed; 21 queries do not divide by any number of devices used.
NEW = {"a": 8, "b": 1, "c": 9, "d": 1, "e": 2}
MESH = jax.make_mesh((8,), ("context",))


def split(cache, mesh=MESH, axis="context"):
    return jax.device_put(cache, NamedSharding(mesh, PartitionSpec(axis)))


def over(function, mesh=MESH, **axes):
    return functools.partial(function, mesh=mesh, **(axes or {"context_axis": "context"}))


def same(got, wanted):
    jax.tree.map(np.testing.assert_array_equal, got, wanted)


def keys(rng, n, dtype):
    k = rng.normal(size=(n, D)).astype(np.float32)
    return draw.quantized(k, dtype, "float32") if dtype == "float8_e4m3fn" else jnp.asarray(draw.cast(k, dtype))


def offsets(sizes):
    return jnp.asarray(np.cumsum([0, *sizes]), jnp.int32)


def collectives(function, *arrays):
    """[(kind, dtype, shape)] of what crosses between devices in the compiled program."""
    found = []
    for line in jax.jit(function).lower(*arrays).compile().as_text().splitlines():
        if match := re.search(r"(all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(-start)?\(", line):
            results = re.findall(r"(\w+)\[([0-9,]*)\]", line.split(match[0])[0])
            found += [(match[1], dtype, [int(n) for n in shape.split(",") if n]) for dtype, shape in results]
    return found


@functools.cache
def served(dtype="bfloat16", stripe=STRIPE):
    """A cache that was written by several appends, forks, copies and truncations; the same on one device and on 8.

    Returns: cache on one device, the same split, tables, lengths, by then with NEW tokens a request.
    """
    pool, rng = PagePool(8 * PER_DEVICE, PAGE, n_devices=8, stripe=stripe), np.random.default_rng(0)
    one = hj.init_cache(8 * PER_DEVICE, PAGE, D, dtype, latent_dim=LATENT, latent_dtype="float32")
    eight, names = split(one), list(LENGTHS)
    for name in names:
        if name != "e":
            pool.add(name)
    pool.extend("a", 60)
    pool.fork("a", "e", 21)  # its second page is shared in part: the next append to it copies
    for target in ({"a": 300, "b": 1, "d": 140, "e": 31}, LENGTHS, {n: LENGTHS[n] + NEW[n] for n in names}):
        before = np.array([0 if n == "a" and pool.lengths[n] == 60 else pool.lengths[n] for n in names], np.int32)
        sizes = [max(target.get(n, 0) - m, 0) for n, m in zip(names, before, strict=True)]
        copies = []
        for name in names:
            copies += pool.extend(name, max(target.get(name, 0) - pool.lengths[name], 0))
        pool.check()
        if copies:
            source, goal = (jnp.array(x, jnp.int32) for x in zip(*copies, strict=True))
            one, eight = hj.copy_pages(one, source, goal), over(hj.copy_pages_sharded)(eight, source, goal)
        k, latents = keys(rng, sum(sizes), dtype), jnp.asarray(rng.normal(size=(sum(sizes), LATENT)), jnp.float32)
        arrays = k, jnp.asarray(pool.table(names, P)), offsets(sizes), jnp.asarray(before)
        one = hj.append(one, *arrays, latents=latents)
        eight = over(hj.append_sharded)(eight, *arrays, latents=latents)
        same(eight, one)
        assert eight.keys.sharding.spec == PartitionSpec("context"), eight.keys.sharding
        if "c" in target and pool.lengths["d"] > LENGTHS["d"]:
            old = jnp.asarray([pool.lengths[n] for n in names], jnp.int32)
            new = jnp.asarray([target[n] for n in names], jnp.int32)
            tables = jnp.asarray(pool.table(names, P))
            assert not pool.truncate("d", LENGTHS["d"])
            one = hj.truncate(one, tables, old, new, max_tokens=16)
            eight = over(hj.truncate_sharded)(eight, tables, old, new, max_tokens=16)
            same(eight, one)
    lengths = jnp.asarray([pool.lengths[n] for n in names], jnp.int32)
    return one, eight, jnp.asarray(pool.table(names, P)), lengths


def queries(dtype="bfloat16"):
    q, _, w = draw.inputs(1, sum(NEW.values()), 1, H, D, dtype=dtype)
    return jnp.asarray(q[0]), jnp.asarray(w[0]), offsets(NEW.values())


def check(method, run, dtype="bfloat16", cache=None, stripe=STRIPE, **options):
    one, eight, tables, lengths = served(dtype, stripe)
    q, w, cu = queries("float32" if dtype == "float32" else "bfloat16")
    options = dict(return_scores=True, return_blocks=method.has_blocks) | options
    wanted = hj.select_paged(q, w, one, tables, cu, lengths, method, implementation="xla", **options)
    assert wanted.count.min() > 0
    stripes = {"stripe": stripe} if "context_axis" in run.keywords else {}
    same(run(q, w, eight if cache is None else cache, tables, cu, lengths, method, **stripes, **options), wanted)


def pages_on_eight_devices_hold_what_one_would():
    for dtype in ("bfloat16", "float8_e4m3fn"):
        served(dtype)


def same_bits_for_every_method():
    for method in METHODS.values():
        check(method, over(hj.select_paged_sharded))


def same_bits_for_stripes_of_two_blocks_without_scores_and_for_8_bits():
    check(METHODS["hisa"], over(hj.select_paged_sharded), stripe=2 * STRIPE)
    check(METHODS["block_sparse"], over(hj.select_paged_sharded), return_scores=False, return_blocks=False)
    check(METHODS["hisa"], over(hj.select_paged_sharded), "float8_e4m3fn")


def same_bits_where_ranks_share_the_queries():
    mesh = jax.make_mesh((2, 4), ("model", "context"))
    one, *_ = served()
    check(METHODS["hisa"], over(hj.select_paged_sharded, query_axis="context"), cache=one)
    check(METHODS["dsa"], over(hj.select_paged_sharded, mesh, query_axis="context"), cache=one)
    # Both: 8 devices in a row are 4 by 2 of them, dealt out by 8 but split by 4 of twice the pages.
    four, tables, lengths = spread_over_four(mesh)
    q, w, cu = queries()
    for method in (METHODS["hisa"], METHODS["dsa"]):
        wanted = hj.select_paged(q, w, four, tables, cu, lengths, method, return_scores=True)
        run = over(hj.select_paged_sharded, mesh, query_axis="model", context_axis="context", stripe=STRIPE)
        same(run(q, w, split(four, mesh), tables, cu, lengths, method, return_scores=True), wanted)


def spread_over_four(mesh):
    """The pages of `served`, moved to where four devices want them."""
    one, _, tables, lengths = served()
    pool = PagePool(8 * PER_DEVICE, PAGE, n_devices=4, stripe=STRIPE)
    for name, length in zip(LENGTHS, lengths.tolist(), strict=True):
        pool.add(name)
        pool.extend(name, length)
    moved = jnp.asarray(pool.table(list(LENGTHS), P))
    source, target = tables.reshape(-1), moved.reshape(-1)
    return hj.copy_pages(one, source, jnp.where(source >= 0, target, -1)), moved, lengths


def a_page_that_is_lacking_or_elsewhere_costs_its_request_alone():
    one, eight, tables, lengths = served()
    q, w, cu = queries()
    wanted = hj.select_paged(q, w, one, tables, cu, lengths, METHODS["hisa"])
    run = over(hj.select_paged_sharded)
    others = np.arange(q.shape[0]) >= 8
    elsewhere = hj.copy_pages(one, tables[0, 3:4], jnp.array([8 * PER_DEVICE - 1]))  # the same page on another device
    for page, cache in ((-1, eight), (8 * PER_DEVICE, eight), (8 * PER_DEVICE - 1, split(elsewhere))):
        arrays = q, w, cache, tables.at[0, 3].set(page), cu, lengths, METHODS["hisa"]
        got = run(*arrays)
        assert (np.asarray(got.count)[~others] == 0).all() and (np.asarray(got.indices)[~others] == -1).all()
        same(jax.tree.map(lambda x: x[others], got), jax.tree.map(lambda x: x[others], wanted))
        try:
            hj.checked(run)(*arrays)
        except Exception as error:
            assert "select_paged_sharded: block_tables lacks pages of requests [ True False" in str(error), error
        else:
            raise AssertionError("no error")


def writing_exchanges_nothing_and_a_copy_stays_on_its_device():
    _, eight, tables, lengths = served()
    k, latents = keys(np.random.default_rng(1), 5, "bfloat16"), jnp.zeros((5, LATENT))
    found = collectives(
        lambda cache, k, latents: over(hj.append_sharded)(cache, k, tables, jnp.arange(6), lengths, latents=latents),
        eight, k, latents,
    )  # fmt: skip
    assert not found, found
    same(over(hj.copy_pages_sharded)(eight, jnp.array([0]), jnp.array([PER_DEVICE])), eight)
    try:
        hj.checked(over(hj.copy_pages_sharded))(eight, jnp.array([0]), jnp.array([PER_DEVICE]))
    except Exception as error:
        assert f"target is [{PER_DEVICE}] for source [0], wanted pages of one device, {PER_DEVICE} in a row" in str(
            error
        )
    else:
        raise AssertionError("no error")


def only_candidates_are_exchanged():
    """Of a query: image and id of each device's best to whom merges them, the merged to all; 4 bytes a request."""
    method, (_, eight, tables, lengths) = METHODS["hisa"], served()
    q, w, cu = queries()
    T = -(-q.shape[0] // 8) * 8
    found = collectives(
        lambda q, w, cache: over(hj.select_paged_sharded)(q, w, cache, tables, cu, lengths, method), q, w, eight
    )
    assert {dtype for _, dtype, _ in found} == {"s32"}
    sent, merged, checked = (
        4 * sum(math.prod(shape) for kind, _, shape in found if kind == name)
        for name in ("all-to-all", "all-gather", "all-reduce")
    )
    m, k = method.block_topk, method.topk
    assert sent == 8 * T * (m + k) and merged == 4 * T * (m + k) and checked == 4 * len(LENGTHS), found
    print(f"{sent // T} + {merged // T} bytes a query")


def ranks_that_share_the_queries_exchange_the_chosen():
    one, _, tables, lengths = served()
    q, w, cu = queries()
    T, run = -(-q.shape[0] // 8) * 8, over(hj.select_paged_sharded, query_axis="context")
    found = collectives(lambda q, w, cache: run(q, w, cache, tables, cu, lengths, METHODS["hisa"]), q, w, one)
    assert {(kind, dtype) for kind, dtype, _ in found} == {("all-gather", "s32")}, found
    assert sum(math.prod(shape) for *_, shape in found) == T * (METHODS["hisa"].topk + 1), found


def sparse_mla_over_pages_is_that_of_one_device_and_exchanges_one_sum():
    one, eight, tables, lengths = served()
    q, w, cu = queries()
    selection = hj.select_paged(q, w, one, tables, cu, lengths, METHODS["hisa"])
    indices = selection.indices.at[0].set(-1).at[1, 1:].set(-1)  # of nothing, and of one token
    N, V = 3, 16
    q = jnp.asarray(np.random.default_rng(2).normal(size=(q.shape[0], N, LATENT)), jnp.float32)
    options = dict(value_dim=V, scale=0.2, return_lse=True, sink=jnp.linspace(-1, 1, N, dtype=jnp.float32))
    run = lambda q, cache: over(hj.sparse_mla_paged_sharded)(q, cache, indices, tables, cu, **options)  # noqa: E731
    wanted = hj.sparse_mla_paged(q, one, indices, tables, cu, **options)
    for x, y in zip(run(q, eight), wanted, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)
    found = collectives(run, q, eight)
    assert {kind for kind, *_ in found} == {"all-reduce"}
    assert 4 * sum(math.prod(shape) for *_, shape in found) == 4 * N * (V + 2) * q.shape[0], found


if __name__ == "__main__":
    for promise in (
        pages_on_eight_devices_hold_what_one_would,
        same_bits_for_every_method,
        same_bits_for_stripes_of_two_blocks_without_scores_and_for_8_bits,
        same_bits_where_ranks_share_the_queries,
        a_page_that_is_lacking_or_elsewhere_costs_its_request_alone,
        writing_exchanges_nothing_and_a_copy_stays_on_its_device,
        only_candidates_are_exchanged,
        ranks_that_share_the_queries_exchange_the_chosen,
        sparse_mla_over_pages_is_that_of_one_device_and_exchanges_one_sum,
    ):
        promise()
        print("kept:", promise.__name__, flush=True)
