"""The streaming flat indexer and its merge, interpreted with race detection."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hisa_jax as hj
from hisa_jax.kernels_pallas import mosaic_gpu, sequences
from hisa_jax.kernels_pallas.flat_call import flatten
from hisa_jax.kernels_pallas.mosaic_gpu import flat, merge, stages
from hisa_jax.kernels_pallas.mosaic_gpu.ptx import gather_survivors
from hisa_jax.kernels_pallas.sort_key import score_of
from hisa_jax.layout import Call
from tests import kernel_calls
from tests.gpu import draw, promises, reference
from tests.gpu.test_lowering import lower
from tests.gpu.test_scores import unwritten

E4M3 = jnp.float8_e4m3fn
INVISIBLE = -(2**31)


def select(run, q, k, k_scale, w, visible, topk, n_ctas=132, interpret=False):
    batch = kernel_calls.call_of(q, k, k_scale, w, jnp.asarray(visible))
    call = flatten(batch, 8)
    options = dict(topk=topk, n_ctas=n_ctas, interpret=interpret)
    return batch.unflatten(run(call.operands, call.visible, call.sequences, **options))


@pytest.mark.slow
@pytest.mark.parametrize(
    "run", [flat.flat, pytest.param(flat.flat_with_sort_keys, marks=pytest.mark.exhaustive)], ids=["", "sort_keys"]
)
def test_streaming_in_filtered_tiles_equals_one_piece(interpret, monkeypatch, run):
    monkeypatch.setattr(flat, "ONE_TILE", 256)
    monkeypatch.setattr(flat, "MOST_BYTES", 0)  # or few queries would be taken all at once
    monkeypatch.setattr(flat, "FIRST", 512)
    monkeypatch.setattr(flat, "STEP", 512)  # rounded up to 1536, three spans of 384 being four steps of a selection
    visible = np.asarray([[2000, 300]], np.int32)
    q, k, scale, w = draw.integers(3, 1, 2, 2000, 16, 64, E4M3, True)
    indices, count, *sort_keys = select(run, q, k, scale, w, visible, 100, 2, interpret)
    promises.check_flat((indices, count), q, k, scale, w, visible, topk=100, token_tolerance=1e-9)
    scores = reference.token_scores(q[0], k[0], scale[0], w[0])
    for own in sort_keys:
        np.testing.assert_array_equal(score_of(own)[0], np.take_along_axis(scores, np.asarray(indices)[0], axis=1))


@pytest.mark.gate("1100-60-False")
@pytest.mark.parametrize(("S", "topk", "has_sort_keys"), [(1100, 60, False), (3500, 100, True), (3500, 101, False)])
def test_few_queries_take_the_best_of_parts_of_their_rows(interpret, monkeypatch, S, topk, has_sort_keys):
    """Of 3500 seven parts, whose best are in two lists, whose best are in one; a query sees less than a part."""
    monkeypatch.setattr(flat, "ONE_TILE", 256)
    monkeypatch.setattr(flat, "WIDTH", 512)
    visible = np.asarray([[S, 300]], np.int32)
    q, k, scale, w = draw.integers(3, 1, 2, S, 16, 64, E4M3, True)
    batch = kernel_calls.call_of(q, k, scale, w, jnp.asarray(visible))
    call = flatten(batch, 8)
    run, options = flat.flat_with_sort_keys if has_sort_keys else flat.flat, dict(n_ctas=2, interpret=interpret)
    positions, count, *sort_keys = run(call.operands, call.visible, call.sequences, topk=topk, **options)
    got = batch.unflatten((positions, count))
    promises.check_flat(got, q, k, scale, w, visible, topk=topk, token_tolerance=1e-9)
    if has_sort_keys:
        monkeypatch.setattr(flat, "MOST_BYTES", 0)
        monkeypatch.setattr(flat, "FIRST", 512)
        monkeypatch.setattr(flat, "STEP", 512)
        _, _, streamed = run(call.operands, call.visible, call.sequences, topk=topk, **options)
        np.testing.assert_array_equal(sort_keys[0], streamed)


def test_one_query_has_its_limit_looked_up_by_the_kernel(interpret, monkeypatch):
    """Its tile is no operand, and it stays in the ring for all spans of keys of a CTA."""
    monkeypatch.setattr(flat, "ONE_TILE", 256)
    monkeypatch.setattr(sequences.Sequences, "query_tiles", None)
    q, k, scale, w = draw.integers(3, 1, 1, 1100, 16, 64, E4M3, True)
    got = select(flat.flat, q, k, scale, w, np.asarray([[1005]], np.int32), 60, 2, interpret)
    promises.check_flat(got, q, k, scale, w, np.asarray([[1005]]), topk=60, token_tolerance=1e-9)


@pytest.mark.gate("1-1048576-64")
@pytest.mark.oldest
@pytest.mark.parametrize("page_size", [None, 64, 128])
@pytest.mark.parametrize(("T", "context"), [(1, 131072), (32, 131072), (128, 131072), (1, 1 << 20), (128, 1 << 20)])
def test_few_queries_take_a_kernel_for_scores_and_one_for_each_round(T, context, page_size):
    """One that selects up to 128K, two up to 1M: kernels of our own; XLA's say who scores what and take maxima."""

    def select(q, k, k_scale, w, visible, table, offsets):
        cache = None
        if page_size is not None:
            cache = dataclasses.replace(
                hj.init_cache(1, page_size, 128, E4M3),
                keys=k.reshape(-1, page_size, 128),
                scales=k_scale.reshape(-1, page_size),
            )
            call = Call(q=q[:, 0], w=w[:, 0], visible=visible[:, 0], query_offsets=offsets, table=table, cache=cache)
            return mosaic_gpu.select_flat(call, 2048)
        return mosaic_gpu.select_flat(kernel_calls.call_of(q, k, k_scale, w, visible), 2048)

    P, i32, f32 = context // (page_size or 64), jnp.int32, jnp.float32
    arrays = ((T, 1, 64, 128), E4M3), ((T, context, 128), E4M3), ((T, context), f32), ((T, 1, 64), f32), ((T, 1), i32)
    text = lower(select, *arrays, ((T, P), i32), ((T + 1,), i32))
    kernels = re.findall(r"custom_call @(?:mosaic_gpu_v2|__gpu\$xla\.gpu\.triton)", text)
    assert len(kernels) == (2 if context == 131072 else 3)


@pytest.mark.parametrize(("topk", "S"), [(4097, 131072), (8191, 131072), (8192, 131072), (16384, 32768)])
def test_few_queries_take_any_topk(topk, S):
    """Traced alone, a second for all.

    Groups of two neighbours are whole loads of four columns where topk is even. A row of 32,768 is wider in whole
    spans, too wide to be selected from.
    """
    shapes = (1, 1, 64, 128), (1, S, 128), (1, S), (1, 1, 64), (1, 1)
    dtypes = E4M3, E4M3, jnp.float32, jnp.float32, jnp.int32
    select = functools.partial(kernel_calls.select_flat, mosaic_gpu, topk=topk)
    positions, _ = jax.eval_shape(select, *map(jax.ShapeDtypeStruct, shapes, dtypes))
    assert positions.shape == (1, 1, topk)


def test_hisa_that_keeps_all_blocks_of_many_queries_is_the_flat_indexer(monkeypatch):
    """Traced alone: half a second."""

    def refine(*_):
        raise LookupError

    def select(T, S):
        shapes = (1, T, 64, 128), (1, S, 128), (1, S), (1, T, 64), (1, T)
        dtypes = E4M3, E4M3, jnp.float32, jnp.float32, jnp.int32
        hisa = functools.partial(kernel_calls.select_hisa, mosaic_gpu, topk=2048, block_size=128, block_topk=64)
        return jax.eval_shape(hisa, *map(jax.ShapeDtypeStruct, shapes, dtypes))

    monkeypatch.setattr(stages, "refine", refine)
    assert [x.shape for x in select(256, 8192)] == [(1, 256, 2048), (1, 256), (1, 256, 64)]
    for T, S in ((256, 8320), (128, 8192)):
        with pytest.raises(LookupError):
            select(T, S)


@pytest.mark.exhaustive
def test_hisa_that_is_the_flat_indexer_has_the_tokens_and_the_blocks_of_its_own_kernels(interpret, monkeypatch):
    q, k, scale, w = draw.integers(3, 1, 4, 300, 16, 64, E4M3, True)
    visible = jnp.asarray([[300, 130, 5, 0]], jnp.int32)
    options = dict(topk=40, block_size=128, block_topk=3, interpret=interpret)
    wanted = kernel_calls.select_hisa(mosaic_gpu, q, k, scale, w, visible, **options)
    monkeypatch.setattr(stages, "n_sms", lambda: 2)
    got = kernel_calls.select_hisa(mosaic_gpu, q, k, scale, w, visible, **options)
    jax.tree.map(np.testing.assert_array_equal, got, wanted)


def merge_case(seed, k, W, n_start, limit):
    """Old lists of k, a tile after them with ties at the threshold, its masks; and what the merge must give."""
    rng = np.random.default_rng(seed)
    T = len(limit)
    x = rng.integers(-30, 30, (T, n_start + W)).astype(np.int64)
    x = np.where(np.arange(n_start + W) < np.asarray(limit)[:, None], x, INVISIBLE)
    old = [reference.best(row[:n_start].astype(float), np.flatnonzero(row[:n_start] > INVISIBLE), k) for row in x]
    want = [reference.best(row.astype(float), np.flatnonzero(row > INVISIBLE), k) for row in x]
    pad = lambda values, empty: np.pad(values, (0, k - len(values)), constant_values=empty)  # noqa: E731
    best = np.stack([pad(row[chosen], INVISIBLE) for row, chosen in zip(x, old, strict=True)])
    positions = np.stack([pad(chosen, -1) for chosen in old])
    passed = x[:, n_start:] > best.min(1)[:, None]
    words = (passed.reshape(T, -1, 32).astype(np.uint64) << np.arange(32, dtype=np.uint64)).sum(-1).astype(np.uint32)
    rows = zip(x[:, n_start:], passed, strict=True)
    tile = np.stack([reference.side_by_side(*row, 12345) for row in rows])  # the rest is never read
    best, positions, tile, words = (
        jnp.asarray(a.astype(np.int32)) for a in (best, positions, tile, words.view(np.int32))
    )
    return (merge.Best(best, positions, None, None), (tile, words)), x, want


@pytest.mark.parametrize("n_start", [0, 2048])
def test_merge_keeps_the_lower_of_equals(interpret, n_start):
    limit = [n_start + 1024, n_start + 700, n_start + 5, max(n_start - 9, 0)]
    operands, x, want = merge_case(0, 512, 1024, n_start, limit)
    start, limit = jnp.full((1,), n_start, jnp.int32), jnp.asarray(limit, jnp.int32)
    check_merge(merge.merge(*operands, start, limit, n_ctas=2, interpret=interpret), x, want)


def check_merge(got, x, want):
    for t, chosen in enumerate(want):
        positions, best, least = (np.asarray(row[t]) for row in (got.positions, got.sort_keys, got.least))
        np.testing.assert_array_equal(positions[: len(chosen)], chosen)
        assert (positions[len(chosen) :] == -1).all()
        np.testing.assert_array_equal(best[: len(chosen)], x[t, chosen])
        assert (best[len(chosen) :] == INVISIBLE).all()
        assert got.n[t] == len(chosen)
        if len(chosen) < len(best):
            assert least == INVISIBLE
        else:
            assert np.delete(x[t], chosen).max(initial=INVISIBLE) <= least <= x[t, chosen].min()


@pytest.fixture
def hopper():
    if jax.default_backend() != "gpu" or mosaic_gpu.why_not(
        jax.devices()[0].compute_capability, 64, 128, E4M3, topk=64
    ):
        pytest.skip("needs a Hopper GPU")


@pytest.mark.gpu
@pytest.mark.parametrize(("n_start", "W", "k"), [(0, 13824, 2048), (8192, 13824, 2048), (2048, 1024, 512)])
def test_merge_on_the_device(hopper, n_start, W, k):
    """From nothing every sort key passes: the list is filled, cut down and filled again."""
    limit = [n_start + W, n_start + W // 2 + 3, n_start + 5, max(n_start - 9, 0), n_start + W]
    operands, x, want = merge_case(1, k, W, n_start, limit)
    check_merge(merge.merge(*operands, jnp.full((1,), n_start, jnp.int32), jnp.asarray(limit, jnp.int32)), x, want)


@pytest.mark.gpu
@pytest.mark.parametrize("rising", [False, True], ids=["any_order", "each_better_than_all_before"])
@pytest.mark.parametrize(
    ("S", "at_once"), [(40_000, False), (230_000, False), (300_000, True)], ids=["tiles", "turns_of_tiles", "at_once"]
)
def test_flat_on_the_device(hopper, monkeypatch, rising, S, at_once):
    """Two later tiles; eleven, of which eight are two turns of a loop; three levels of groups."""
    if not at_once:
        monkeypatch.setattr(flat, "MOST_BYTES", 0)
    visible = np.asarray([[S, S - 1, 30000, flat.FIRST, flat.FIRST + 1, 2049, 5, 0]], np.int32)
    q, k, scale, w = draw.normal(0, 1, 8, S, 64, 128, E4M3, True)
    if rising:
        q, k, w = jnp.ones_like(q), jnp.ones_like(k), jnp.ones_like(w)
        scale = jnp.arange(1, S + 1, dtype=jnp.float32)[None]
    got = select(flat.flat, q, k, scale, w, visible, 2048)
    promises.check_flat(got, q, k, scale, w, visible, topk=2048, token_tolerance=2e-3)


@pytest.mark.gpu
@pytest.mark.parametrize(("T", "S", "H"), [(1, 262144, 16), (1, 524288, 64), (2, 262144, 32)])
def test_calls_in_a_row_choose_the_same_on_the_device(hopper, T, S, H):
    """A CTA has more spans than there are slots: a slot that goes back too early is filled anew while it is read."""
    visible = np.full((1, T), S, np.int32)
    operands = draw.normal(0, 1, T, S, H, 128, E4M3, True)
    call = jax.jit(lambda *x: select(flat.flat, *x, visible, 512))
    first, *others = [call(*operands) for _ in range(30)]
    promises.check_flat(first, *operands, visible, topk=512, token_tolerance=2e-3)
    for found in others:
        np.testing.assert_array_equal(found[0], first[0])


def test_no_register_of_the_gathering_is_read_before_it_is_written():
    assert not list(unwritten(gather_survivors.gather_ptx(6144))) and not list(
        unwritten(gather_survivors.reload_ptx(2048))
    )
