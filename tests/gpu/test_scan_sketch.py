"""The scan by sketches in pages: the bits of whole numbers are those that NumPy gives, on a CPU and on a GPU.

Two programs a shape, compiled in some 8 s.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hisa_jax as hj
from hisa_jax.kernels_pallas.flat_call import flatten
from hisa_jax.kernels_pallas.operands import Columns, ScanHeads
from hisa_jax.kernels_pallas.pages import Pages
from hisa_jax.kernels_pallas.sort_key import INVISIBLE, score_of, sort_key_of
from hisa_jax.kernels_pallas.triton import scan_sketch
from hisa_jax.kernels_pallas.triton.scan import Scanned
from hisa_jax.layout import Call
from hisa_jax.xla import sketch
from tests.gpu.test_lowering import BF16, E4M3, lower

pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")
KEEP_FIRST, KEEP_LAST = 2, 3


class Requests:
    """Requests in pages of random order; whole numbers, of which no sum is rounded."""

    def __init__(self, dtype, lengths, n_queries, page_size, D, R, n, n_linear):
        rng, self.lengths, P = np.random.default_rng(0), np.array(lengths), -(-max(lengths) // page_size)
        T, N = sum(n_queries), sum(lengths)
        table = jnp.asarray(rng.permutation(len(lengths) * P + 1)[:-1].reshape(-1, P), jnp.int32)
        values = jnp.asarray(rng.integers(-7, 8, (N, D)) * 2.0 ** rng.integers(0, 2, (N, 1)), dtype)
        values = values.at[5].set(jnp.nan)
        self.scales = None if dtype == BF16 else jnp.asarray(2.0 ** rng.integers(-1, 2, N), jnp.float32)
        k = values if self.scales is None else hj.QuantizedKeys(values, self.scales)
        self.keys = np.asarray(sketch.int4(values), np.float64)
        starts = jnp.asarray(np.cumsum([0, *lengths]), jnp.int32)
        cache = hj.init_cache(table.size + 1, page_size, D, dtype, sketch="int4")
        cache = hj.append(cache, k, table, starts, jnp.zeros(len(lengths), jnp.int32), implementation="xla")
        self.starts, self.query_starts = np.asarray(starts), np.cumsum([0, *n_queries])
        self.visible = np.concatenate([m - n + 1 + np.arange(n) for m, n in zip(lengths, n_queries, strict=True)])
        q, w = jnp.zeros((T, 16, D), dtype), jnp.zeros((T, 16), jnp.float32)
        offsets, visible = (jnp.asarray(x, jnp.int32) for x in (self.query_starts, self.visible))
        call = Call(q=q, w=w, visible=visible, query_offsets=offsets, table=table, cache=cache)
        self.flat = flatten(call, page_size)
        codes, code_scales = (x.reshape(-1, x.shape[-1]) for x in (cache.codes, cache.code_scales))
        self.operands = Scanned(codes, code_scales, self.flat.k_scale, self.flat.pages)
        rows = jnp.asarray(rng.integers(-2, 3, (T, R, D)), dtype).at[:, n:].set(jnp.inf)
        weights = jnp.asarray(2.0 ** rng.integers(-1, 2, (T, R)) * rng.choice([-1, 1], (T, R)), jnp.float32)
        self.heads = ScanHeads(q=rows.at[-1, 0, 3].set(jnp.nan), w=weights, n_linear=n_linear, n=n)
        self.config = scan_sketch.heuristic(T, len(lengths), R, code_scales.shape[1], -(-max(lengths) // 128))

    def columns(self, step, **options):
        limit = -(-self.flat.visible // step)
        tiles = self.flat.sequences.query_tiles(len(self.visible), self.config.tile_t, limit)
        return Columns(limit=limit, n=-(-self.flat.sequences.max_keys // step), tiles=tiles, **options)

    def sort_keys(self):
        """Of each query, those of all tokens that it sees."""
        heads = self.heads
        for t, visible in enumerate(self.visible):
            r = np.searchsorted(self.query_starts, t, side="right") - 1
            own = slice(self.starts[r], self.starts[r] + visible)
            rows, w = (np.asarray(x, np.float64)[t, : heads.n] for x in (heads.q, heads.w))
            x = rows @ self.keys[own].T
            x[heads.n_linear :] = np.where(x[heads.n_linear :] < 0, 0, x[heads.n_linear :])
            x = w @ x if self.scales is None else w @ x * np.asarray(self.scales, np.float64)[own]
            yield np.asarray(sort_key_of(jnp.asarray(x, jnp.float32)))

    def check(self, interpret):
        wanted, step = list(self.sort_keys()), 4
        options = dict(config=self.config, interpret=interpret)
        got = scan_sketch.scan_sort_keys(self.operands, self.heads, self.columns(step), step=step, **options)
        for t, sort_keys in enumerate(wanted):
            sampled = sort_keys[::step]
            np.testing.assert_array_equal(got[t, : len(sampled)], sampled, err_msg=f"query {t}")
        threshold = jnp.asarray([np.median(x) if len(x) else INVISIBLE for x in wanted], jnp.int32)
        columns = self.columns(1, keep_first=KEEP_FIRST, keep_last=KEEP_LAST)
        words = np.asarray(scan_sketch.scan_masks(self.operands, self.heads, columns, threshold, **options))
        for t, sort_keys in enumerate(wanted):
            n, at = len(sort_keys), np.arange(len(sort_keys))
            bits = (words[t, at // 32] >> (at % 32)) & 1
            taken = (sort_keys >= int(threshold[t])) | (at < KEEP_FIRST) | (at >= n - KEEP_LAST)
            np.testing.assert_array_equal(bits, taken, err_msg=f"query {t}")
            assert n < 40 or taken.mean() > 0.3 or np.isnan(score_of(threshold[t]))


SHAPES = {
    "decode": dict(dtype=E4M3, lengths=[300, 129, 17], n_queries=[1, 1, 1], page_size=64, D=128, R=8, n=6, n_linear=2),
    "drafts": dict(dtype=BF16, lengths=[200, 150], n_queries=[4, 1], page_size=16, D=32, R=2, n=1, n_linear=1),
}


@pytest.mark.parametrize("shape", ["decode", pytest.param("drafts", marks=pytest.mark.exhaustive)])
def test_the_bits_of_whole_numbers(shape):
    Requests(**SHAPES[shape]).check(interpret=True)


@pytest.mark.gpu
@pytest.mark.parametrize("n_queries", [1, 5, 20])
@pytest.mark.parametrize(("R", "n", "n_linear"), [(2, 1, 1), (4, 3, 2), (8, 6, 2), (16, 16, 1)])
@pytest.mark.parametrize(
    ("dtype", "D", "page_size"), [(E4M3, 128, 64), (E4M3, 64, 16), (BF16, 128, 128), (BF16, 16, 32)]
)
def test_on_the_device(dtype, D, page_size, R, n, n_linear, n_queries):
    if jax.default_backend() != "gpu":
        pytest.skip("needs an NVIDIA GPU")
    Requests(dtype, [5000, 777, 1, 0, 12345], [n_queries, 1, 1, 0, n_queries], page_size, D, R, n, n_linear).check(
        False
    )


@pytest.mark.parametrize(("dtype", "T", "R"), [(E4M3, 32, 8), (BF16, 128, 8), (E4M3, 32, 2), (BF16, 32, 16)])
def test_it_lowers(dtype, T, R):
    """32 requests of 128K in pages of 64."""
    n_requests, P, size = 32, 2048, 64
    n, i32, f32 = n_requests * P, jnp.int32, jnp.float32
    config = scan_sketch.heuristic(T, n_requests, R, 4, P * size // 128)

    def both(codes, code_scales, k_scale, table, q, w, limit, tiles, threshold):
        pages = Pages(table=table, size=size, n_pages=n)
        operands = Scanned(codes, code_scales, k_scale if dtype == E4M3 else None, pages)
        heads = ScanHeads(q=q, w=w, n_linear=1, n=R)
        columns = Columns(limit=limit, n=P * size, tiles=tiles)
        return (
            scan_sketch.scan_masks(operands, heads, columns, threshold, config=config),
            scan_sketch.scan_sort_keys(operands, heads, columns, step=4, config=config),
        )

    keys = ((n * size, 64), jnp.uint8), ((n * size, 4), BF16), ((n * size,), f32), ((n,), i32)
    queries = ((T, R, 128), dtype), ((T, R), f32), ((T,), i32), ((T + n_requests, 4), i32), ((T,), i32)
    assert "hisa_scan_sketch" in lower(both, *keys, *queries)
