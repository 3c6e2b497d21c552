"""Packed batches and pages on TPU kernels: what the oracle selects, and the compiler at the sizes of real models."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hisa_jax as hj
from bench import shapes
from bench.tpu import aot
from hisa_jax.kernels_pallas import mosaic_tpu
from hisa_jax.kernels_pallas.mosaic_tpu import query_tiles
from hisa_jax.kernels_pallas.mosaic_tpu.ragged import Ragged
from hisa_jax.layout import Call, Keys
from tests import draw, kernel_calls, oracle
from tests.tpu.test_select import METHODS


def inputs(n_queries, lengths, dtype, *, padding=0):
    """Packed queries, keys, weights and offsets; `padding` rows of padding after them."""
    T, N = sum(n_queries) + padding, sum(lengths)
    q, k, w = draw.few_scores(1, max(T, N), N, 16, 64)
    cu_seqlens = [np.cumsum([0, *n]).astype(np.int32) for n in (n_queries, lengths)]
    return draw.cast(q[0, :T], dtype), draw.cast(k[0], dtype), w[0, :T], *cu_seqlens


def check(got, q, k, w, cu_seqlens_q, cu_seqlens_k, name):
    reference = oracle.select_packed(q, k, w, cu_seqlens_q, cu_seqlens_k, METHODS[name])
    # The mean of a partly filled block is not exact.
    tolerance = 0.0 if name == "dsa" else 1e-2
    oracle.assert_same_selection(got.indices, got.count, reference, tolerance, scores=got.scores, blocks=got.blocks)


@pytest.mark.parametrize(
    ("name", "n_queries", "lengths"),
    [
        # As by blocks, which takes twice as long: the gate has pages.
        pytest.param("dsa", [3, 20], [300, 70], marks=pytest.mark.exhaustive),
        pytest.param("hisa", [3, 20], [300, 270], marks=pytest.mark.exhaustive),
        pytest.param("block_sparse", [9, 0, 1], [250, 60, 260], marks=pytest.mark.exhaustive),
        pytest.param("hisa", [1, 1], [200, 130], marks=pytest.mark.exhaustive),
    ],
)
def test_packed_batches(implementation, name, n_queries, lengths):
    """Sequences with tiles of their own and without, short ones, and rows after the last."""
    operands = inputs(n_queries, lengths, "bfloat16", padding=2)
    got = hj.select_packed(
        *map(jnp.asarray, operands),
        METHODS[name],
        implementation=implementation,
        return_scores=True,
        return_blocks=name != "dsa",
    )
    check(got, *operands, name)


@pytest.mark.parametrize(
    ("name", "n_queries", "lengths", "page_size", "dtype"),
    [
        # Interpreted, a selection by blocks takes 25 s: the gate has one of a batch, and compiles those of pages.
        pytest.param("hisa", [1, 2], [300, 250], 64, "bfloat16", marks=pytest.mark.exhaustive),
        pytest.param("hisa", [9, 1, 0, 2], [290, 260, 33, 70], 16, "bfloat16", marks=pytest.mark.exhaustive),
        ("dsa", [1, 17], [300, 70], 64, "int8"),
        pytest.param("block_sparse", [9, 2], [290, 250], 64, "float8_e4m3fn", marks=pytest.mark.exhaustive),
        pytest.param("hisa", [9, 1], [290, 270], 32, "int8", marks=pytest.mark.exhaustive),
        pytest.param("dsa", [17, 1], [300, 70], 256, "bfloat16", marks=pytest.mark.exhaustive),
    ],
)
def test_pages(implementation, name, n_queries, lengths, page_size, dtype):
    """Prefill and decode in one batch, pages in any order, tables with entries past a request's pages."""
    q, k, w, cu_q, cu_k = inputs(n_queries, lengths, dtype)
    rng, R = np.random.default_rng(0), len(lengths)
    n_pages = [-(-length // page_size) for length in lengths]
    pages = rng.permutation(sum(n_pages) + 3)
    table = np.full((R, max(n_pages) + 1), -1, np.int32)
    for r, first in enumerate(np.cumsum([0, *n_pages[:-1]])):
        table[r, : n_pages[r]] = pages[first : first + n_pages[r]]
    keys = jnp.asarray(k)
    if dtype != "bfloat16":
        keys = hj.QuantizedKeys(keys, jnp.asarray(2.0 ** rng.integers(-2, 3, sum(lengths)), jnp.float32))
    cache = hj.init_cache(len(pages), page_size, D=64, dtype=jnp.dtype(dtype))
    cache = hj.append(cache, keys, jnp.asarray(table), jnp.asarray(cu_k), jnp.zeros(R, jnp.int32))
    got = hj.select_paged(
        jnp.asarray(q),
        jnp.asarray(w),
        cache,
        jnp.asarray(table),
        jnp.asarray(cu_q),
        jnp.asarray(lengths, jnp.int32),
        METHODS[name],
        implementation=implementation,
        return_scores=True,
        return_blocks=name != "dsa",
    )
    check(got, q, k if dtype == "bfloat16" else keys, w, cu_q, cu_k, name)


def sequences(starts):
    """Packed sequences of 70 keys, whose queries begin at these rows."""
    R = len(starts) - 1
    return Ragged(
        keys=Keys(jnp.zeros((99, 64, 8)), None),
        query_starts=jnp.asarray(starts, jnp.int32),
        lengths=jnp.full(R, 70, jnp.int32),
        first_blocks=jnp.arange(R, dtype=jnp.int32),
        table=None,
        block_size=64,
        max_keys=350,
    )


@pytest.mark.parametrize("n_cores", [1, 2])
@pytest.mark.parametrize(("least", "n_tiles"), [(1, 1 + 5 + 2), (8, 5 + 2)])
def test_tiles_hold_every_wanted_query_once(n_cores, least, n_tiles):
    n_queries = np.array([5, 0, 40, 9, 1])
    wanted = (n_queries >= least) & (np.arange(5) < 4)
    starts, T, tile_t = np.cumsum([0, *n_queries]), 57, 8
    tiles = query_tiles.split(sequences(starts), T, jnp.asarray(wanted), least, tile_t, n_cores)
    rows, sequence = np.asarray(tiles.row_of_slot), np.asarray(tiles.sequence)
    held = np.flatnonzero(np.append(np.repeat(wanted, n_queries), False)[:T])
    assert sorted(rows[rows < T]) == held.tolist()
    assert sum(sequence >= 0) == n_tiles
    for tile, r in enumerate(sequence):
        own = rows[tile * tile_t : (tile + 1) * tile_t]
        assert np.all((own == T) | ((own >= starts[r]) & (own < starts[r + 1]) & (r >= 0)))
        # A tile's queries are consecutive rows of q, none outside.
        assert 0 <= tiles.first[tile] <= T - tile_t
        assert np.all((own == T) | (own == tiles.first[tile] + np.arange(tile_t)))
    assert np.array_equal(rows[tiles.slot_of_row[held]], held)


def compiled(chip, f, T, k, k_scale, *rest):
    model = shapes.DSV32
    q, w = jax.ShapeDtypeStruct((T, model.H, model.D), k.dtype), jax.ShapeDtypeStruct((T, model.H), jnp.float32)
    return aot.compile_for(chip, f, q, k, k_scale, w, aot.shaped(T, dtype=jnp.int32), *rest, schedules=False)


SELECT = {
    "flat": lambda call: mosaic_tpu.select_flat(call, 2048),
    "hisa": lambda call: mosaic_tpu.select_hisa(call, hj.Hisa(topk=2048, block_size=128, block_topk=64)),
}


@pytest.mark.exhaustive
@pytest.mark.parametrize("stage", SELECT)
def test_packed_compiles(chip, stage):
    T, N, R = 2048, 128 << 10, 8

    def f(q, k, k_scale, w, visible, *cu_seqlens):
        return SELECT[stage](kernel_calls.call_of(q, k, k_scale, w, visible, cu_seqlens=cu_seqlens))

    offsets = [aot.shaped(R + 1, dtype=jnp.int32)] * 2
    program = compiled(chip, f, T, aot.shaped(N, shapes.DSV32.D), None, *offsets)
    # The keys moved, once, and a share of the queries; no scores.
    assert program.temp_bytes < 256 << 20


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "T", "R", "page_size", "dtype"),
    [
        # Decoding by HISA compiles in the step of test_pod_steps.py.
        pytest.param("hisa", 64, 64, 64, "bfloat16", marks=pytest.mark.exhaustive),
        pytest.param("hisa", 1024, 8, 16, "bfloat16", marks=pytest.mark.exhaustive),  # prefill chunks
        pytest.param("hisa", 1024, 8, 64, "int8", marks=pytest.mark.exhaustive),
        ("flat", 64, 64, 64, "float8_e4m3fn"),
    ],
)
def test_pages_compile(chip, stage, T, R, page_size, dtype):
    D, P, n_pages = shapes.DSV32.D, (128 << 10) // page_size, (1 << 20) // page_size

    def f(q, k, k_scale, w, visible, table, query_offsets, page_sums):
        cache = hj.init_cache(n_pages, page_size, D, k.dtype)
        cache = dataclasses.replace(cache, keys=k, scales=k_scale, sums=page_sums)
        return SELECT[stage](Call(q=q, w=w, visible=visible, query_offsets=query_offsets, table=table, cache=cache))

    shaped = aot.shaped
    k_scale = None if dtype == "bfloat16" else shaped(n_pages, page_size, dtype=jnp.float32)
    sums = shaped(n_pages, D, dtype=jnp.float32)
    tables = shaped(R, P, dtype=jnp.int32), shaped(R + 1, dtype=jnp.int32)
    program = compiled(chip, f, T, shaped(n_pages, page_size, D, dtype=jnp.dtype(dtype)), k_scale, *tables, sums)
    # Nothing is copied out of the pages but the means of decoding requests.
    assert program.temp_bytes < 128 << 20
