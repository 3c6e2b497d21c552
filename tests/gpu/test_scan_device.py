"""The scan on a real GPU, at real sizes: stage by stage against interpret mode, whole against XLA's."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import hisa_jax as hj
from hisa_jax import dispatch
from hisa_jax.kernels_pallas.flat_call import flatten
from hisa_jax.kernels_pallas.sort_key import score_of, sort_key_of
from hisa_jax.kernels_pallas.triton.topk_body import KTH_SLACK
from tests import kernel_calls
from tests.gpu import draw
from tests.gpu import test_paged as paged

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning"),
]
E4M3, BF16 = jnp.float8_e4m3fn, jnp.bfloat16
METHOD = hj.Scan(topk=2048)


@pytest.fixture(params=["triton", "mosaic_gpu"])
def backend(request):
    if hj.implementations()[request.param]:
        pytest.skip(hj.implementations()[request.param])
    return request.param


def batch(seed, B, T, S, dtype, draw_arrays=draw.normal, H=64, D=128):
    q, k, scale, w = draw_arrays(seed, B, T, S, H, D, dtype, dtype == E4M3)
    return q, k if scale is None else hj.QuantizedKeys(k, scale), w


@functools.partial(jax.jit, static_argnames="n")
def scores_of(q, k, scale, w, n):
    """[T, H, D], [S, D], [S], [T, H] -> [T, n] float32, of the first n keys."""
    k, scale = k[:n].astype(jnp.float32), scale[:n]

    def one(row):
        products = jnp.einsum("hd,sd->hs", row[0].astype(jnp.float32), k, precision=lax.Precision.HIGHEST)
        return jnp.matmul(row[1], jnp.maximum(products, 0), precision=lax.Precision.HIGHEST) * scale

    return lax.map(one, (q, w))


def assert_best_of_more(indices, count, kept, scores, visible, topk, tolerance, what=""):
    """One query: the best of a set that holds the `kept` tokens, up to `tolerance` of the spread of scores."""
    chosen, scores = indices[:count], scores[:visible]
    assert count == min(topk, visible) and (indices[count:] == -1).all(), what
    assert (np.diff(chosen) > 0).all() and ((chosen >= 0) & (chosen < visible)).all(), what
    left_out = np.setdiff1d(kept[kept >= 0], chosen)
    if len(left_out) and count:
        missed = scores[left_out].max() - scores[chosen].min()
        assert missed <= tolerance * scores.std(), f"{what}: {missed} above the least of the chosen was left out"


def check(got, fewer, q, k, w, visible, method, tolerance):
    """[T] queries of one sequence; `fewer` is XLA's selection of a scan of somewhat fewer candidates."""
    values, scales = (k.values, k.scales) if isinstance(k, hj.QuantizedKeys) else (k, jnp.ones(k.shape[0]))
    scores = np.asarray(scores_of(q, values, scales, w, max(int(np.max(visible)), 1)))
    indices, count, kept = (np.asarray(x) for x in (got.indices, got.count, fewer.blocks))
    for t, seen in enumerate(np.asarray(visible)):
        assert_best_of_more(indices[t], count[t], kept[t], scores[t], int(seen), method.topk, tolerance, f"query {t}")


def fewer(method):
    """Hopper adds e4m3 products with 14 bits: near the threshold XLA's tokens may be others."""
    return hj.Scan(
        topk=method.topk,
        candidates=method.candidates - method.candidates // 50 if method.candidates > method.topk else method.topk,
        exact_heads=method.exact_heads,
        slopes=method.slopes,
        sketch=method.sketch,
    )


@pytest.mark.parametrize("dtype", [E4M3, BF16], ids=["e4m3", "bf16"])
@pytest.mark.parametrize(
    ("method", "B", "T", "S"),
    [
        (METHOD, 1, 512, 65536),
        (hj.Scan(topk=2048, candidates=4096, exact_heads=8), 1, 512, 65536),
        (hj.Scan(topk=2048, candidates=4096, exact_heads=0, slopes="plain"), 1, 100, 131072),
        (METHOD, 3, 77, 20001),
        (METHOD, 32, 1, 131072),
        (METHOD, 1, 32, 1 << 20),
    ],
    ids=["64k", "8_exact", "plain", "ragged", "decode_32", "1m"],
)
def test_a_batch_has_the_best_of_what_xlas_scan_keeps(backend, method, B, T, S, dtype):
    q, k, w = batch(0, B, T, S, dtype)
    got = hj.select(q, k, w, method, implementation=backend)
    wanted = hj.select(q, k, w, fewer(method), implementation="xla", return_blocks=True)
    visible = np.arange(S - T + 1, S + 1)
    for b in sorted({0, B - 1}):
        one = jax.tree.map(lambda x: x[b], (got, wanted, q, k, w))  # noqa: B023
        check(*one, visible, method, 2e-3 if dtype == E4M3 else 1e-5)


def test_a_prefill_from_its_first_token(backend):
    T = 24576
    q, k, w = batch(1, 1, T, T, E4M3, H=32)
    got = hj.select(q, k, w, METHOD, implementation=backend)
    rows = np.array([0, 1, 2047, 2048, 8191, 8192, 8193, 12287, 12288, 12289, 13000, 20000, T - 1])
    wanted = hj.select(
        q[:, rows], k, w[:, rows], fewer(METHOD), query_positions=jnp.asarray(rows[None], jnp.int32),
        implementation="xla", return_blocks=True,
    )  # fmt: skip
    one = jax.tree.map(lambda x: x[0, rows], got), *jax.tree.map(lambda x: x[0], (wanted, q[:, rows], k, w[:, rows]))
    check(*one, rows + 1, METHOD, 2e-3)


@pytest.mark.parametrize("page_size", [64, 128])
@pytest.mark.parametrize("queries", [[1, 1, 1, 0, 1], [300, 1, 8, 0, 1]], ids=["decode", "prefill_and_decode"])
@pytest.mark.parametrize("form", ["pages", "sketches", "packed"])
def test_requests_have_the_best_of_what_xlas_scan_keeps(backend, form, queries, page_size):
    if form == "packed" and page_size != 64:
        pytest.skip("has no pages")
    lengths = [20000, 131072, 9000, 0, 700]
    sketch = "int4" if form == "sketches" else None
    method = dataclasses.replace(METHOD, sketch=sketch)
    requests = paged.draw(lengths, queries, page_size, E4M3, H=64, D=128, normal=True, sketch=sketch)
    k, starts = hj.QuantizedKeys(requests.k, requests.k_scale), np.cumsum([0, *lengths])
    offsets = requests.cu_seqlens_q, jnp.asarray(starts, jnp.int32)

    def select(implementation, method, **options):
        if form != "packed":
            return requests.select(implementation, method, return_scores=False, **options)
        return hj.select_packed(requests.q, k, requests.w, *offsets, method, implementation=implementation, **options)

    got = select(backend, method, return_blocks=False)
    wanted = select("xla", fewer(method), return_blocks=True)
    for r, (first, end) in enumerate(zip(np.cumsum([0, *queries]), np.cumsum(queries), strict=False)):
        rows, keys = slice(max(first, end - 8), end), slice(starts[r], starts[r + 1])
        if first < end:
            one = *(jax.tree.map(lambda x: x[rows], x) for x in (got, wanted)), requests.q[rows]  # noqa: B023
            visible = lengths[r] - (end - np.arange(rows.start, rows.stop)) + 1
            check(*one, jax.tree.map(lambda x: x[keys], k), requests.w[rows], visible, method, 2e-3)  # noqa: B023
    assert (np.asarray(got.count)[sum(queries) :] == 0).all()


def test_equal_scores_keep_the_lowest_tokens(backend):
    T = 20  # up to 16 are the flat indexer's on Hopper
    q, k = jnp.ones((1, T, 64, 128), BF16), jnp.ones((1, 40000, 128), BF16)
    w, positions = jnp.ones((1, T, 64), jnp.float32), 39999 - 1000 * jnp.arange(T, dtype=jnp.int32)[None]
    got = hj.select(q, k, w, METHOD, query_positions=positions, implementation=backend)
    np.testing.assert_array_equal(got.indices, np.broadcast_to(np.arange(2048), (1, T, 2048)))


def test_where_samples_mislead_other_thresholds_are_tried(backend):
    method, T, S = (
        hj.Scan(topk=64, candidates=2048, exact_heads=2),
        20,
        30000,
    )  # up to 16 queries are the flat indexer's
    rng = np.random.default_rng(0)
    for sampled, other in ((200, 1), (1, 200)):
        q, k, w = (np.zeros(shape, np.float32) for shape in ((1, T, 64, 128), (1, S, 128), (1, T, 64)))
        q[..., 0], w[..., 0] = 1, 1
        k[0, :, 0] = np.where(np.arange(S) % 4 == 0, sampled, other) + rng.integers(0, 32, S)
        q, k, w = jnp.asarray(q, BF16), jnp.asarray(k, BF16), jnp.asarray(w)
        got = hj.select(q, k, w, method, implementation=backend)
        wanted = hj.select(q, k, w, method, implementation="xla", return_blocks=True)
        check(*jax.tree.map(lambda x: x[0], (got, wanted, q, k, w)), np.arange(S - T + 1, S + 1), method, 0.0)


def test_results_do_not_depend_on_the_batch(backend):
    q, k, w = batch(3, 2, 40, 16384, E4M3)
    method = hj.Scan(topk=512, candidates=1024)
    whole, again = (hj.select(q, k, w, method, implementation=backend) for _ in range(2))
    # More than 16: fewer are the flat indexer's.
    positions = jnp.broadcast_to(jnp.arange(16384 - 33, 16384 - 10, dtype=jnp.int32), (1, 23))
    part = hj.select(
        q[1:, 7:30], jax.tree.map(lambda x: x[1:], k), w[1:, 7:30], method, query_positions=positions,
        implementation=backend,
    )  # fmt: skip
    np.testing.assert_array_equal(whole.indices, again.indices)
    np.testing.assert_array_equal(whole.indices[1:, 7:30], part.indices)


def test_memory_holds_no_score_matrix(backend):
    """Bits, samples, lists of 12,288 tokens and their sort keys, of 4096 queries."""
    T, S = 4096, 65536
    q, k, w = (
        jax.ShapeDtypeStruct(*x) for x in (((1, T, 64, 128), E4M3), ((1, S, 128), E4M3), ((1, T, 64), "float32"))
    )
    select = jax.jit(lambda q, k, w: hj.select(q, k, w, METHOD, implementation=backend))
    assert select.lower(q, k, w).compile().memory_analysis().temp_size_in_bytes < T * (S // 8 + 4 * 4096 + 16 * 12288)


@pytest.mark.parametrize("dtype", [E4M3, BF16], ids=["e4m3", "bf16"])
def test_stages_are_those_interpreted(backend, dtype):
    """Of whole numbers, whose sums are exact."""
    stages, triton = dispatch.backend(backend).stages, dispatch.backend("triton").stages
    arrays = draw.integers(0, 2, 5, 3000, 64, 128, dtype, dtype == E4M3)
    visible = jnp.asarray([[3000, 2999, 1000, 257, 40], [2500, 1, 0, 64, 32]], jnp.int32)
    cpu = jax.devices("cpu")[0]
    call, call_there = (
        flatten(kernel_calls.call_of(*x), 8) for x in ((*arrays, visible), _on((*arrays, visible), cpu))
    )

    def interpreted(stage, *args):
        """On the CPU: interpreted programs write to the same place, in an order that a GPU does not keep."""
        with jax.default_device(cpu):
            args = [call_there if x is call else x if isinstance(x, int) else _on(x, cpu) for x in args]
            return getattr(triton, stage)(*args, interpret=True)

    for method in (
        hj.Scan(topk=64, exact_heads=n, slopes=slopes) for n in (0, 2, 8) for slopes in ("plain", "sampled")
    ):
        heads, wanted = stages.scan_heads(call, method), interpreted("scan_heads", call, method)
        seen = np.asarray(call.visible) > 0
        for x, y in ((heads.q, wanted.q), (heads.w, wanted.w)):
            np.testing.assert_array_equal(np.asarray(x, np.float32)[seen], np.asarray(y, np.float32)[seen])
        limit = -(-call.visible // 4)
        got, wanted = stages.scan_sort_keys(call, heads, 4), interpreted("scan_sort_keys", call, heads, 4)
        n = min(got.shape[1], wanted.shape[1])  # a backend may add columns
        there = np.arange(n) < np.asarray(limit)[:, None]
        x, y = (np.asarray(score_of(x[:, :n])) for x in (got, wanted))
        tolerance = 2e-3 if dtype == E4M3 else 1e-5
        np.testing.assert_allclose(x[there], y[there], rtol=tolerance, atol=tolerance * np.abs(y[there]).max())
        rank = jnp.minimum(limit, 100)
        threshold = stages.kth(got, limit, rank)
        for x, n, r, least in zip(*map(np.asarray, (got, limit, rank, threshold)), strict=True):
            reach, above = (x[:n] >= least).sum(), (x[:n] > least).sum()
            assert n == 0 or (reach >= r and (reach <= r + r // KTH_SLACK or above < r))
        masks = (
            stages.scan_masks(call, heads, threshold, method),
            interpreted("scan_masks", call, heads, threshold, method),
        )
        lists = [interpreted("list_tokens", x, call.visible, 512) for x in masks]
        got = stages.list_tokens(masks[0], call.visible, 512)
        is_list = np.asarray(lists[0][1]) <= 512
        np.testing.assert_array_equal(got[1], lists[0][1])
        np.testing.assert_array_equal(np.asarray(got[0])[is_list], np.asarray(lists[0][0])[is_list])
        if dtype == BF16:
            np.testing.assert_array_equal(lists[0][1], lists[1][1])
        tokens, count = (jnp.asarray(np.asarray(x)) for x in (lists[1][0], np.minimum(lists[1][1], 512)))
        got, wanted = (
            stages.refine_tokens(call, tokens, count, 64),
            interpreted("refine_tokens", call, tokens, count, 64),
        )
        for x, y in zip(got, wanted, strict=True):
            np.testing.assert_array_equal(x, y)


def _on(x, device):
    return jax.tree.map(lambda leaf: jax.device_put(leaf, device), x)


def test_masks_do_not_depend_on_when_copies_arrive(backend):
    """1M by 8 rows a query: a slot's thresholds were read while the copies of the next tile of keys overwrote them."""
    T, S, stages = 1024, 1 << 20, dispatch.backend(backend).stages
    arrays = draw.normal(5, 1, T, S, 64, 128, E4M3, True)

    @jax.jit
    def masks(q, k, scale, w):
        call = flatten(kernel_calls.call_of(q, k, scale, w, jnp.arange(S - T + 1, S + 1, dtype=jnp.int32)[None]), 8)
        threshold = jnp.full((T,), sort_key_of(jnp.float32(0)))
        # Words before the queries' own positions: what a query does not see may be anything.
        return stages.scan_masks(call, stages.scan_heads(call, METHOD), threshold, METHOD)[:, : (S - T) // 32]

    first = np.asarray(masks(*arrays))
    assert all(np.array_equal(first, masks(*arrays)) for _ in range(8))
