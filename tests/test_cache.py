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
from hisa_jax.xla import block_means, sketch
from hisa_jax.xla.means import mean_parts
from tests import draw

D, PAGE, P, N_PAGES, NEW, R = 16, 16, 6, 14, 40, 4
DTYPES = ["float32", "bfloat16", "float8_e4m3fn", "int8"]
METHODS = {
    "dsa": hj.Dsa(topk=20),
    "hisa": hj.Hisa(topk=20, block_size=16, block_topk=3),
    "scan": hj.Scan(topk=20, candidates=32, exact_heads=1),
    "scan_units": hj.Scan(topk=20, candidates=32, exact_heads=0, unit=4, slopes="plain", sketch="int4"),
    "hisa_two_pages_a_block": hj.Hisa(topk=20, block_size=32, block_topk=3, block_ratio=2),
    "block_sparse": hj.BlockSparse(topk=48, block_size=16),
}
append = jax.jit(hj.append, donate_argnums=0)
truncate = functools.partial(hj.truncate, max_tokens=P * PAGE)
pack = jax.jit(sketch.pack)
parts_of = jax.jit(lambda means, dtype: mean_parts(means, dtype) or (None, None), static_argnums=1)
mark_of, marks_joined = jax.jit(block_means.mark_of), jax.jit(lambda marks: block_means.joined([marks]))
select_paged = jax.jit(
    functools.partial(hj.select_paged, return_scores=True), static_argnames=("method", "return_blocks")
)


def keys_of(rng, n, dtype):
    """n random keys as NumPy: a function of them fixes what the cache is given."""
    k = rng.normal(size=(NEW, D)).astype(np.float32)
    k = draw.quantized(k, dtype, "float32") if dtype in ("float8_e4m3fn", "int8") else draw.cast(k, dtype)
    return jax.tree.map(lambda x: np.asarray(x)[:n], k)


def concatenated(parts):
    return jax.tree.map(lambda *x: np.concatenate(x), *parts)


def padded(k, n):
    return jax.tree.map(lambda x: np.pad(x, ((0, n - x.shape[0]),) + ((0, 0),) * (x.ndim - 1)), k)


def for_all(lengths):
    """[R] int32: the requests that are not there have no tokens."""
    return jnp.asarray(np.pad(np.asarray(lengths, np.int32), (0, R - len(lengths))))


def offsets(sizes):
    """[R + 1] int32."""
    return jnp.asarray(np.cumsum([0, *sizes, *[0] * (R - len(sizes))]), jnp.int32)


def values_of(cache):
    values = np.asarray(cache.keys, np.float32)
    return values if cache.scales is None else values * np.asarray(cache.scales)[..., None]


def tree_sum(values):
    """[n, D] -> [D] float32, by pairs of neighbours."""
    while len(values) > 1:
        values = values[0::2] + values[1::2]
    return values[0]


class Requests:
    """A cache, its pool, and beside them what each request should hold: its keys in one piece."""

    def __init__(self, dtype):
        self.dtype, self.pool = dtype, PagePool(N_PAGES, PAGE)
        self.cache = hj.init_cache(N_PAGES, PAGE, D, dtype, sketch="int4", block_size=2 * PAGE)
        self.rng = np.random.default_rng(0)
        self.held: dict = {}

    def copy(self, copies):
        assert len(copies) <= 1
        for source, target in copies:
            self.cache = hj.copy_pages(self.cache, jnp.array([source]), jnp.array([target]))

    def extend(self, news):
        """Appends {request: n} tokens in one call, as far as there are pages."""
        lengths, sizes, parts, names = [], [], [], []
        for name, n in news.items():
            n = min(n, P * PAGE - self.pool.lengths[name])
            before = self.pool.lengths[name]
            try:
                self.copy(self.pool.extend(name, n))
            except OutOfPages:
                assert self.pool.lengths[name] == before
                continue
            part = keys_of(self.rng, n, self.dtype)
            names.append(name), lengths.append(before), sizes.append(n), parts.append(part)
            self.held[name] = concatenated([self.held[name], part])
        if names:
            k = jax.tree.map(jnp.asarray, padded(concatenated(parts), R * NEW))
            self.cache = append(self.cache, k, self.table(names), offsets(sizes), for_all(lengths))

    def table(self, names):
        """[R, P], the rows behind the named requests without pages."""
        table = self.pool.table(names, P)
        return jnp.asarray(np.pad(table, ((0, R - len(names)), (0, 0)), constant_values=-1))

    def add(self, name):
        self.pool.add(name)
        self.held[name] = keys_of(self.rng, 0, self.dtype)

    def fork(self, name, new, length):
        self.pool.fork(name, new, length)
        self.held[new] = jax.tree.map(lambda x: x[:length], self.held[name])

    def truncate(self, name, length):
        before = self.pool.lengths[name]
        self.copy(self.pool.truncate(name, length))
        self.cache = truncate(self.cache, self.table([name]), for_all([before]), for_all([length]))
        self.held[name] = jax.tree.map(lambda x: x[:length], self.held[name])

    def free(self, name):
        self.pool.free(name)
        del self.held[name]

    def check_pages(self):
        """Pages hold the tokens of their holders and their sketches; sums and counts are of what the pages hold."""
        self.pool.check()
        content, counts, sums = values_of(self.cache), np.asarray(self.cache.counts), np.asarray(self.cache.sums)
        kept = tuple(map(np.asarray, (self.cache.codes, self.cache.code_scales)))
        places = np.asarray(self.cache.places)
        for name, length in self.pool.lengths.items():
            held = self.held[name]
            numbers = held.values if isinstance(held, hj.QuantizedKeys) else held
            sketches, wanted = pack(padded(numbers, P * PAGE)), np.asarray(numbers, np.float32)
            wanted = wanted * held.scales[:, None] if isinstance(held, hj.QuantizedKeys) else wanted
            assert len(wanted) == length
            for nth, page in enumerate(self.pool.table([name], P)[0][: -(-length // PAGE)]):
                tokens = wanted[nth * PAGE : (nth + 1) * PAGE]
                np.testing.assert_array_equal(content[page, : len(tokens)], tokens)
                for got, own in zip(kept, sketches, strict=True):
                    np.testing.assert_array_equal(got[page, : len(tokens)], own[nth * PAGE :][: len(tokens)])
                assert places[page] == nth
                # A fork may share the first tokens of a page only: it is its last, whose block is always kept.
                assert counts[page] == len(tokens) or (counts[page] > len(tokens) and length < (nth + 1) * PAGE)
                present = np.where(np.arange(PAGE)[:, None] < counts[page], content[page], np.float32(0))
                np.testing.assert_array_equal(sums[page], tree_sum(present))
        # For every page, also those that were copied, truncated or given back, but those that end a whole block.
        n_of_page = np.maximum(counts, 1).astype(np.float32)
        self.check_means(~((places % 2 == 1) & (counts == PAGE)), sums / n_of_page[:, None])
        pages = [
            self.pool.table([name], P)[0][: length // (2 * PAGE) * 2] for name, length in self.pool.lengths.items()
        ]
        first, last = np.concatenate([[], *pages]).astype(int).reshape(-1, 2).T
        of_blocks = np.zeros_like(sums)
        of_blocks[last] = (sums[first] + sums[last]) / np.float32(2 * PAGE)
        self.check_means(last, of_blocks)
        if (kept := self.cache.marks) is not None:
            marks = np.asarray(mark_of(self.cache.sums, self.cache.counts))
            np.testing.assert_array_equal(np.asarray(kept)[places % 2 == 0], marks[places % 2 == 0])
            np.testing.assert_array_equal(np.asarray(kept)[last], np.asarray(marks_joined(marks))[first])

    def check_means(self, of, means):
        """[N_PAGES, D] float32: those `of` some pages are what the cache keeps."""
        for got, wanted in zip((self.cache.means, self.cache.mean_scales), parts_of(means, self.dtype), strict=True):
            if wanted is not None:
                np.testing.assert_array_equal(np.asarray(got)[of], np.asarray(wanted)[of])

    def check_selection(self, method, n_queries=5):
        """The last tokens of every request select from pages what they select from one piece, bit for bit."""
        names = sorted(self.pool.lengths)
        q, _, w = draw.inputs(1, R * n_queries, 1, 2, D, seed=1)
        q, w, lengths = draw.cast(q[0], "bfloat16"), w[0], for_all([self.pool.lengths[name] for name in names])
        cu = jnp.arange(R + 1, dtype=jnp.int32) * n_queries
        got = select_paged(q, w, self.cache, self.table(names), cu, lengths, method, return_blocks=method.has_blocks)
        nothing = keys_of(self.rng, 0, self.dtype)
        held = [padded(x, P * PAGE) for x in [*(self.held[name] for name in names), *[nothing] * (R - len(names))]]
        wanted = hj.select(
            jnp.asarray(q.reshape(R, n_queries, 2, D)),
            jax.tree.map(lambda *x: jnp.asarray(np.stack(x)), *held),
            jnp.asarray(w.reshape(R, n_queries, 2)),
            method,
            lengths=lengths,
            return_scores=True,
            return_blocks=method.has_blocks,
        )
        jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, y.reshape(x.shape)), got, wanted)


class CacheMachine(stateful.RuleBasedStateMachine):
    """Append, truncate, fork, free and reuse in any order."""

    dtype, methods = "float32", ["block_sparse", "hisa", "hisa_two_pages_a_block"]

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
TestCacheOfFloat32 = pytest.mark.slow(CacheMachine.TestCase)
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
@pytest.mark.parametrize("page_size", [16, pytest.param(64, marks=pytest.mark.exhaustive), 256])  # smallest to a block
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


@pytest.mark.gate("hisa_two_pages_a_block-missing page", "scan-page too large", "block_sparse-length beyond the table")
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
