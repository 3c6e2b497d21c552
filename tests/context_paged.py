"""Pages split over 8 emulated devices against one; run by test_context_paged.py in a process of its own.

The number of devices is fixed when JAX starts, so it cannot be set for one test among others.
"""

import contextlib
import dataclasses
import functools
import sys
import time

import jax

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_disable_most_optimizations", True)

import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from jax.experimental import checkify  # noqa: E402
from jax.sharding import NamedSharding, PartitionSpec  # noqa: E402

import hisa_jax as hj  # noqa: E402
from hisa_jax.attention import latent_rows  # noqa: E402
from hisa_jax.page_pool import PagePool  # noqa: E402
from hisa_jax.sharded import gathered, meshes  # noqa: E402
from hisa_jax.sharded.stripes import Shard  # noqa: E402
from tests import draw, isolation  # noqa: E402
from tests.collectives import collectives, elements  # noqa: E402
from tests.own_scores import FUNCTIONS  # noqa: E402

METHODS = {
    "dsa": hj.Dsa(topk=24),
    "hisa": hj.Hisa(topk=24, block_size=32, block_topk=5),
    "scan": hj.Scan(topk=24, candidates=64, exact_heads=1),
    "scan_units": hj.Scan(topk=24, candidates=64, exact_heads=0, unit=8, keep_first=2, keep_last=3, sketch="int4"),
    "hisa_ratio": hj.Hisa(topk=24, block_size=32, block_topk=36, block_ratio=2, keep_first=2, keep_last=3),
    "own": hj.Hisa(topk=24, block_size=32, block_topk=5, **FUNCTIONS),
    "all_blocks_kept": hj.Hisa(topk=24, block_size=32, block_topk=32),
    "block_sparse": hj.BlockSparse(topk=160, block_size=32),
}
PAGE, STRIPE, P, PER_DEVICE, H, D, LATENT = 16, 32, 36, 20, 4, 32, 24
# A request of nothing, one that has no block on some devices, and lengths that end within a page, block and round.
LENGTHS = {"a": 515, "b": 1, "c": 0, "d": 130, "e": 31}
# Prefill chunks, decode steps and drafts, mixed; 21 queries do not divide by any number of devices used.
NEW = {"a": 8, "b": 1, "c": 9, "d": 1, "e": 2}
MESH = jax.make_mesh((8,), ("context",))
OVER = {"mesh": MESH, "context_axis": "context"}
ROWS = 600  # of new tokens, most of them padding: one program for every append
append = jax.jit(hj.append)
append_split = jax.jit(functools.partial(hj.append, **OVER))


def split(cache, mesh=MESH, axis="context"):
    return jax.device_put(cache, NamedSharding(mesh, PartitionSpec(axis)))


def same(got, wanted):
    jax.tree.map(np.testing.assert_array_equal, got, wanted)


def keys(rng, n, dtype):
    k = rng.normal(size=(n, D)).astype(np.float32)
    return draw.quantized(k, dtype, "float32") if dtype == "float8_e4m3fn" else jnp.asarray(draw.cast(k, dtype))


def offsets(sizes):
    return jnp.asarray(np.cumsum([0, *sizes]), jnp.int32)


@functools.cache
def served(dtype="bfloat16"):
    """A cache that was written by several appends, forks, copies and truncations; the same on one device and on 8.

    Returns: cache on one device, the same split, tables, lengths, by then with NEW tokens a request.
    """
    pool, rng = PagePool(8 * PER_DEVICE, PAGE, n_devices=8, stripe=STRIPE), np.random.default_rng(0)
    sizes = dict(latent_dim=LATENT, latent_dtype="float32", sketch="int4")
    one = hj.init_cache(8 * PER_DEVICE, PAGE, D, dtype, **sizes)
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
            one, eight = hj.copy_pages(one, source, goal), hj.copy_pages(eight, source, goal, **OVER)
        k, latents = keys(rng, ROWS, dtype), jnp.asarray(rng.normal(size=(ROWS, LATENT)), jnp.float32)
        arrays = k, jnp.asarray(pool.table(names, P)), offsets(sizes), jnp.asarray(before)
        one, eight = append(one, *arrays, latents=latents), append_split(eight, *arrays, latents=latents)
        same(eight, one)
        assert eight.keys.sharding.spec == PartitionSpec("context"), eight.keys.sharding
        if "c" in target and pool.lengths["d"] > LENGTHS["d"]:
            old = jnp.asarray([pool.lengths[n] for n in names], jnp.int32)
            new = jnp.asarray([target[n] for n in names], jnp.int32)
            tables = jnp.asarray(pool.table(names, P))
            assert not pool.truncate("d", LENGTHS["d"])
            one = hj.truncate(one, tables, old, new, max_tokens=16)
            eight = hj.truncate(eight, tables, old, new, max_tokens=16, **OVER)
            same(eight, one)
    lengths = jnp.asarray([pool.lengths[n] for n in names], jnp.int32)
    return one, eight, jnp.asarray(pool.table(names, P)), lengths


@functools.cache
def laid_out(n_devices, stripe):
    """As `served`, its pages moved to where so many devices and such stripes want them: on one device, and tables."""
    one, _, tables, lengths = served()
    pool = PagePool(8 * PER_DEVICE, PAGE, n_devices=n_devices, stripe=stripe)
    for name, length in zip(LENGTHS, lengths.tolist(), strict=True):
        pool.add(name)
        pool.extend(name, length)
    moved = jnp.asarray(pool.table(list(LENGTHS), P))
    source, target = tables.reshape(-1), moved.reshape(-1)
    return hj.copy_pages(one, source, jnp.where(source >= 0, target, -1)), moved


def queries():
    q, _, w = draw.inputs(1, sum(NEW.values()), 1, H, D, dtype="bfloat16")
    return jnp.asarray(q[0]), jnp.asarray(w[0]), offsets(NEW.values())


@functools.partial(jax.jit, static_argnums=6, static_argnames=("return_scores", "return_blocks"))
def on_one_device(*arrays, **options):
    return hj.select_paged(*arrays, implementation="xla", **options)


def check(method, one, cache, tables, lengths, *, return_scores=True, **axes):
    """That `select_paged` on a mesh on `cache` gives what `select_paged` gives on `one`; returns its collectives."""
    q, w, cu = queries()
    options = dict(return_scores=return_scores, return_blocks=return_scores and method.has_blocks)
    wanted = on_one_device(q, w, one, tables, cu, lengths, method, **options)
    assert wanted.count.min() > 0
    run = jax.jit(functools.partial(hj.select_paged, method=method, **axes, **options))
    compiled = run.lower(q, w, cache, tables, cu, lengths).compile()
    same(compiled(q, w, cache, tables, cu, lengths), wanted)
    return collectives(compiled)


def pages_on_eight_devices_hold_what_one_would():
    served()


def pages_of_8_bits_hold_what_one_device_would():
    served("float8_e4m3fn")


def same_bits_for_the_scan():
    check(METHODS["scan_units"], *served(), stripe=STRIPE, **OVER)


def same_bits_for_the_other_methods():
    for name in ("dsa", "hisa_ratio", "all_blocks_kept", "block_sparse", "own", "scan"):
        check(METHODS[name], *served(), stripe=STRIPE, **OVER)


def same_bits_for_entries_heads_lists_and_budgets():
    """Pages of 16 entries of 4 tokens: 64 tokens."""
    r, rng = 4, np.random.default_rng(0)
    pool = PagePool(8 * PER_DEVICE, PAGE * r, n_devices=8, stripe=STRIPE * r)
    one = hj.init_cache(8 * PER_DEVICE, PAGE, D, jnp.bfloat16, entry_size=r)
    eight, before = split(one), np.zeros(3, np.int32)
    for name in "abc":
        pool.add(name)
    for ends in ([301, 3, 95], [1203, 7, 130]):
        for name, end in zip("abc", ends, strict=True):
            pool.extend(name, end - pool.lengths[name])
        table, sizes = jnp.asarray(pool.table("abc", 24)), np.array(ends) - before
        k = jnp.asarray(rng.normal(size=(1100, D)), jnp.bfloat16)
        one = append(one, k, table, offsets(sizes), jnp.asarray(before))
        eight = append_split(eight, k, table, offsets(sizes), jnp.asarray(before))
        same(eight, one)
        before = np.array(ends, np.int32)
    q, _, w = (jnp.asarray(x[0]) for x in draw.inputs(1, 13, 1, H, D, dtype="bfloat16"))
    cu, lengths = offsets([7, 1, 5]), jnp.asarray(before)
    lists, budget = (jnp.asarray(rng.integers(-1, 30, shape), jnp.int32) for shape in ((13, 9), (13,)))
    for method in (
        hj.Dsa(topk=12, entry_size=r, tail="open"),
        hj.BlockSparse(topk=64, block_size=32, entry_size=r, keep_first=0, scored_by="max", per_head=True),
        hj.Hisa(topk=12, block_size=32, block_topk=3, entry_size=r, tail="open", per_head=True),
    ):
        given = dict(budget=budget, return_scores=True, return_blocks=method.has_blocks)
        given |= dict(candidates=hj.CandidateBlocks(lists, 8)) if isinstance(method, hj.Dsa) else {}
        arrays = q, None if method.per_head else w
        rest = table, cu, lengths, method
        wanted = hj.select_paged(*arrays, one, *rest, **given)
        same(hj.select_paged(*arrays, eight, *rest, stripe=STRIPE * r, **given, **OVER), wanted)
        same(hj.select_paged(*arrays, one, *rest, mesh=MESH, query_axis="context", **given), wanted)


def same_bits_for_8_bits_and_for_stripes_of_two_blocks():
    check(METHODS["hisa"], *served("float8_e4m3fn"), **OVER)
    one, tables = laid_out(8, 2 * STRIPE)
    check(METHODS["hisa"], one, split(one), tables, served()[3], stripe=2 * STRIPE, **OVER)


def only_candidates_are_exchanged(name="hisa"):
    """Of a query: sort key and id of each device's best to whom merges them, the merged to all; 4 bytes a request."""
    T, method = -(-sum(NEW.values()) // 8) * 8, METHODS[name]
    found = check(method, *served(), return_scores=False, **OVER)
    assert {dtype for _, dtype, _ in found} == {"s32"}
    sent, merged, checked = (4 * elements(found, kind) for kind in ("all-to-all", "all-gather", "all-reduce"))
    assert sent + merged + checked == 4 * sum(n for *_, n in found)
    # A block-sparse selection takes its tokens from the blocks; a device has at most 3 of the blocks of a request.
    own_m, m, k = 3, method.block_topk, method.topk if name == "hisa" else 0
    assert sent == 8 * T * (own_m + k) and merged == 4 * T * (m + k) and checked == 4 * len(LENGTHS), found
    print(f"{name}: {sent // T} + {merged // T} bytes a query")


def only_blocks_are_exchanged_where_they_alone_are_chosen():
    only_candidates_are_exchanged("block_sparse")


@contextlib.contextmanager
def pages_go_to_the_queries():
    """However few these are."""
    before, gathered._MERGED = gathered._MERGED, 10**6
    try:
        yield
    finally:
        gathered._MERGED = before


def many_queries_get_the_pages():
    """The same bits by shares of the queries; no candidate is exchanged."""
    with pages_go_to_the_queries():
        found = check(METHODS["hisa"], *served(), return_scores=False, **OVER)
    assert {kind for kind, *_ in found} == {"all-gather"}, found
    # Of each request as many pages as tables have columns, in whole rounds of stripes; no latents.
    assert max(n for *_, n in found) == len(LENGTHS) * -(-P // 16) * 16 * PAGE * D, found


def many_queries_of_a_request_without_a_page_see_nothing():
    with pages_go_to_the_queries():
        a_page_that_is_lacking_or_elsewhere_costs_its_request_alone()


def many_queries_get_the_pages_of_entries_heads_lists_and_budgets():
    with pages_go_to_the_queries():
        same_bits_for_entries_heads_lists_and_budgets()


def gathered_pages_are_those_that_the_tables_name():
    """Stripes of two pages over two devices and two groups; a page on the wrong device, or none, stays missing."""
    mesh, size, stripe = jax.make_mesh((2, 2), ("data", "context"), devices=jax.devices()[:4]), 4, 8
    # Each of 2 groups has 2 requests and 2 * 6 pages: the first 6 are on its first device.
    tables = jnp.array(
        [[0, 1, 6, 7, 2, 3], [4, -1, 8, 0, 5, 99], [5, 4, 11, 10, 3, 2], [0, 1, 9, 8, 77, -5]], jnp.int32
    )
    cache = hj.init_cache(24, size, 8, jnp.int8, latent_dim=16, latent_value_dim=8)
    number = np.arange(24)[:, None, None]
    cache = dataclasses.replace(cache, keys=cache.keys + jnp.int8(number), latents=cache.latents + number)
    axes, shard = meshes.Axes(mesh, "context", "data"), Shard("context", 2, stripe, 24)
    copies, found = jax.jit(lambda cache, table: gathered.pages_of_all(cache, table, axes, shard))(cache, tables)
    for row, table in enumerate(np.asarray(tables)):
        for place, page in enumerate(table):
            is_there = 0 <= page < 12 and page // 6 == place * size // stripe % 2
            assert (found[row, place] >= 0) == is_there, (row, place)
            if is_there:
                at, wanted = row // 2 * copies.n_pages // 2 + int(found[row, place]), row // 2 * 12 + page
                assert (copies.keys[at] == wanted).all() and (copies.latents[at] == wanted).all(), (row, place)


def ranks_that_share_the_queries_select_the_same_and_exchange_the_chosen():
    """One query in 24 is padding."""
    one, _, tables, lengths = served()
    found = check(METHODS["hisa"], one, one, tables, lengths, mesh=MESH, query_axis="context", return_scores=False)
    assert {(kind, dtype) for kind, dtype, _ in found} == {("all-gather", "s32")}, found
    assert sum(n for *_, n in found) == 24 * (METHODS["hisa"].topk + 1), found


def ranks_that_share_the_queries_may_each_be_devices_that_share_the_pages(method="hisa"):
    mesh = jax.make_mesh((2, 4), ("model", "context"))
    one, tables = laid_out(4, STRIPE)
    axes = dict(mesh=mesh, query_axis="model", context_axis="context", stripe=STRIPE)
    check(METHODS[method], one, split(one, mesh), tables, served()[3], **axes)


def such_ranks_may_select_by_the_flat_indexer():
    ranks_that_share_the_queries_may_each_be_devices_that_share_the_pages("dsa")


def a_page_that_is_lacking_or_elsewhere_costs_its_request_alone():
    one, eight, tables, lengths = served()
    (q, w, cu), last = queries(), 8 * PER_DEVICE - 1
    wanted = on_one_device(q, w, one, tables, cu, lengths, METHODS["hisa"])
    run = functools.partial(hj.select_paged, method=METHODS["hisa"], **OVER)
    compiled, others = jax.jit(run), np.arange(q.shape[0]) >= NEW["a"]
    elsewhere = hj.copy_pages(one, tables[0, 3:4], jnp.array([last]))  # the same page on another device
    for page, cache in ((-1, eight), (last + 1, eight), (last, split(elsewhere))):
        got = compiled(q, w, cache, tables.at[0, 3].set(page), cu, lengths)
        assert (np.asarray(got.count)[~others] == 0).all() and (np.asarray(got.indices)[~others] == -1).all()
        same(jax.tree.map(lambda x: x[others], got), jax.tree.map(lambda x: x[others], wanted))


def a_page_that_is_lacking_is_named_by_a_checked_step():
    _, eight, tables, lengths = served()
    q, w, cu = queries()
    run = functools.partial(hj.select_paged, method=METHODS["hisa"], **OVER)

    def step(cache):
        """What a server does, under `checked`: errors of one call must pass through the next."""
        cache = append_split(cache, keys(rng, ROWS, "bfloat16"), tables, cu * 0, lengths, latents=latents)
        return run(q, w, cache, tables.at[0, 3].set(-1), cu, lengths)

    rng, latents = np.random.default_rng(1), jnp.zeros((ROWS, LATENT))
    with raises("select_paged: block_tables lacks pages of requests [ True False"):
        hj.checked(step)(eight)


def what_others_hold_leaves_no_trace():
    """NaN and infinity in other requests' pages, unused ones and past a request's tokens, on all devices."""
    select = functools.partial(hj.select_paged, **OVER)
    for name, dtype in (("hisa", "bfloat16"), ("dsa", "float8_e4m3fn")):
        run = jax.jit(select, static_argnames=("method", "return_scores", "return_blocks"))
        call = isolation.paged(
            run, METHODS[name], dtype, page_size=PAGE, n_devices=8, stripe=PAGE if name == "dsa" else STRIPE
        )
        isolation.assert_isolated(call, METHODS[name])


def writing_exchanges_nothing():
    _, eight, tables, lengths = served()
    k, latents = keys(np.random.default_rng(1), ROWS, "bfloat16"), jnp.zeros((ROWS, LATENT))
    written = append_split.lower(eight, k, tables, jnp.arange(6), lengths, latents=latents)
    assert not collectives(written.compile())


def a_copy_stays_on_its_device():
    """From every page to every page, each with a number of its own in all that it holds."""
    n, own = 16, 2  # pages of all devices and of one
    empty, pages = hj.init_cache(n, 4, 8, "float8_e4m3fn", sketch="int4", latent_dim=8), np.arange(n)
    cache = jax.tree.map(
        lambda x: jnp.broadcast_to(pages.reshape(-1, *[1] * (x.ndim - 1)), x.shape).astype(x.dtype), empty
    )
    cache, copy = split(cache), jax.jit(functools.partial(hj.copy_pages, **OVER))
    for shift in range(n):
        target = (pages + shift) % n
        content = pages.copy()
        stays = pages // own == target // own
        content[target[stays]] = pages[stays]
        for leaf in jax.tree.leaves(copy(cache, jnp.array(pages, jnp.int32), jnp.array(target, jnp.int32))):
            of_page = np.asarray(leaf, np.float32).reshape(n, -1)
            np.testing.assert_array_equal(of_page, np.broadcast_to(content[:, None], of_page.shape))
    same(copy(cache, jnp.array([3, 5]), jnp.array([-1, n])), cache)
    with raises("target is [2] for source [1], wanted pages of one device, 2 in a row"):
        hj.checked(hj.copy_pages)(cache, jnp.array([1]), jnp.array([2]), **OVER)


def sparse_mla_over_pages_is_that_of_one_device_and_exchanges_one_sum():
    one, eight, tables, lengths = served()
    q, w, cu = queries()
    indices = on_one_device(q, w, one, tables, cu, lengths, METHODS["hisa"]).indices
    indices = indices.at[0].set(-1).at[1, 1:].set(-1)  # of nothing, and of one token
    N, V = 3, 16
    q = jnp.asarray(np.random.default_rng(2).normal(size=(q.shape[0], N, LATENT)), jnp.float32)
    options = dict(value_dim=V, scale=0.2, return_lse=True, sink=jnp.linspace(-1, 1, N, dtype=jnp.float32))
    run = jax.jit(functools.partial(hj.sparse_mla_paged, **OVER, **options))
    compiled = run.lower(q, eight, indices, tables, cu).compile()
    wanted = hj.sparse_mla_paged(q, one, indices, tables, cu, **options)
    got = compiled(q, eight, indices, tables, cu)
    for x, y in zip(got, wanted, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)
    rows = np.asarray(latent_rows(one, indices, tables, cu))
    others = np.setdiff1d(np.arange(one.n_pages * PAGE), rows)
    latents = one.latents.reshape(-1, LATENT).at[others].set(jnp.nan).reshape(one.latents.shape)
    poisoned = split(dataclasses.replace(one, latents=latents))
    assert len(others) > 2000 and np.isfinite(got[0]).all()
    same(compiled(q, poisoned, indices, tables, cu), got)
    found = collectives(compiled)
    assert {kind for kind, *_ in found} == {"all-reduce"}
    assert sum(n for *_, n in found) == N * (V + 2) * q.shape[0], found


def groups_serve_each_as_one_device(n_groups=2):
    """Each of ranks that share queries and heads, and devices that share pages; returns what is exchanged."""
    over = dict(data_axis="data", context_axis="context")
    devices = jax.devices()[: 4 * n_groups]
    mesh = jax.make_mesh((n_groups, 2, 2), ("data", "model", "context"), devices=devices)
    one, tables = laid_out(2, STRIPE)
    (q, w, cu), lengths, rng, N, V = queries(), served()[3], np.random.default_rng(3), 4, 16
    k, latents = keys(rng, 700, "bfloat16"), jnp.asarray(rng.normal(size=(700, LATENT)), jnp.float32)
    table, own = tables[::-1], lengths[::-1]
    other = append(jax.tree.map(jnp.zeros_like, one), k, table, offsets(own), own * 0, latents=latents)
    groups = (q, w, one, tables, cu, lengths), (q[::-1], w, other, table, offsets([*NEW.values()][::-1]), own)
    groups = groups[:n_groups]
    select = functools.partial(hj.select_paged, method=METHODS["hisa"], return_scores=True, return_blocks=True)
    attend = functools.partial(hj.sparse_mla_paged, value_dim=V, scale=0.2)

    def step(q, w, cache, tables, offsets, lengths, new, sizes, source, target, **axes):
        """Selects, attends, copies a page, forgets tokens, and appends others."""
        shares = dict(query_axis="model", stripe=STRIPE) if axes else {}
        selection = select(q, w, cache, tables, offsets, lengths, **axes, **shares)
        heads = jnp.tile(q[:, :1, :LATENT].astype(jnp.float32), (1, N, 1)) * jnp.arange(1, N + 1)[None, :, None]
        shares = dict(head_axis="model") if axes else {}
        out = attend(heads, cache, selection.indices, tables, offsets, **axes, **shares)
        cache = hj.copy_pages(cache, source, target, **axes)
        cache = hj.truncate(cache, tables, lengths, jnp.maximum(lengths - 3, 0), max_tokens=3, **axes)
        cache = hj.append(cache, new, tables, sizes, jnp.maximum(lengths - 3, 0), latents=heads[:, 0], **axes)
        return selection, out, cache

    run, new = jax.jit(step, static_argnames=("mesh", *over)), keys(rng, q.shape[0], "bfloat16")
    more = new, offsets([2, 0, 3, 4, 1]), tables[:1, 2], table[-1:, -1]
    wanted = jax.tree.map(lambda *x: jnp.concatenate(x), *(run(*group, *more) for group in groups))
    arrays = [
        jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *each)
        for each in zip(*((*group, *more) for group in groups), strict=True)
    ]
    arrays = [split(x, mesh, ("data", "context") if i == 2 else "data") for i, x in enumerate(arrays)]
    compiled = run.lower(*arrays, mesh=mesh, **over).compile()
    got = compiled(*arrays)
    same((got[0], got[2]), (wanted[0], wanted[2]))
    np.testing.assert_allclose(got[1], wanted[1], rtol=1e-5, atol=1e-6)
    return sorted(collectives(compiled))


def groups_exchange_no_more_than_one():
    assert groups_serve_each_as_one_device(1) == groups_serve_each_as_one_device(2)


@contextlib.contextmanager
def raises(message):
    try:
        yield
    except checkify.JaxRuntimeError as error:
        assert message in str(error), error
    else:
        raise AssertionError(f"no error: {message}")


if __name__ == "__main__":
    for promise in sys.argv[1:]:
        start = time.perf_counter()
        globals()[promise]()
        print(f"kept: {promise} ({time.perf_counter() - start:.1f} s)", flush=True)
