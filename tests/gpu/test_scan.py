"""The scan by kernels keeps the contract: its tokens are the best of a set that holds those it is to score.

Lists are made short, so that few tokens do. A program takes 5 to 8 seconds to compile, a case half a second to run,
with Mosaic's interpreter up to two minutes.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call  # what was found has no public name
from jax.experimental.pallas import mosaic_gpu as plgpu

import hisa_jax as hj
from hisa_jax import dispatch
from hisa_jax.kernels_pallas import mosaic_gpu, scan, triton
from hisa_jax.kernels_pallas.flat_call import FlatCall
from hisa_jax.kernels_pallas.indexer import Indexer
from hisa_jax.kernels_pallas.operands import ScanHeads
from hisa_jax.kernels_pallas.sequences import Sequences
from hisa_jax.kernels_pallas.sort_key import score_of, sort_key_of
from hisa_jax.layout import Call, Keys
from hisa_jax.pallas import Kernels
from tests import draw, isolation, oracle
from tests.gpu import test_paged as paged

pytestmark = [
    pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),  # the interpreter's, of infinity
]
METHOD = hj.Scan(topk=40, candidates=80, exact_heads=2)
E4M3, BF16 = jnp.float8_e4m3fn, jnp.bfloat16
SHAPE = draw.Shape(2, 5, 700, 16, 64)  # of it every form but pages is one program a dtype


@pytest.fixture(autouse=True)
def short_lists(monkeypatch):
    """128 tokens, and every fourth key is sampled. No queries are few: these are those of test_scan_lists.py."""
    monkeypatch.setattr(scan, "FEW", 0)
    monkeypatch.setattr(scan, "_LISTED", 128)
    monkeypatch.setattr(scan, "_RANK", 16)
    monkeypatch.setattr(scan, "_DEVIATIONS", 1)
    ask = scan.ask_of(METHOD, 700)
    assert ask.most == 128 and ask.step == 4


BACKENDS = {
    "triton": Kernels(lambda: dispatch.backend("triton"), interpret=True),
    "mosaic_gpu": Kernels(
        lambda: dispatch.backend("mosaic_gpu"), interpret=plgpu.InterpretGPUParams(detect_races=True)
    ),
}


@pytest.fixture(params=["triton", pytest.param("mosaic_gpu", marks=pytest.mark.exhaustive)])
def select(request, monkeypatch):
    """`hj.select` on interpreted kernels; no race may have been found by the end."""
    interpret_pallas_call.reset_gpu_interpret_mode_state()
    # As many that few queries have one each, or fewer than there are queries.
    monkeypatch.setattr(mosaic_gpu.stages, "n_sms", lambda: 16 if scan.FEW else 3)
    # Its flat indexer is faster at sizes that an interpreter can run.
    monkeypatch.setattr(mosaic_gpu, "select_scan", Indexer(mosaic_gpu.stages).select_scan)
    assert 64 * METHOD.block_topk < SHAPE.S * SHAPE.H
    able = dispatch.Implementation(why_not=lambda device, problem: None, select=BACKENDS[request.param].select)
    monkeypatch.setitem(dispatch.IMPLEMENTATIONS, "interpreted", able)
    yield functools.partial(hj.select, implementation="interpreted")
    if request.param == "mosaic_gpu":
        assert not interpret_pallas_call.get_races().races_found


def keys_of(k, dtype, seed=3):
    """Keys of a dtype; e4m3 with scales."""
    k = draw.cast(k, dtype)
    if dtype == "bfloat16":
        return jnp.asarray(k)
    scales = 2.0 ** np.random.default_rng(seed).integers(-1, 2, k.shape[:-1])
    return hj.QuantizedKeys(jnp.asarray(k), jnp.asarray(scales, jnp.float32))


def assert_keeps_the_contract(select, q, k, w, method=METHOD, tolerance=1e-4, **options):
    arrays = jax.tree.map(jnp.asarray, (q, k, w))
    got = select(*arrays, method, return_scores=True, **jax.tree.map(jnp.asarray, options))
    reference = oracle.select(q, k, w, method, **options)
    oracle.assert_same_selection(got.indices, got.count, reference, tolerance, scores=got.scores, may_keep_more=True)
    return got


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn"])
def test_a_batch_of_any_lengths(select, dtype):
    q, k, w = draw.inputs(*SHAPE)
    w[0, 0] = -np.abs(w[0, 0])  # no score above 0
    positions = np.array([[699, 698, 300, 128, 127], [79, 500, 0, -1, 257]], np.int32)
    for lengths in ([700, 700], [650, 258]):
        options = dict(query_positions=positions, lengths=np.array(lengths, np.int32))
        assert_keeps_the_contract(select, draw.cast(q, dtype), keys_of(k, dtype), w, **options)


@pytest.mark.parametrize("step", [1, 4])
def test_a_scan_score_is_the_scale_times_linear_and_closed_products(step):
    # Two queries of the second of two sequences. Rows: the virtual head, an exact head, two that are none.
    rng = np.random.default_rng(0)
    q, w = rng.integers(-2, 3, (4, 4, 64)).astype(float), rng.integers(-2, 3, (4, 4)).astype(float)
    q[:, 2:], w[:, 2:] = 0, 0
    k, k_scale = rng.integers(-2, 3, (600, 64)).astype(float), 2.0 ** rng.integers(-1, 2, 600)
    k[308, 5], k[312, 5] = np.inf, -np.inf
    heads = ScanHeads(q=jnp.asarray(q, BF16), w=jnp.asarray(w, jnp.float32), n_linear=1, n=2)
    sequences = Sequences(
        query_starts=np.array([0, 1, 4]), key_starts=np.array([0, 304]), lengths=np.array([299, 290]), max_keys=299
    )
    visible = np.array([299, 290, 5, 0], np.int32)
    call = FlatCall(
        q=heads.q, w=heads.w, visible=jnp.asarray(visible), k=jnp.asarray(k, BF16),
        k_scale=jnp.asarray(k_scale, jnp.float32), sequences=sequences,
    )  # fmt: skip
    got = triton.stages.scan_sort_keys(call, heads, step, True)
    for t, first in enumerate((0, 304, 304, 304)):
        own = slice(first, first + visible[t], step)
        with np.errstate(invalid="ignore"):
            products = k[own] @ q[t].T
            wanted = (w[t, 0] * products[:, 0] + w[t, 1] * np.maximum(products[:, 1], 0)) * k_scale[own]
        wanted = np.where(np.isnan(wanted), -np.inf, wanted)
        np.testing.assert_array_equal(score_of(got[t, : len(wanted)]), wanted)
        if step == 1 and len(wanted):
            # A threshold in the middle, and the one that even NaN passes.
            for threshold in (np.median(wanted), -np.inf):
                least = jnp.full((4,), sort_key_of(jnp.float32(threshold)))
                masks = triton.stages.scan_masks(call, heads, least, METHOD, True)
                tokens, count = triton.stages.list_tokens(masks, call.visible, 320, interpret=True)
                passed = wanted >= threshold
                passed[[0, -1]] = True  # always
                np.testing.assert_array_equal(tokens[t, : int(count[t])], np.flatnonzero(passed))


def rows_of_keys(period):
    """Keys that score by their place: the first feature is high where a sample is, or where none is."""
    q, k, w = (np.zeros_like(x) for x in draw.inputs(*SHAPE))
    q[..., 0], w[..., 0] = 1, 1
    k[..., 0] = np.where(np.arange(SHAPE.S) % 4 == 0, *period) + np.random.default_rng(0).integers(0, 50, k.shape[:2])
    return q, k, w


@pytest.mark.parametrize("period", [(200, 1), (1, 200)], ids=["sampled_are_best", "sampled_are_worst"])
def test_where_samples_mislead_other_thresholds_are_tried(select, period):
    q, k, w = rows_of_keys(period)
    assert_keeps_the_contract(select, draw.cast(q, "bfloat16"), keys_of(k, "bfloat16"), w, tolerance=0.0)


def test_of_tokens_that_tie_the_first_are_scored(select):
    # All of them, and then all but a few that are better: by far more than there is room for.
    dtype = "bfloat16"
    q, k, w = draw.few_scores(*SHAPE)  # whole numbers, so that equal keys tie wherever they stand
    k = np.broadcast_to(k[:, :1], k.shape)
    got = assert_keeps_the_contract(select, draw.cast(q, dtype), keys_of(k, dtype), w)
    np.testing.assert_array_equal(got.indices, np.broadcast_to(np.arange(40), got.indices.shape))
    q, k, w = rows_of_keys((1, 1))
    k[..., 0] = 1
    k[:, [50, 99, 333, 600, 698]] = 9
    got = assert_keeps_the_contract(select, draw.cast(q, dtype), keys_of(k, dtype), w, tolerance=0.0)
    np.testing.assert_array_equal(got.indices[0, -1], [*range(35), 50, 99, 333, 600, 698])


def test_the_first_and_the_last_token_are_scored_whatever_the_scan_makes_of_them(select):
    # Heads 0 and 1 are the exact ones, and 0 everywhere. Heads 2 and 3 are open nearly everywhere, so the scan adds
    # features 0 and 1: that makes -50 of the first and of the last token, which score 50.
    q, k, w = (np.zeros_like(x) for x in draw.inputs(*SHAPE))
    w[..., :4] = 1
    q[..., 0, 2] = q[..., 1, 2] = 9
    q[..., 2, 0] = q[..., 3, 1] = 1
    k[..., 0], k[..., 1] = np.random.default_rng(0).integers(0, 9, k.shape[:2]), 1
    k[:, [0, 699], :2] = 50, -100
    positions = np.full((2, 5), 699, np.int32)
    arrays = draw.cast(q, "bfloat16"), keys_of(k, "bfloat16"), w
    got = assert_keeps_the_contract(select, *arrays, query_positions=positions, lengths=np.array([700, 700], np.int32))
    assert (np.asarray(got.indices)[..., [0, -1]] == [0, 699]).all()


@pytest.mark.parametrize(
    ("form", "dtype"),
    [
        ("batch", "float8_e4m3fn"),
        pytest.param("batch", "bfloat16", marks=pytest.mark.exhaustive),
        pytest.param("pages", "float8_e4m3fn", marks=pytest.mark.exhaustive),
    ],
)
def test_what_a_query_does_not_see_changes_nothing(select, form, dtype):
    if form == "batch":
        call = isolation.batch(select, METHOD, dtype)
    else:
        select = functools.partial(hj.select_paged, implementation="interpreted")
        call = isolation.paged(select, METHOD, dtype, page_size=32, n_queries=(4, 9, 1, 2))
    isolation.assert_isolated(call, METHOD)


@pytest.mark.parametrize("where", ["q", "k", "w"])
def test_any_input_may_hold_nan_or_infinity(select, where):
    arrays = draw.inputs(*SHAPE)._asdict()
    for value in (np.nan, np.inf, -np.inf):
        poisoned = {name: x.copy() for name, x in arrays.items()}
        poisoned[where][0, 1] = value
        poisoned[where][1, -1, ..., 0] = value
        poisoned |= {name: draw.cast(poisoned[name], "bfloat16") for name in "qk"}
        assert_keeps_the_contract(select, **poisoned)


def test_numbers_that_are_no_e4m3(select):
    arrays = draw.inputs(*SHAPE)._asdict()
    arrays["w"][0, 1], arrays["w"][0, 2, 3], arrays["w"][0, 3, 2] = np.inf, np.nan, -np.inf
    arrays["w"][1, 0], arrays["w"][1, 1] = 1e-30, 1e30
    k = keys_of(arrays["k"], "float8_e4m3fn")
    k = hj.QuantizedKeys(k.values.at[1, 77, 3].set(jnp.nan), k.scales)
    assert_keeps_the_contract(select, draw.cast(arrays["q"], "float8_e4m3fn"), k, arrays["w"])


@pytest.mark.parametrize(
    ("method", "dtype"),
    [
        pytest.param(hj.Scan(**options, topk=24, candidates=80), dtype, id=f"{name}-{dtype}", marks=marks)
        for name, in_gate, options in (
            ("no_exact_heads", "bfloat16", dict(exact_heads=0, keep_first=0, keep_last=3)),
            ("plain", "float8_e4m3fn", dict(exact_heads=14, slopes="plain", keep_first=5)),
            ("all_forced", None, dict(exact_heads=1, keep_first=40, keep_last=40)),
        )
        for dtype in ("bfloat16", "float8_e4m3fn")
        for marks in (() if dtype == in_gate else pytest.mark.exhaustive,)
    ],
)
def test_methods(select, method, dtype):
    q, k, w = draw.inputs(*SHAPE)
    assert_keeps_the_contract(select, draw.cast(q, dtype), keys_of(k, dtype), w, method)


@pytest.mark.parametrize("queries", [4, pytest.param(16, marks=pytest.mark.exhaustive)])
def test_a_packed_batch_some_queries_at_a_time(select, monkeypatch, queries):
    del select
    monkeypatch.setattr(scan, "queries_at_a_time", lambda method, max_keys: queries)
    q, k, w = (x.reshape(-1, *x.shape[2:]) for x in draw.inputs(1, 10, 900, 16, 64))
    q, k = draw.cast(q, "float8_e4m3fn"), keys_of(k, "float8_e4m3fn")
    # An empty sequence, one shorter than the candidates, padding after the last.
    cu_q, cu_k = np.array([0, 3, 3, 5, 9], np.int32), np.array([0, 333, 350, 387, 893], np.int32)
    arrays = jax.tree.map(jnp.asarray, (q, k, w, cu_q, cu_k))
    got = hj.select_packed(*arrays, METHOD, implementation="interpreted")
    reference = oracle.select_packed(q, k, w, cu_q, cu_k, METHOD)
    oracle.assert_same_selection(got.indices, got.count, reference, 1e-4, may_keep_more=True)


@pytest.mark.parametrize(("page_size", "dtype"), [(32, E4M3), pytest.param(64, BF16, marks=pytest.mark.exhaustive)])
def test_keys_in_pages(select, page_size, dtype):
    del select
    requests = paged.draw(**paged.PREFILL_AND_DECODE, page_size=page_size, dtype=dtype, normal=True)
    got = requests.select("interpreted", METHOD, return_blocks=False)
    assert_requests_keep_the_contract(requests, got, METHOD, 1e-4)


def test_sketches_in_pages(select):
    """Those that they keep, in place of the keys."""
    del select
    requests = paged.draw(**paged.PREFILL_AND_DECODE, page_size=32, dtype=E4M3, normal=True, sketch="int4")
    method = dataclasses.replace(METHOD, sketch="int4")
    got = requests.select("interpreted", method, return_blocks=False)
    assert_requests_keep_the_contract(requests, got, method, 1e-4)
    cache = dataclasses.replace(requests.cache, code_scales=requests.cache.code_scales.at[:].set(jnp.nan))
    unsure = dataclasses.replace(requests, cache=cache).select("interpreted", method, return_blocks=False)
    assert (np.asarray(unsure.indices) != np.asarray(got.indices)).any()


def assert_requests_keep_the_contract(requests, got, method, tolerance):
    k = requests.k if requests.k_scale is None else hj.QuantizedKeys(requests.k, requests.k_scale)
    cu_seqlens_k = np.cumsum([0, *np.asarray(requests.lengths)])
    reference = oracle.select_packed(requests.q, k, requests.w, requests.cu_seqlens_q, cu_seqlens_k, method)
    oracle.assert_same_selection(got.indices, got.count, reference, tolerance, may_keep_more=True)


@pytest.mark.parametrize("S", [2**16, 2**18, 2**20])
@pytest.mark.parametrize("candidates", [2048, 8192])
def test_samples_seldom_mislead_however_far_apart_they_are(monkeypatch, S, candidates):
    """Of the best `least` fewer than `rank` are samples, and of the best `most` more: 4 standard deviations away."""
    monkeypatch.undo()
    least, most, rank, step = scan.ask_of(hj.Scan(topk=2048, candidates=candidates), S)
    least, most = least / step, most / step
    assert least + 4 * least**0.5 <= rank and rank + rank // 64 <= most - 4 * most**0.5 and S // step <= 32768


@pytest.mark.parametrize(("S", "H", "is_flat"), [(20480, 64, True), (20488, 64, False), (40960, 32, True)])
def test_where_the_flat_indexer_is_faster_it_scores_every_token(monkeypatch, S, H, is_flat):
    class Stages:
        flat = staticmethod(lambda call, topk, interpret: (topk, "flat"))

    for name in ("select", "select_few"):
        monkeypatch.setattr(scan, name, lambda stages, call, method, interpret: (method.topk, "scan"))
    q, k, w = jnp.zeros((1, 4, H, 128), BF16), jnp.zeros((1, S, 128), BF16), jnp.zeros((1, 4, H))
    call = Call(q=q, w=w, visible=jnp.full((1, 4), S, jnp.int32), k=Keys(k, None))
    got = Indexer(Stages, flat_up_to=2.5).select_scan(call, hj.Scan())
    assert got == (2048, "flat" if is_flat else "scan")
