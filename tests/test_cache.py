"""The paged cache: what its pages say is what they hold, and a selection from pages is that from one piece."""

import contextlib
import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import stateful
from hypothesis import strategies as st

import hisa_jax as hj
from hisa_jax.page_pool import OutOfPages, PagePool
from tests import draw
from tests.cached_requests import DTYPES, N_PAGES, NEW, PAGE, D, P, Requests, append, keys_of

METHODS = {
    "dsa": hj.Dsa(topk=20),
    "hisa": hj.Hisa(topk=20, block_size=16, block_topk=3),
    "scan": hj.Scan(topk=20, candidates=32, exact_heads=1),
    "scan_units": hj.Scan(topk=20, candidates=32, exact_heads=0, unit=4, slopes="plain", sketch="int4"),
    "hisa_two_pages_a_block": hj.Hisa(topk=20, block_size=32, block_topk=3, block_ratio=2),
    "block_sparse": hj.BlockSparse(topk=48, block_size=16),
}


class CacheMachine(stateful.RuleBasedStateMachine):
    """Append, truncate, fork, free and reuse in any order."""

    dtype, methods = "float32", ["block_sparse", "hisa_two_pages_a_block"]

    def __init__(self):
        super().__init__()
        self.requests, self.n = Requests(self.dtype), 0

    def some(self, data):
        return data.draw(st.sampled_from(sorted(self.requests.held)))

    @stateful.rule()
    def add(self):
        if len(self.requests.held) < 4:
            self.n += 1
            self.requests.add(self.n)

    @stateful.precondition(lambda self: self.requests.held)
    @stateful.rule(data=st.data(), sizes=st.lists(st.integers(0, NEW), min_size=1, max_size=2))
    def extend(self, data, sizes):
        self.requests.extend({self.some(data): n for n in sizes})

    @stateful.precondition(lambda self: 0 < len(self.requests.held) < 4)
    @stateful.rule(data=st.data())
    def fork(self, data):
        self.n += 1
        name = self.some(data)
        self.requests.fork(name, self.n, data.draw(st.integers(0, self.requests.pool.lengths[name])))

    @stateful.precondition(lambda self: self.requests.held)
    @stateful.rule(data=st.data())
    def truncate(self, data):
        name = self.some(data)
        with contextlib.suppress(OutOfPages):
            self.requests.truncate(name, data.draw(st.integers(0, self.requests.pool.lengths[name])))

    @stateful.precondition(lambda self: self.requests.held)
    @stateful.rule(data=st.data())
    def free(self, data):
        self.requests.free(self.some(data))

    @stateful.rule(data=st.data())
    def select(self, data):
        self.requests.check_selection(METHODS[data.draw(st.sampled_from(self.methods))])

    @stateful.invariant()
    def pages_say_what_they_hold(self):
        self.requests.check_pages()

    def teardown(self):
        for name in list(self.requests.held):
            self.requests.free(name)
        self.requests.pool.check()
        assert self.requests.pool.n_free == N_PAGES


E4M3 = {"dtype": "float8_e4m3fn", "methods": ["hisa", "scan_units"]}
EVERY = {"methods": sorted(METHODS)}
TestCacheOfFloat32 = pytest.mark.slow(pytest.mark.exhaustive(CacheMachine.TestCase))
TestCacheOfE4m3 = pytest.mark.slow(type("E4m3Machine", (CacheMachine,), E4M3).TestCase)
TestCacheOfEveryMethod = pytest.mark.exhaustive(type("MachineOfEveryMethod", (CacheMachine,), EVERY).TestCase)
TestCacheOfFloat32.settings = TestCacheOfE4m3.settings = TestCacheOfEveryMethod.settings = hypothesis.settings(
    max_examples=12, stateful_step_count=25, deadline=None
)


@pytest.mark.gate("bfloat16-dsa", "bfloat16-scan_units", "int8-hisa")  # those above have other dtypes and methods
@pytest.mark.parametrize(
    ("dtype", "method"),
    [("bfloat16", method) for method in METHODS]
    + [pytest.param(dtype, "hisa", marks=pytest.mark.slow) for dtype in DTYPES if dtype != "bfloat16"],
)
def test_a_selection_from_pages_is_that_from_one_piece(dtype, method):
    requests = Requests(dtype)
    for name in "abc":
        requests.add(name)
    requests.extend({"a": 37, "b": 16})
    requests.extend({"b": 30, "c": 1, "a": 40})
    requests.fork("a", "d", 40)
    requests.extend({"d": 8})
    requests.check_pages()
    requests.check_selection(METHODS[method])


@pytest.mark.slow
@pytest.mark.parametrize("page_size", [16, 64, 256])  # smallest to a block
@pytest.mark.gate(16)
def test_every_page_size_gives_the_same_bits(page_size):
    rng = np.random.default_rng(3)
    k = jnp.asarray(rng.normal(size=(700, D)), jnp.float32)
    cache = hj.init_cache(70, page_size, D, "float32")
    pages = rng.permutation(70)[: -(-700 // page_size)].astype(np.int32)[None]
    cache = append(cache, k, jnp.asarray(pages), jnp.array([0, 700]), jnp.array([0], jnp.int32))
    q, _, w = draw.inputs(1, 4, 1, 2, D)
    method = hj.Hisa(topk=64, block_size=256, block_topk=2)
    one = hj.select(jnp.asarray(q), k[None], jnp.asarray(w), method, return_scores=True)
    got = hj.select_paged(
        jnp.asarray(q[0]), jnp.asarray(w[0]), cache, jnp.asarray(pages), jnp.array([0, 4]), jnp.array([700]), method,
        return_scores=True,
    )  # fmt: skip
    np.testing.assert_array_equal(got.indices, one.indices[0])
    np.testing.assert_array_equal(got.scores, one.scores[0])


def test_writing_twice_changes_nothing():
    rng = np.random.default_rng(4)
    k, table = keys_of(rng, 30, "bfloat16"), jnp.array([[3, 1]], jnp.int32)
    write = functools.partial(hj.append, k=k, block_tables=table, cu_seqlens=jnp.array([0, 30]))
    once = write(hj.init_cache(4, PAGE, D), lengths=jnp.array([0], jnp.int32))
    twice = write(once, lengths=jnp.array([0], jnp.int32))
    jax.tree.map(np.testing.assert_array_equal, once, twice)


def test_one_compiled_append_serves_every_length():
    calls = []

    @jax.jit
    def step(cache, k, table, lengths):
        calls.append(1)
        return hj.append(cache, k, table, jnp.array([0, 1, 2]), lengths)

    cache, rng = hj.init_cache(8, PAGE, D, "float32"), np.random.default_rng(5)
    table = jnp.array([[0, 1, 2], [5, 6, 7]], jnp.int32)
    for t in range(40):
        cache = step(cache, keys_of(rng, 2, "float32"), table, jnp.array([t, t], jnp.int32))
    assert len(calls) == 1
    np.testing.assert_array_equal(cache.counts, [16, 16, 8, 0, 0, 16, 16, 8])


@pytest.mark.gate("hisa_two_pages_a_block-missing page")  # other methods are above
@pytest.mark.parametrize("fault", ["missing page", "page too large", "length beyond the table"])
@pytest.mark.parametrize("method", METHODS)
def test_a_request_without_all_its_pages_selects_nothing_and_the_others_are_right(fault, method):
    requests = Requests("float32")
    for name, n in {"a": 40, "b": 30}.items():
        requests.add(name)
        requests.extend({name: n})
    table, lengths = requests.pool.table(["a", "b"], P), np.array([40, 30], np.int32)
    if fault == "length beyond the table":
        lengths[0] = P * PAGE + 1
    else:
        table[0, 1] = {"missing page": -1, "page too large": N_PAGES}[fault]
    q, _, w = draw.inputs(1, 2, 1, 2, D)
    arrays = jnp.asarray(q[0]), jnp.asarray(w[0]), requests.cache, jnp.asarray(table), jnp.array([0, 1, 2])
    method = METHODS[method]
    got = hj.select_paged(*arrays, jnp.asarray(lengths), method)
    alone = hj.select(jnp.asarray(q[:, 1:]), requests.held["b"][None], jnp.asarray(w[:, 1:]), method)
    assert int(got.count[0]) == 0 and (np.asarray(got.indices[0]) == -1).all()
    np.testing.assert_array_equal(got.indices[1], alone.indices[0, 0])
    with pytest.raises(Exception, match="select_paged: (block_tables lacks pages|lengths is)"):
        hj.checked(hj.select_paged)(*arrays, jnp.asarray(lengths), method)


def test_sparse_mla_attends_to_latents_in_pages():
    rng = np.random.default_rng(6)
    latents = jnp.asarray(rng.normal(size=(50, 24)), jnp.float32)
    table = jnp.array([[4, 0, 2, 5]], jnp.int32)
    cache = hj.init_cache(6, PAGE, D, "float32", latent_dim=24, latent_dtype="float32")
    cache = hj.append(cache, jnp.ones((50, D)), table, jnp.array([0, 50]), jnp.array([0], jnp.int32), latents=latents)
    q = jnp.asarray(rng.normal(size=(3, 2, 24)), jnp.float32)
    indices = jnp.array([[0, 17, 49, -1], [3, 4, 5, 6], [-1, -1, -1, -1]], jnp.int32)
    options = dict(scale=0.3, value_dim=16, return_lse=True)
    got = hj.sparse_mla_paged(q, cache, indices, table, jnp.array([0, 3]), **options)
    wanted = hj.sparse_mla(q[None], latents[None], indices[None], **options)
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, y[0]), got, wanted)


def test_a_full_pool_says_so_and_changes_nothing():
    pool = PagePool(3, PAGE)
    pool.add("a")
    pool.extend("a", 33)
    pool.add("b")
    with pytest.raises(OutOfPages, match="request 'b' needs [0-9]+ pages for 1152921504606846976 tokens"):
        pool.extend("b", 2**60)  # no list of so many pages is made
    with pytest.raises(OutOfPages, match="request 'b' needs 1 pages for 1 tokens, 0 are free"):
        pool.extend("b", 1)
    pool.check()
    pool.free("a")
    assert pool.extend("b", 48) == []


def bad_calls():
    cache = hj.init_cache(4, PAGE, D, "float32")
    q8 = hj.init_cache(4, PAGE, D, "int8")
    k, table, cu, lengths = jnp.ones((2, D)), jnp.zeros((1, 2), jnp.int32), jnp.array([0, 2]), jnp.array([0])
    q, w = jnp.ones((2, 3, D)), jnp.ones((2, 3))
    select = functools.partial(hj.select_paged, q, w, cache, table, cu, lengths)
    yield lambda: hj.init_cache(4, 20, D), ValueError, "init_cache: page_size=20, wanted a power of two up to 256"
    yield lambda: hj.init_cache(4, 16, D, "float16"), TypeError, "init_cache: dtype is float16, wanted one of"
    yield (
        lambda: hj.append(cache, k[:, 1:], table, cu, lengths),
        ValueError,
        r"append: k is \[2, 15\], wanted \[T, 16\]",
    )
    yield lambda: hj.append(q8, k.astype(jnp.int8), table, cu, lengths), TypeError, "wanted QuantizedKeys"
    yield lambda: hj.append(cache, k, table, cu[1:], lengths), ValueError, r"append: cu_seqlens is \[1\], wanted \[2\]"
    yield lambda: hj.append(cache, k, table, cu, lengths, latents=k), ValueError, "the cache keeps none"
    yield (
        lambda: hj.append(cache, k, table[0], cu, lengths),
        ValueError,
        r"append: block_tables is \[2\], wanted \[R, P\]",
    )
    yield (
        lambda: select(hj.Hisa(topk=4, block_size=24, block_topk=2)),
        ValueError,
        "with pages of 16 tokens, wanted a block_size that is a multiple",
    )
    yield (
        lambda: hj.sparse_mla_paged(q, cache, jnp.zeros((2, 1), jnp.int32), table, cu, scale=1.0),
        ValueError,
        "cache has no latents",
    )


@pytest.mark.parametrize(("call", "error", "message"), list(bad_calls()))
def test_bad_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
