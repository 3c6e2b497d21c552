"""The scan of packed batches and pages on TPU kernels: interpreted, and compiled at the sizes of real models."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hisa_jax as hj
from bench import shapes
from bench.tpu import aot
from hisa_jax.kernels_pallas import mosaic_tpu
from hisa_jax.kernels_pallas.mosaic_tpu import query_tiles, scan, scan_stages
from hisa_jax.layout import Call
from tests import kernel_calls
from tests.gpu import draw, reference
from tests.tpu.test_ragged import sequences
from tests.tpu.test_scan import NEAR, check_query

UNITS = hj.Scan(topk=24, candidates=48, exact_heads=2, unit=4)


def packed(draw, n_queries, lengths, dtype=jnp.bfloat16, D=128):
    """Queries, keys, weights, and the offsets of both."""
    T, N = sum(n_queries), sum(lengths)
    q, k, k_scale, w = draw(1, 1, max(T, N), N, 16, D, dtype, dtype != jnp.bfloat16)
    offsets = [jnp.asarray(np.cumsum([0, *n]), jnp.int32) for n in (n_queries, lengths)]
    return q[0, :T], k[0] if k_scale is None else hj.QuantizedKeys(k[0], k_scale[0]), w[0, :T], *offsets


def in_pages(keys, lengths, page_size, dtype, D=128):
    """Of packed keys: a cache and its tables, pages in any order."""
    rng, R = np.random.default_rng(0), len(lengths)
    n_pages = [-(-length // page_size) for length in lengths]
    pages = rng.permutation(sum(n_pages) + 3)
    table = np.full((R, max(n_pages) + 1), -1, np.int32)
    for r, first in enumerate(np.cumsum([0, *n_pages[:-1]])):
        table[r, : n_pages[r]] = pages[first : first + n_pages[r]]
    cache = hj.init_cache(len(pages), page_size, D=D, dtype=dtype)
    offsets = jnp.asarray(np.cumsum([0, *lengths]), jnp.int32)
    return hj.append(cache, keys, jnp.asarray(table), offsets, jnp.zeros(R, jnp.int32)), jnp.asarray(table)


def check(got, operands, method, tolerance=NEAR):
    """At least as good as the best of exactly the candidates, which XLA takes."""
    q, k, w, cu_q, cu_k = operands
    wanted = hj.select_packed(*operands, method, implementation="xla")
    values, scales = (k.values, k.scales) if isinstance(k, hj.QuantizedKeys) else (k, None)
    indices, wanted_indices = np.asarray(got.indices), np.asarray(wanted.indices)
    np.testing.assert_array_equal(got.count, wanted.count)
    for r in range(len(cu_q) - 1):
        keys = slice(int(cu_k[r]), int(cu_k[r + 1]))
        for t in range(int(cu_q[r]), int(cu_q[r + 1])):
            scale = None if scales is None else scales[keys]
            scores = reference.token_scores(q[t : t + 1], values[keys], scale, w[t : t + 1])[0]
            n_visible = keys.stop - keys.start - (int(cu_q[r + 1]) - 1 - t)
            check_query(indices[t], wanted_indices[t], scores, n_visible, tolerance, (r, t))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "n_queries", "lengths", "dtype", "D"),
    [
        # A sequence of a tile and a part of one, few queries, none, many of a sequence that is all candidates.
        pytest.param(
            UNITS, [21, 3, 0, 9], [700, 90, 50, 40],
            jnp.bfloat16, 64, id="units_of_4", marks=pytest.mark.exhaustive,
        ),
        pytest.param(
            hj.Scan(topk=40, candidates=96, exact_heads=4, keep_first=5, keep_last=3), [8, 8], [2300, 333],
            jnp.bfloat16, 128, id="tokens_in_pairs", marks=pytest.mark.exhaustive,
        ),
        pytest.param(
            hj.Scan(topk=24, candidates=64, unit=16), [3, 8], [100, 2200], jnp.int8, 64,
            id="units_of_16_of_8_bits", marks=pytest.mark.exhaustive,
        ),
    ],
)  # fmt: skip
def test_packed_batches(implementation, few_share, method, n_queries, lengths, dtype, D):
    for drawn in (draw.integers, draw.normal):
        operands = packed(drawn, n_queries, lengths, dtype, D)
        check(hj.select_packed(*operands, method, implementation=implementation), operands, method)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "n_queries", "lengths", "page_size", "dtype"),
    [
        # Prefill and decoding in one call.
        pytest.param(UNITS, [8, 1], [333, 270], 64, jnp.bfloat16, id="units_of_4", marks=pytest.mark.exhaustive),
        pytest.param(
            hj.Scan(topk=24, candidates=48, exact_heads=2), [9, 1], [533, 270], 32, jnp.int8,
            id="tokens_of_8_bits_in_fours", marks=pytest.mark.exhaustive,
        ),
        pytest.param(
            hj.Scan(topk=32, candidates=64, exact_heads=0, unit=2, slopes="plain"), [1, 17, 12], [300, 999, 270], 128,
            jnp.bfloat16,
            id="virtual_head_alone", marks=pytest.mark.exhaustive,
        ),
        pytest.param(
            hj.Scan(topk=40, candidates=1024, unit=16), [9, 0, 2], [2900, 30, 2500], 16,
            jnp.bfloat16,
            id="units_of_16", marks=pytest.mark.exhaustive,
        ),
        pytest.param(
            hj.Scan(topk=24, candidates=64, unit=8), [9], [4500], 256, jnp.float8_e4m3fn,
            id="pages_of_256", marks=pytest.mark.exhaustive,
        ),
    ],
)  # fmt: skip
def test_pages(implementation, few_share, method, n_queries, lengths, page_size, dtype):
    for drawn in (draw.integers, draw.normal):
        operands = packed(drawn, n_queries, lengths, dtype)
        cache, table = in_pages(operands[1], lengths, page_size, dtype)
        paged = operands[0], operands[2], cache, table, operands[3], jnp.asarray(lengths, jnp.int32)
        check(hj.select_paged(*paged, method, implementation=implementation), operands, method)


def test_the_flat_indexer_has_the_sequences_that_a_scan_does_not_pay_for(monkeypatch):
    """Few queries, all tokens candidates, no room for the keys, or for a list. The kernels are others: 1 s."""
    monkeypatch.setattr(scan_stages, "_MOST_KEYS", 900)
    n_queries, lengths = [15, 16, 17, 18, 19], [500, 500, 48, 901, 900]
    q, k, w, cu_q, cu_k = packed(draw.integers, n_queries, lengths)
    call = kernel_calls.call_of(q, k, None, w, jnp.ones(len(q), jnp.int32), cu_seqlens=(cu_q, cu_k))

    def scanned(call, queries, ragged, wanted, method, interpret):
        assert wanted.tolist() == [False, True, False, False, True]
        return jnp.full((len(queries.visible), method.topk), 1), wanted.at[1].set(False)  # a list of it overflows

    def best_of_all(queries, ragged, choice, wanted):
        return (jnp.where(ragged.of_rows(wanted, len(queries.visible)), 2, 3)[:, None],)

    monkeypatch.setattr(scan_stages, "_scanned", scanned)
    monkeypatch.setattr(scan_stages, "best_of_all", best_of_all)
    with jax.disable_jit():
        chosen, _ = scan_stages.select_scan(call, UNITS)
    assert chosen[:, 0].tolist() == np.repeat([2, 2, 2, 2, 1], n_queries).tolist()


def test_parts_of_tiles_hold_the_same_queries():
    starts, T = np.cumsum([0, 5, 40, 24]), 69
    tiles = query_tiles.split(sequences(starts), T, jnp.asarray([False, True, True]), 8, 32, 1)
    parts = tiles.cut(8)
    rows = np.asarray(parts.row_of_slot).reshape(-1, 8)
    assert np.array_equal(parts.row_of_slot, tiles.row_of_slot)
    for first, sequence, own in zip(parts.first, parts.sequence, rows, strict=True):
        assert np.all((own == T) | (own == first + np.arange(8))) and 0 <= first <= T - 8
        r = np.searchsorted(starts, own[own < T], side="right") - 1
        assert np.all(r == sequence) if len(r) else sequence == -1


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_sequence_whose_lists_overflow_is_the_flat_indexers(implementation, few_share, monkeypatch):
    """The other's lists have just room for all its units."""
    monkeypatch.setattr(scan, "_MOST_LISTED", 1024)
    n_queries, lengths, method = [8, 8], [8192, 2048], hj.Scan(topk=20, candidates=1024, exact_heads=0, unit=2)
    operands = packed(draw.normal, n_queries, lengths)
    got = hj.select_packed(*operands, method, implementation=implementation)
    flat = hj.select_packed(*operands, hj.Dsa(topk=20), implementation="xla")
    np.testing.assert_array_equal(got.indices[:8], flat.indices[:8])
    check(got, operands, method)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_tiles_of_64_are_refined_by_halves(implementation):
    """72 queries: a tile that is full, and one that is moved back to end with the queries."""
    operands = packed(draw.normal, [3, 69], [100, 600])
    check(hj.select_packed(*operands, UNITS, implementation=implementation), operands, UNITS)


def compiled(chip, T, R, page_size, method, dtype="bfloat16", D=128):
    """Requests of 128K tokens in pages; without a page's size packed, 128K in all."""
    H, dtype, shaped = shapes.DSV32.H, jnp.dtype(dtype), aot.shaped

    def scales(*shape):
        return None if dtype == jnp.bfloat16 else shaped(*shape, dtype=jnp.float32)

    def of_pages(q, k, k_scale, w, visible, query_offsets, table, page_sums):
        cache = hj.init_cache(*k.shape, dtype)
        cache = dataclasses.replace(cache, keys=k, scales=k_scale, sums=page_sums)
        call = Call(q=q, w=w, visible=visible, query_offsets=query_offsets, table=table, cache=cache)
        return mosaic_tpu.select_scan(call, method)

    def of_packed(q, k, k_scale, w, visible, *offsets):
        call = kernel_calls.call_of(q, k, k_scale, w, visible, cu_seqlens=offsets)
        return mosaic_tpu.select_scan(call, method)

    offsets, S = shaped(R + 1, dtype=jnp.int32), 128 << 10
    if page_size:
        n = (1 << 20) // page_size
        k, k_scale, f = shaped(n, page_size, D, dtype=dtype), scales(n, page_size), of_pages
        rest = offsets, shaped(R, S // page_size, dtype=jnp.int32), shaped(n, D, dtype=jnp.float32)
    else:
        k, k_scale, f, rest = shaped(S, D, dtype=dtype), scales(S), of_packed, (offsets, offsets)
    queries = jax.ShapeDtypeStruct((T, H, D), dtype), k, k_scale, shaped(T, H, dtype=jnp.float32)
    return aot.compile_for(chip, f, *queries, shaped(T, dtype=jnp.int32), *rest, schedules=False)


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("T", "R", "page_size", "unit", "dtype", "D"),
    [
        pytest.param(1024, 8, 64, 4, "bfloat16", 128, id="pages_of_64"),
        pytest.param(1024, 8, 128, 2, "bfloat16", 128, id="pages_of_128"),
        pytest.param(1024, 8, 16, 16, "bfloat16", 128, id="pages_of_16"),
        pytest.param(1024, 8, 64, 4, "int8", 128, id="int8"),
        pytest.param(1024, 8, 128, 4, "float8_e4m3fn", 128, id="e4m3"),
        pytest.param(2048, 8, None, 4, "bfloat16", 128, id="packed"),
        pytest.param(2048, 8, None, 8, "int8", 64, id="packed_int8"),
    ],
)
def test_compiles(chip, T, R, page_size, unit, dtype, D):
    """130 s on a busy machine."""
    method = hj.Scan(topk=2048, candidates=6144, unit=unit)
    program = compiled(chip, T, R, page_size, method, dtype, D)
    # No keys are copied out of pages; packed ones are moved once.
    assert program.temp_bytes < (128 if page_size else 256) << 20
