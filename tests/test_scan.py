"""The stages of the scan, one by one, where a mistake would hardly show in what is selected."""

import jax.numpy as jnp
import numpy as np
import pytest

import hisa_jax as hj
from hisa_jax.layout import Contiguous, Keys
from hisa_jax.testing.oracle import scan as oracle
from hisa_jax.xla import scan, topk
from hisa_jax.xla.stages import Queries

LIMIT = np.iinfo(np.int32).max


def queries_of(q, w, visible):
    """Of one tile: q [t, H, D], w [t, H], visible [t]."""
    return Queries(jnp.asarray(q, jnp.float32), jnp.asarray(w, jnp.float32), jnp.asarray(visible, jnp.int32))


def keys_of(k, scales=None):
    return Keys(jnp.asarray(k, jnp.float32), None if scales is None else jnp.asarray(scales, jnp.float32))


def sequence_of(k, scales=None):
    return Contiguous(keys_of(k, scales), jnp.int32(0), len(k))


def test_samples_are_strided_over_all_that_is_visible():
    visible = [0, 1, 255, 256, 257, 512, 513, 131072, 131073, LIMIT]
    got = np.asarray(scan.sample_positions(jnp.array(visible, jnp.int32)))
    assert got.dtype == np.int32
    for n, positions in zip(visible, got.tolist(), strict=True):
        wanted = list(range(0, n, oracle.step_of(n)))
        assert positions == wanted + [-1] * (256 - len(wanted)), n


def test_a_sample_that_is_not_there_has_no_score():
    queries, k = queries_of([[[1], [-1]]], [[2, 3]], [3]), [[4], [5], [-6]]
    got = scan.sample(queries, sequence_of(k), jnp.array([[0, 2, -1]]))
    assert got.products[0, :, :2].tolist() == [[4, -6], [-4, 6]]
    assert topk.score_of(got.sort_key)[0, :2].tolist() == [8, 18] and got.sort_key[0, 2] == topk.INVISIBLE


def test_a_head_is_open_where_its_product_is_above_0_at_one_of_the_best():
    products = jnp.array([[[1.0, 0.0, -1.0, 2.0, np.nan, np.inf]]])
    is_best = jnp.array([[True, True, True, False, True, True]])
    assert scan.open_heads(products, is_best).tolist() == [[2]]


def test_the_best_samples_are_32_or_all_and_a_tie_goes_to_the_lower_position():
    sort_key = (
        jnp.asarray(np.full((3, 256), topk.INVISIBLE, np.int32)).at[0, :40].set(7).at[0, 38].set(9).at[1, :5].set(7)
    )
    is_best, n_best = scan.best_samples(sort_key)
    assert n_best.tolist() == [32, 5, 0]
    assert np.flatnonzero(is_best[0]).tolist() == [*range(31), 38]
    assert np.flatnonzero(is_best[1]).tolist() == [*range(5)]


def test_the_virtual_head_is_the_weighted_sum_of_heads_of_either_sign():
    queries, slopes = queries_of([[[1, 2], [3, 5]]], [[2, -3]], [4]), jnp.array([[0.5, 1.0]])
    for exact, wanted in (([], [1 - 9, 2 - 15]), ([1], [1, 2]), ([0, 1, -1], [0, 0])):
        assert scan.virtual_head(queries, slopes, jnp.array([exact], jnp.int32)).tolist() == [wanted]


def test_exact_heads_are_those_of_greatest_weight_times_query_and_a_tie_goes_to_the_lower():
    q = [[[3, 4], [1, 0], [0, -5], [5, 0]]]  # sizes 5, 4, 10, 10
    queries = queries_of(q, [[-1, 4, 2, -2]], [4])
    assert scan.exact_heads(queries, hj.Scan(exact_heads=3)).tolist() == [[0, 2, 3]]
    assert scan.exact_heads(queries, hj.Scan(exact_heads=1)).tolist() == [[2]]
    # No more than there are, however many are wanted: each costs a product with every key.
    heads = scan.scan_heads(queries, jnp.zeros((1, 2)), scan.exact_heads(queries, hj.Scan(exact_heads=2**31 - 1)))
    assert heads.w.tolist() == [[-1, 4, 2, -2]]


def test_what_is_infinite_in_an_exact_head_spoils_no_other():
    queries, slopes = queries_of([[[np.inf, 0], [3, 5]]], [[2, -3]], [4]), jnp.ones((1, 2))
    virtual = scan.virtual_head(queries, slopes, jnp.array([[0]]))
    assert virtual.tolist() == [[-9, -15]]
    heavy = queries_of([[[1, 2], [3, 5]]], [[-np.inf, -3]], [4])
    assert scan.virtual_head(heavy, slopes, jnp.array([[0]])).tolist() == [[-9, -15]]
    heads = scan.scan_heads(queries, virtual, jnp.array([[0, 1]]))
    assert heads.exact[0, 1:].tolist() == [[3, 5]] and heads.w.tolist() == [[2, -3]]


@pytest.mark.parametrize("scales", [None, [1, 1, -2, 0.5, 1]])
def test_a_scan_score_is_the_keys_scale_times_the_products_with_the_heads(scales):
    k, virtual = np.arange(-5, 5).reshape(5, 2), np.array([[1.0, 2], [-1, 3], [0, 1]])
    exact, w = np.array([[[1, 1], [-1, 0]], [[2, -1], [0, -3]], [[1, 0], [0, 0]]]), np.array([[2, -1], [1, 3], [-5, 0]])
    wanted = virtual @ k.T + np.einsum("tn,tns->ts", w, np.maximum(exact @ k.T, 0))
    heads = scan.ScanHeads(*(jnp.asarray(x, jnp.float32) for x in (virtual, exact, w)))
    got = scan.scores(heads, keys_of(k, scales))
    np.testing.assert_array_equal(got, wanted * (1 if scales is None else np.array(scales)))


def kept(scores, visible, method, tile_s=128):
    """The units that a query keeps of a sequence whose scan scores are `scores`."""
    k = np.array(scores, np.float32).reshape(-1, 1)
    eligible = jnp.array([-(-visible // method.unit)])
    m = min(method.block_topk, -(-len(k) // method.unit))
    seen = jnp.array([visible], jnp.int32)
    heads = scan.ScanHeads(jnp.ones((1, 1)), jnp.zeros((1, 0, 1)), jnp.zeros((1, 0)))
    best = scan.best_units(heads, seen, eligible, sequence_of(k), method, m, tile_s)
    return [unit for unit in best.positions[0].tolist() if unit >= 0]


def test_a_unit_scores_what_its_best_visible_token_does():
    method = hj.Scan(topk=4, candidates=6, unit=2)
    scores = [0, 0, 5, -9, 4, 4, -1, 6, 0, 99]  # token 9 is not visible, its unit is the last
    assert kept(scores, 9, method) == [0, 3, 4]
    assert kept([0, 0, 5, -9, 4, 4, -1, 5, 0, 0], 9, method) == [0, 1, 4]  # a tie goes to the lower unit
    assert kept(scores, 6, method) == [0, 1, 2]


def test_the_first_and_last_units_are_kept_whatever_they_score():
    scores = [-5.0] * 20
    scores[7] = scores[9] = 1
    assert kept(scores, 20, hj.Scan(topk=2, candidates=5, keep_first=2)) == [0, 1, 7, 9, 19]
    assert kept(scores, 20, hj.Scan(topk=2, candidates=5, keep_last=3)) == [0, 7, 17, 18, 19]
    assert kept([np.nan, *scores[1:19], -np.inf], 20, hj.Scan(topk=2, candidates=3)) == [0, 7, 19]


@pytest.mark.parametrize("S", [129, 128 * 33 + 5])
def test_every_tile_is_scanned_to_the_last_token(S):
    # The best lie at tile edges and at the end, which a tile of 128 only reaches by beginning before its own start.
    best = sorted({0, 1, *(at for at in (126, 127, 128, 255, 256) if at < S - 2), S - 2, S - 1})
    scores = np.zeros(S)
    scores[best] = 1
    for unit in (1, 32):
        units = sorted({at // unit for at in best})
        method = hj.Scan(topk=1, candidates=len(units) * unit, unit=unit)
        assert kept(scores, S, method) == units
