"""`select_paged` on the GPU kernels: keys in pages give the selection that XLA makes of them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hisa_jax as hj
from hisa_jax.kernels_pallas import indexer, mosaic_gpu, triton
from hisa_jax.kernels_pallas.flat_call import flatten
from hisa_jax.kernels_pallas.pages import PageSums
from hisa_jax.kernels_pallas.triton import kept_means
from hisa_jax.kernels_pallas.triton.page_means import pool_pages
from hisa_jax.kernels_pallas.triton.pool import pool
from hisa_jax.layout import Call
from tests.gpu import promises
from tests.gpu.test_lowering import BACKENDS, BF16, E4M3, lower
from tests.gpu.test_select import implementation  # noqa: F401

pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")


@dataclasses.dataclass(frozen=True)
class Requests:
    """Requests in pages of a cache in random order, beside them their keys in one piece; a row of queries is padding.

    Tables hold nonsense where there are no tokens.
    """

    q: jax.Array
    w: jax.Array
    k: jax.Array  # of all requests
    k_scale: jax.Array | None
    cache: hj.cache.IndexCache
    tables: jax.Array
    cu_seqlens_q: jax.Array
    lengths: jax.Array

    def select(self, implementation, method, **options):  # noqa: F811
        arrays = self.q, self.w, self.cache, self.tables, self.cu_seqlens_q, self.lengths
        options = dict(return_scores=True, return_blocks=method.has_blocks) | options
        return hj.select_paged(*arrays, method, implementation=implementation, **options)


def draw(lengths, queries, page_size, dtype, *, H=16, D=64, normal=False, seed=0, sketch=None, block_size=None):
    """Whole numbers, whose sums are exact, or normal data."""
    rng = np.random.default_rng(seed)
    lengths, queries = np.asarray(lengths, np.int32), np.asarray(queries)
    n_used = -(-lengths // page_size)
    n_pages = int(n_used.sum()) + 3
    tables = rng.choice([-1, n_pages, 2**31 - 1], (len(lengths), n_used.max() + 2)).astype(np.int32)
    free = rng.permutation(n_pages)
    for r, n in enumerate(n_used):
        tables[r, :n], free = free[:n], free[n:]
    make = (lambda *shape: rng.normal(size=shape)) if normal else (lambda *shape: rng.integers(-1, 2, shape))
    T, N = queries.sum() + 1, lengths.sum()
    q, k, w = (jnp.asarray(make(*shape), jnp.float32) for shape in ((T, H, D), (N, D), (T, H)))
    q, k, k_scale = q.astype(dtype), k.astype(dtype), None
    if dtype == E4M3:
        k_scale = jnp.asarray(2.0 ** rng.integers(-1, 2, N), jnp.float32)
    cache = hj.append(
        hj.init_cache(n_pages, page_size, D, dtype, sketch=sketch, block_size=block_size),
        k if k_scale is None else hj.QuantizedKeys(k, k_scale),
        jnp.asarray(tables),
        jnp.asarray(np.cumsum([0, *lengths]), jnp.int32),
        jnp.zeros(len(lengths), jnp.int32),
    )
    cu_seqlens_q = jnp.asarray(np.cumsum([0, *queries]), jnp.int32)
    return Requests(
        q, 0.1 * w if normal else w, k, k_scale, cache, jnp.asarray(tables), cu_seqlens_q, jnp.asarray(lengths)
    )


def assert_same(got, wanted):
    for field in dataclasses.fields(got):
        x, y = getattr(got, field.name), getattr(wanted, field.name)
        assert (x is None) == (y is None)
        if x is not None:
            np.testing.assert_array_equal(x, y, err_msg=field.name)


# One request without tokens, one shorter than a block, one that keeps all its blocks; ends within a page.
PREFILL_AND_DECODE = dict(lengths=[600, 0, 21, 250], queries=[8, 0, 1, 2])
DECODE = dict(lengths=[600, 333, 0, 21, 250], queries=[1, 1, 0, 1, 1])
METHODS = {
    "dsa": lambda block_size: hj.Dsa(topk=50),
    "hisa": lambda block_size: hj.Hisa(topk=50, block_size=block_size, block_topk=4),
    "block_sparse": lambda block_size: hj.BlockSparse(topk=4 * block_size, block_size=block_size),
}
# Means are those that pages keep; of smaller pages they are taken in registers for few queries, or written first.
CASES = [  # page, block, dtype, requests, method
    pytest.param(32, 64, E4M3, PREFILL_AND_DECODE, "hisa", id="two_pages_a_block"),
    pytest.param(32, 64, E4M3, PREFILL_AND_DECODE, "dsa", id="flat"),
    pytest.param(64, 128, E4M3, DECODE, "hisa", id="decode"),
    pytest.param(32, 32, E4M3, DECODE, "hisa", id="decode_where_a_page_is_a_block"),
]
MORE_CASES = [
    pytest.param(32, 32, BF16, PREFILL_AND_DECODE, "hisa", id="page_is_a_block"),
    pytest.param(16, 64, BF16, DECODE, "hisa", id="four_pages_a_block"),
    pytest.param(32, 32, BF16, PREFILL_AND_DECODE, "block_sparse", id="block_sparse"),
]


@pytest.mark.parametrize(
    ("implementation", "page_size", "block_size", "dtype", "requests", "method"),
    [
        pytest.param(name, *case.values, id=f"{name}-{case.id}", marks=marks)
        for name, marks, cases in (
            ("triton_interpreted", (), CASES[1:2]),
            # Decoding on Triton is in the test of kept means.
            ("triton_interpreted", pytest.mark.exhaustive, [CASES[0], *CASES[2:]]),
            ("triton_interpreted", pytest.mark.exhaustive, MORE_CASES),
            # The flat indexer over pages has Triton's above, Mosaic's is lowered below.
            ("mosaic_gpu_interpreted", (), CASES[2:3]),
            ("mosaic_gpu_interpreted", pytest.mark.exhaustive, [*CASES[:2], *CASES[3:]]),
            ("triton", pytest.mark.gpu, CASES + MORE_CASES),
            ("mosaic_gpu", pytest.mark.gpu, [case for case in CASES + MORE_CASES if case.values[0] >= 32]),
        )
        for case in cases
    ],
    indirect=["implementation"],
)
def test_pages_give_what_xla_gives(implementation, page_size, block_size, dtype, requests, method):  # noqa: F811
    requests, method = draw(**requests, page_size=page_size, dtype=dtype), METHODS[method](block_size)
    assert_same(requests.select(implementation, method), requests.select("xla", method))


@pytest.mark.parametrize(
    ("implementation", "page_size", "dtype"),
    [
        pytest.param(name, page_size, dtype, id=f"{name}-{page_size}", marks=marks)
        for name, marks, page_size, dtype in (
            ("triton_interpreted", (), 16, BF16),
            ("mosaic_gpu_interpreted", pytest.mark.exhaustive, 32, E4M3),
            ("triton", pytest.mark.gpu, 16, BF16),
            ("triton", pytest.mark.gpu, 32, E4M3),
            ("mosaic_gpu", pytest.mark.gpu, 32, E4M3),
            ("mosaic_gpu", pytest.mark.gpu, 64, BF16),
        )
    ],
    indirect=["implementation"],
)
def test_means_of_blocks_that_pages_keep_are_read_and_where_they_are_of_other_pages_are_not(
    implementation,  # noqa: F811
    page_size,
    dtype,
    monkeypatch,
):
    if jax.default_backend() != "gpu":
        # As for many requests: a program has several tiles, and takes the means that do not fit in several turns.
        monkeypatch.setattr(kept_means, "heuristic", lambda *_: kept_means.Config(tile_s=64, n_tiles=2))
    block_size, method = 2 * page_size if page_size > 16 else 64, hj.Hisa(topk=50, block_size=64, block_topk=4)
    method = dataclasses.replace(method, block_size=block_size)
    decode = DECODE | dict(lengths=[n * block_size // 64 for n in DECODE["lengths"]])
    requests = draw(**decode, page_size=page_size, dtype=dtype, block_size=block_size)
    wanted, cache = requests.select("xla", method), requests.cache
    # No sum is needed.
    spoilt = dataclasses.replace(requests, cache=dataclasses.replace(cache, sums=cache.sums + 1e9))
    assert_same(spoilt.select(implementation, method), wanted)
    # The first page of a chosen block is another one, of other keys: so is the mean, and of some pages what is chosen.
    free = [page for page in range(cache.n_pages) if page not in requests.tables.ravel().tolist()][:1]
    place, before = int(wanted.blocks[0, 1]) * (block_size // page_size), wanted
    for page in requests.tables[1, :8]:
        copied = hj.copy_pages(cache, page[None], jnp.asarray(free))
        copied = dataclasses.replace(copied, places=copied.places.at[free[0]].set(place))
        other = dataclasses.replace(requests, cache=copied, tables=requests.tables.at[0, place].set(free[0]))
        wanted = other.select("xla", method)
        if (wanted.blocks != before.blocks).any():
            break
    assert (wanted.blocks != before.blocks).any()
    assert_same(other.select(implementation, method), wanted)


def test_a_program_of_kept_means_has_a_power_of_two_of_them():
    """As Triton wants it, of any number of requests."""
    configs = [kept_means.heuristic(T, 1024) for T in range(1, 600)]
    assert all((c.tile_s * c.n_tiles).bit_count() == 1 for c in configs)
    assert [configs[T - 1].n_tiles for T in (1, 33, 34, 67, 128, 133, 599)] == [1, 1, 2, 4, 4, 8, 16]


@pytest.mark.exhaustive  # 40 s a case
@pytest.mark.parametrize("implementation", ["mosaic_gpu_interpreted"], indirect=True)
@pytest.mark.parametrize("block_topk", [4, 16], ids=["whole", "parts"])
def test_queries_that_have_a_multiprocessor_each_choose_as_many_do(implementation, block_topk, monkeypatch):  # noqa: F811
    """Whole ones are selected from where they are scored; some keep all they see, of one the last block is not full."""
    monkeypatch.setattr(mosaic_gpu.stages, "n_sms", lambda: 16)
    method = hj.Hisa(topk=50, block_size=64, block_topk=block_topk)
    requests = draw(**DECODE | dict(lengths=[1300, 333, 0, 21, 250]), page_size=32, dtype=E4M3, block_size=64)
    assert_same(requests.select(implementation, method), requests.select("xla", method))


def test_a_request_that_lacks_a_page_selects_nothing_and_the_others_are_right(implementation):  # noqa: F811
    requests, method = draw(**PREFILL_AND_DECODE, page_size=32, dtype=BF16), METHODS["hisa"](32)
    requests = dataclasses.replace(requests, tables=requests.tables.at[0, 3].set(requests.cache.n_pages))
    got = requests.select(implementation, method)
    assert (np.asarray(got.count[:8]) == 0).all() and (np.asarray(got.count[8:11]) > 0).all()
    assert_same(got, requests.select("xla", method))


def test_some_queries_at_a_time_give_the_same(implementation, monkeypatch):  # noqa: F811
    requests, method = draw(**PREFILL_AND_DECODE, page_size=32, dtype=E4M3), METHODS["hisa"](64)
    monkeypatch.setattr(indexer, "QUERIES", 4)
    jax.clear_caches()  # of what was traced for more at a time
    assert_same(requests.select(implementation, method), requests.select("xla", method))


@pytest.mark.parametrize("dtype", [E4M3, BF16], ids=["e4m3", "bf16"])
def test_means_of_pages_are_those_of_the_keys(dtype):
    requests = draw([384, 64], [1, 1], 32, dtype)
    visible = jnp.zeros(requests.q.shape[:1], jnp.int32)
    where = dict(query_offsets=requests.cu_seqlens_q, table=requests.tables, cache=requests.cache)
    call = flatten(Call(q=requests.q, w=requests.w, visible=visible, **where), 64)
    sums = PageSums(sums=requests.cache.sums, counts=requests.cache.counts, pages=call.pages, per_block=2)
    means, scale = pool_pages(sums, dtype, interpret=True)
    wanted, wanted_scale = pool(requests.k, requests.k_scale, np.full(7, 64, np.int32), block_size=64, interpret=True)
    for r, blocks in enumerate((slice(0, 6), slice(6, 7))):
        first = int(call.sequences.key_starts[r]) // 64
        own = slice(first, first + blocks.stop - blocks.start)
        np.testing.assert_array_equal(means[own], wanted[blocks])
        if scale is not None:
            np.testing.assert_array_equal(scale[own], wanted_scale[blocks])


def test_small_pages_are_declined_with_the_reason():
    shape = {"H": 64, "D": 128, "dtype": E4M3, "topk": 2048}
    assert mosaic_gpu.why_not("9.0", **shape, page_size=32) is None
    assert mosaic_gpu.why_not("9.0", **shape, page_size=16) == "needs pages of 32 tokens or more, not 16"
    assert triton.why_not("9.0", **shape, page_size=16) is None


@pytest.mark.oldest("mosaic_gpu-32-32-131072-128-float8_e4m3fn", "triton-32-32-131072-64-float8_e4m3fn")
@pytest.mark.parametrize(
    ("backend", "T", "R", "context", "page_size", "dtype"),
    [
        pytest.param("mosaic_gpu", 128, 128, 131072, 64, E4M3, marks=pytest.mark.exhaustive),  # a query a CTA
        ("mosaic_gpu", 32, 32, 131072, 128, E4M3),  # several CTAs a query
        pytest.param("mosaic_gpu", 4200, 8, 65536, 64, BF16, marks=pytest.mark.exhaustive),  # prefill among decode
        pytest.param("mosaic_gpu", 4200, 8, 65536, 128, BF16, marks=pytest.mark.exhaustive),
        ("triton", 32, 32, 131072, 64, E4M3),
        ("triton", 4200, 8, 65536, 16, BF16),  # prefill of Mosaic GPU: test_lowering.py
    ],
)
def test_indexers_over_pages_lower(backend, T, R, context, page_size, dtype):
    module, P, f32, i32 = BACKENDS[backend], context // page_size, jnp.float32, jnp.int32

    def both(q, w, visible, tables, offsets):
        cache = hj.init_cache(R * P, page_size, 128, dtype)
        call = Call(q=q, w=w, visible=visible, query_offsets=offsets, table=tables, cache=cache)
        hisa = module.select_hisa(call, hj.Hisa(topk=2048, block_size=128, block_topk=64))
        return hisa, module.select_scan(call, hj.Scan()), module.select_flat(call, 2048) if T > R else None

    queries = ((T, 64, 128), dtype), ((T, 64), f32), ((T,), i32)
    assert "custom_call" in lower(both, *queries, ((R, P), i32), ((R + 1,), i32))


@pytest.mark.gpu
@pytest.mark.parametrize("page_size", [64, 128])
@pytest.mark.parametrize("queries", [[1, 1, 1, 0, 1], [300, 1, 8, 0, 1]], ids=["decode", "prefill_and_decode"])
@pytest.mark.parametrize("backend", ["mosaic_gpu", "triton"])
def test_real_sizes_keep_the_contract(backend, queries, page_size):
    if jax.default_backend() != "gpu" or hj.implementations()[backend]:
        pytest.skip(hj.implementations()[backend] or "needs an NVIDIA GPU")
    lengths = [20000, 131072, 9000, 0, 700]
    requests = draw(lengths, queries, page_size, E4M3, H=64, D=128, normal=True)
    method = hj.Hisa(topk=2048, block_size=128, block_topk=64)
    got = requests.select(backend, method, return_scores=False)
    flat = requests.select(backend, hj.Dsa(topk=2048), return_scores=False)
    starts = np.cumsum([0, *lengths])
    for r, (first, end) in enumerate(zip(np.cumsum([0, *queries]), np.cumsum(queries), strict=False)):
        rows = slice(max(first, end - 8), end)
        keys = slice(starts[r], starts[r + 1])
        one = requests.q[None, rows], requests.k[None, keys], requests.k_scale[None, keys], requests.w[None, rows]
        visible = lengths[r] - (end - np.arange(rows.start, rows.stop))[None] + 1
        if first < end:
            own = [x[None, rows] for x in (got.indices, got.count, got.blocks)]
            promises.check_hisa(
                own, *one, visible, topk=2048, block_size=128, block_topk=64, token_tolerance=2e-3, block_tolerance=2e-2
            )
            own = [x[None, rows] for x in (flat.indices, flat.count)]
            promises.check_flat(own, *one, visible, topk=2048, token_tolerance=2e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["mosaic_gpu", "triton"])
def test_real_sizes_of_whole_numbers_give_what_xla_gives(backend):
    if jax.default_backend() != "gpu" or hj.implementations()[backend]:
        pytest.skip(hj.implementations()[backend] or "needs an NVIDIA GPU")
    for seed, page_size in enumerate((64, 128)):
        for queries in ([1, 1, 1], [150, 1, 8]):
            requests = draw([9000, 20000, 12345], queries, page_size, BF16, H=64, D=128, seed=seed)
            method = hj.Hisa(topk=2048, block_size=128, block_topk=32)
            assert_same(requests.select(backend, method), requests.select("xla", method))
