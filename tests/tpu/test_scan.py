"""The scan's TPU kernels: interpreted, against the selection of exactly the candidates, and compiled at real sizes."""

import jax.numpy as jnp
import numpy as np
import pytest

import hisa_jax as hj
from bench import shapes
from bench.tpu import aot
from bench.tpu.rows import SCANS, call_of, indexer_operands
from hisa_jax.kernels_pallas import mosaic_tpu
from hisa_jax.kernels_pallas.mosaic_tpu import scan, scan_stages
from hisa_jax.kernels_pallas.mosaic_tpu.config import Choice
from hisa_jax.layout import Call, Keys
from hisa_jax.xla.scan import ScanHeads
from tests.gpu import draw, reference

BF16 = jnp.bfloat16
NEAR = 1e-5
# Random queries side by side want different units, so that lists are long: as many as eight queries keep.
SMALL = hj.Scan(topk=24, candidates=48, exact_heads=2, unit=4)


def run(method, inputs, visible, interpret):
    q, k, k_scale, w = inputs
    B, S, _ = k.shape
    lengths = jnp.full((B,), S, jnp.int32)
    call = Call(q=q, w=w, visible=jnp.asarray(visible, jnp.int32), k=Keys(k, k_scale), lengths=lengths)
    indices, count = call.unflatten(mosaic_tpu.select_scan(call, method, interpret))
    return np.asarray(indices), np.asarray(count)


def check(got, method, inputs, visible, tolerance):
    """At least as good as the best of exactly the candidates: the n-th best score of both compared, for every n."""
    (indices, count), (q, k, k_scale, w) = got, inputs
    positions, keys = jnp.asarray(visible, jnp.int32) - 1, k if k_scale is None else hj.QuantizedKeys(k, k_scale)
    wanted = hj.select(q, keys, w, method, query_positions=positions, implementation="xla")
    for b, t in np.ndindex(*np.shape(visible)):
        n_visible = int(visible[b][t])
        assert count[b, t] == min(n_visible, method.topk)
        scale = None if k_scale is None else k_scale[b]
        scores = reference.token_scores(q[b, t : t + 1], k[b], scale, w[b, t : t + 1])[0]
        check_query(indices[b, t], np.asarray(wanted.indices[b, t]), scores, n_visible, tolerance, (b, t))


def check_query(chosen, wanted, scores, n_visible, tolerance, which):
    """`check` of one query, by the scores of all its sequence's tokens."""
    n = min(n_visible, len(chosen))
    assert (chosen[n:] == -1).all() and (np.diff(chosen[:n]) > 0).all() and (chosen[:n] >= 0).all(), which
    assert n == 0 or chosen[n - 1] < n_visible, which
    own, least = (np.sort(np.nan_to_num(scores[x[:n]], nan=-np.inf)) for x in (chosen, wanted))
    assert (own >= least - tolerance * np.nanstd(scores)).all(), which


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "B", "T", "S", "visible", "dtype"),
    [
        # A tile that is not full, a query that sees nothing, few and all tokens.
        pytest.param(SMALL, 1, 9, 350, [[0, 1, 3, 40, 48, 49, 166, 348, 350]], BF16, id="units_of_4"),
        pytest.param(
            hj.Scan(topk=40, candidates=96, exact_heads=4, keep_first=5, keep_last=3), 1, 72, 1500, None, BF16,
            id="tokens_in_pairs", marks=pytest.mark.exhaustive,
        ),
        pytest.param(
            hj.Scan(topk=32, candidates=64, exact_heads=0, unit=2, slopes="plain"), 2, 11, 1111, None, BF16,
            id="virtual_head_alone", marks=pytest.mark.exhaustive,
        ),
        pytest.param(
            hj.Scan(topk=40, candidates=1024, unit=16), 1, 9, 3000, None, BF16,
            id="units_of_16", marks=pytest.mark.exhaustive,
        ),
        pytest.param(
            hj.Scan(topk=32, candidates=96), 2, 9, 777, None, jnp.int8,
            id="tokens_of_8_bits_in_fours", marks=pytest.mark.exhaustive,
        ),
        pytest.param(
            hj.Scan(topk=32, candidates=96, unit=8), 1, 9, 1500, None, jnp.float8_e4m3fn,
            id="units_of_8_of_8_bits", marks=pytest.mark.exhaustive,
        ),
    ],
)  # fmt: skip
def test_chooses_among_at_least_the_candidates(interpret, few_share, method, B, T, S, visible, dtype):
    if visible is None:
        visible = np.broadcast_to(np.arange(S - T + 1, S + 1), (B, T))
    for seed, drawn in enumerate((draw.integers, draw.normal)):
        inputs = drawn(seed, B, T, S, 16, 128, dtype, dtype != BF16)
        check(run(method, inputs, visible, interpret), method, inputs, visible, NEAR)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # of the reference, by infinity
@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
def test_a_key_that_is_not_finite_hides_no_other_of_its_unit(interpret, few_share, bad):
    q, k, k_scale, w = draw.normal(2, 1, 8, 512, 16, 128, BF16, False)
    inputs, visible = (q, k.at[0, 100::97].set(bad), k_scale, w), [[*range(505, 513)]]
    check(run(SMALL, inputs, visible, interpret), SMALL, inputs, visible, NEAR)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_lists_that_overflow_are_not_used(interpret, few_share, monkeypatch):
    """The flat indexer chooses, which leaves no candidate out."""
    monkeypatch.setattr(scan, "_MOST_LISTED", 1024)
    method, T, S = hj.Scan(topk=24, candidates=1024, exact_heads=0, unit=2), 8, 8192
    inputs, visible = draw.normal(3, 1, T, S, 16, 128, BF16, False), [[S] * T]
    indices, count = run(method, inputs, visible, interpret)
    q, k, _, w = inputs
    flat = hj.select(q, k, w, hj.Dsa(topk=24), query_positions=jnp.asarray(visible) - 1, implementation="xla")
    np.testing.assert_array_equal(indices, flat.indices)
    assert (count == 24).all()


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_list_has_every_unit_that_one_of_eight_queries_keeps(interpret):
    """And few more: a threshold may let a few more pass, each a unit that scores higher than those left out."""
    rng, unit, S, k = np.random.default_rng(4), 4, 2048, 32
    v, keys = rng.integers(-3, 4, (1, 16, 128)), rng.integers(-3, 4, (1, S, 128))
    heads = ScanHeads(jnp.asarray(v, jnp.float32), jnp.zeros((1, 16, 0, 128), BF16), jnp.zeros((1, 16, 0)))
    eligible = jnp.full((1, 16), S // unit, jnp.int32)
    choice = Choice(k=k, keep_first=1, keep_last=1, interpret=interpret)
    lists, counts = scan.scan(heads, eligible, Keys(jnp.asarray(keys, BF16), None), unit, choice=choice)
    scores = np.einsum("td,sd->ts", v[0], keys[0]).reshape(16, -1, unit).max(axis=2)
    for eight in range(2):
        n, own = int(counts[0, eight]), scores[eight * 8 : (eight + 1) * 8].astype(np.float64)
        own[:, [0, -1]] = np.inf
        listed = np.asarray(lists[0, eight])
        assert (listed[n:] == -1).all() and (np.diff(listed[:n]) > 0).all()
        threshold = np.sort(own, axis=1)[:, -k]
        assert np.isin(np.flatnonzero((own >= threshold[:, None]).any(axis=0)), listed[:n]).all()
        # The least that passes for some query, of those that were let in: an eighth more than k at most, and ties.
        least = np.sort(own, axis=1)[:, -(k + k // 8) - 1]
        assert (own[:, listed[:n]] >= least[:, None]).any(axis=0).all()


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.exhaustive if name != "scan_2" else ()) for name in SCANS]
)
def test_compiles(chip, name):
    """dsv32 at 128K, 4096 queries: 60 s on a busy machine."""
    method = SCANS[name]
    operands = indexer_operands(shapes.DSV32, 1, shapes.PREFILL.T, 128 << 10, "bf16")
    program = aot.compile_for(chip, lambda *x: mosaic_tpu.select_scan(call_of(*x), method), *operands, schedules=False)
    # Scores of all tokens would be 2 GiB.
    assert program.temp_bytes < 512 << 20


def test_refusals_say_why():
    for method, D, is_paged, sentence in (
        (hj.Scan(), 128, True, None),
        (hj.Scan(), 64, False, None),
        (hj.Scan(), 64, True, "needs heads of size 128 for a Scan of keys in pages, not 64"),
        (hj.Scan(sketch="int4"), 128, False, "has a Scan of the keys alone, not of a sketch='int4'"),
        (hj.Scan(unit=32), 128, False, "needs units of up to 16 tokens, not 32"),
    ):
        assert scan_stages.why_not(method, D, is_paged) == sentence
