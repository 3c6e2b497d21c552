"""Pages split over devices: tests/context_paged.py on 8 emulated ones, one of them, and what is refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hisa_jax as hj
from hisa_jax.page_pool import OutOfPages, PagePool
from hisa_jax.sharded.stripes import Stripes
from tests import emulated

# What they promise; not imported from there, since that module configures JAX.
PROMISES = {
    "copies": ("a_copy_stays_on_its_device", "gathered_pages_are_those_that_the_tables_name"),
    "selection": (
        "pages_on_eight_devices_hold_what_one_would",
        "same_bits_for_the_scan",
        "only_candidates_are_exchanged",
        "many_queries_get_the_pages",
        "writing_exchanges_nothing",
        "sparse_mla_over_pages_is_that_of_one_device_and_exchanges_one_sum",
        "a_page_that_is_lacking_or_elsewhere_costs_its_request_alone",
    ),
    "others": (
        "same_bits_for_the_other_methods",
        "only_blocks_are_exchanged_where_they_alone_are_chosen",
        "a_page_that_is_lacking_is_named_by_a_checked_step",
        "many_queries_of_a_request_without_a_page_see_nothing",
        "many_queries_get_the_pages_of_entries_heads_lists_and_budgets",
        "same_bits_for_entries_heads_lists_and_budgets",
        "ranks_that_share_the_queries_may_each_be_devices_that_share_the_pages",
        "such_ranks_may_select_by_the_flat_indexer",
    ),
    "layouts": (
        "what_others_hold_leaves_no_trace",
        "pages_of_8_bits_hold_what_one_device_would",
        "same_bits_for_8_bits_and_for_stripes_of_two_blocks",
    ),
    "groups": (
        "groups_serve_each_as_one_device",
        "ranks_that_share_the_queries_select_the_same_and_exchange_the_chosen",
    ),
    "groups_exchange": ("groups_exchange_no_more_than_one",),
}


@pytest.mark.slow
@pytest.mark.gate("copies", "selection")  # an engine on a mesh has groups
@pytest.mark.parametrize("promises", PROMISES)
def test_pages_on_eight_devices_serve_as_on_one(promises):
    emulated.assert_kept("tests.context_paged", *PROMISES[promises], n=len(PROMISES[promises]))


def test_every_place_is_one_devices_and_is_found_among_its_own():
    places = jnp.arange(200)
    for size, n_devices in ((1, 1), (1, 2), (16, 3)):
        owners = []
        for device in range(n_devices):
            stripes = Stripes(size, n_devices, jnp.int32(device))
            own = [place for place in range(200) if place // size % n_devices == device]
            owners.append(stripes.owns(places))
            assert places[owners[-1]].tolist() == own
            assert stripes.own(jnp.array(own)).tolist() == list(range(len(own)))
            assert stripes.place(jnp.arange(-1, len(own))).tolist() == [-1, *own]
            assert stripes.before(places).tolist() == [sum(x < end for x in own) for end in range(200)]
            columns = stripes.columns(places[None])[0]
            assert columns[: len(own)].tolist() == own and (columns[len(own) :] == -1).all()
        assert (np.sum(owners, axis=0) == 1).all()


def served(**options):
    """A request of 75 tokens on a mesh of one device; a call of `select_paged` on a mesh on it."""
    cache, table = hj.init_cache(8, 16, 32, jnp.float32), jnp.array([[3, 0, 7, 1, 2, -1]], jnp.int32)
    mesh = jax.make_mesh((1,), ("context",))
    options = dict(mesh=mesh, context_axis="context") | options
    k = jax.random.normal(jax.random.key(0), (75, 32))
    cache = hj.append(cache, k, table, jnp.array([0, 75]), jnp.array([0]), mesh=mesh, context_axis="context")
    q, w = jax.random.normal(jax.random.key(1), (3, 4, 32)), jax.random.normal(jax.random.key(2), (3, 4))
    arrays = q, w, cache, table, jnp.array([0, 3]), jnp.array([75])
    method = options.pop("method", hj.Hisa(topk=16, block_size=32, block_topk=2))
    return hj.select_paged(*arrays, method, **options), hj.select_paged(*arrays, method)


@pytest.mark.parametrize("axes", [{}, {"query_axis": "context", "context_axis": None}])
def test_a_mesh_may_be_one_device(axes):
    got, wanted = served(**axes)
    jax.tree.map(np.testing.assert_array_equal, got, wanted)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            dict(context_axis="x"),
            r"select_paged: context_axis='x', wanted one of the mesh's axes \('context',\)",
        ),
        (dict(query_axis="x"), "select_paged: query_axis='x', wanted one of"),
        (dict(context_axis=None), "mesh= without context_axis or query_axis or data_axis, wanted one of its axes"),
        (dict(query_axis="context"), "query_axis='context', data_axis=None, wanted different axes"),
        (dict(data_axis="x"), "data_axis='x', wanted one of"),
        (dict(stripe=48), "select_paged: stripe=48, wanted a multiple of 32, of whole blocks"),
        (dict(method=hj.Dsa(topk=4), stripe=24), "stripe=24, wanted a multiple of 16"),
        (dict(method=hj.Hisa(topk=4, block_size=24, block_topk=2)), "with pages of 16 tokens, wanted a block_size"),
    ],
)
def test_what_cannot_be_split_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        served(**options)


def test_pages_that_devices_do_not_share_equally_are_refused():
    mesh = jax.sharding.AbstractMesh((3,), ("context",))
    cache, table = hj.init_cache(8, 16, 32), jnp.array([[0]], jnp.int32)
    over = dict(mesh=mesh, context_axis="context")
    lengths = jnp.array([0])
    for call in (
        functools.partial(hj.append, cache, jnp.ones((1, 32), jnp.bfloat16), table, jnp.array([0, 1]), lengths),
        functools.partial(hj.truncate, cache, table, lengths, lengths, max_tokens=1),
        functools.partial(hj.copy_pages, cache, lengths, lengths),
    ):
        with pytest.raises(ValueError, match="the cache's n_pages = 8, wanted a multiple of 3 for context_axis"):
            call(**over)


def test_arrays_that_groups_do_not_share_equally_are_refused():
    mesh = jax.sharding.AbstractMesh((2, 3), ("data", "context"))
    cache, one = hj.init_cache(12, 16, 32), jnp.array([[0]], jnp.int32)
    over = dict(mesh=mesh, data_axis="data")
    k, lengths, starts = jnp.ones((2, 32), jnp.bfloat16), jnp.array([0, 0]), jnp.array([0, 1, 0, 1])
    with pytest.raises(
        ValueError, match=r"append: block_tables is \[1, 1\], wanted a multiple of 2 first for data_axis"
    ):
        hj.append(cache, k, one, starts, lengths, **over)
    with pytest.raises(ValueError, match=r"cu_seqlens is \[2\], wanted \[4\]: a start for each .* end of each group"):
        hj.append(cache, k, jnp.concatenate([one, one]), starts[:2], lengths, **over)
    with pytest.raises(ValueError, match="n_pages = 10, wanted a multiple of 6 for context_axis='context'"):
        hj.copy_pages(hj.init_cache(10, 16, 32), lengths, lengths, **over, context_axis="context")


def test_a_pool_takes_the_pages_of_a_request_from_devices_in_turn():
    pool = PagePool(12, 16, n_devices=3, stripe=32)
    pool.add("a")
    pool.extend("a", 16 * 9)
    assert (pool.table(["a"], 9)[0] // 4).tolist() == [0, 0, 1, 1, 2, 2, 0, 0, 1]
    pool.fork("a", "b", 16 * 8 + 5)
    (copy,) = pool.extend("b", 1)
    assert copy[0] // 4 == copy[1] // 4 == 1
    pool.check()
    with pytest.raises(OutOfPages, match="request 'a' needs 1 pages on device 1 for 80 tokens, 0 are free"):
        pool.extend("a", 80)
    assert pool.n_free == 2
    for request in "ab":
        pool.free(request)
        pool.check()
    pool.add("c")
    pool.extend("c", 16 * 12)  # every page there is, where it was
    assert (pool.table(["c"], 12)[0] // 4).tolist() == [0, 0, 1, 1, 2, 2, 0, 0, 1, 1, 2, 2]
    pool.check()
    with pytest.raises(ValueError, match="n_pages=12, n_devices=5, stripe=16, wanted equal parts"):
        PagePool(12, 16, n_devices=5)
