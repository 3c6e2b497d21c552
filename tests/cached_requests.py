"""Requests in a cache, and beside them what each should hold: what the tests of the paged cache compare with."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

import hisa_jax as hj
from hisa_jax.page_pool import OutOfPages, PagePool
from hisa_jax.xla import block_means, sketch
from hisa_jax.xla.means import mean_parts
from tests import draw

D, PAGE, P, N_PAGES, NEW, R = 16, 16, 6, 14, 40, 4
DTYPES = ["float32", "bfloat16", "float8_e4m3fn", "int8"]
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
        """[R, P], the rows after those of the named requests without pages."""
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
