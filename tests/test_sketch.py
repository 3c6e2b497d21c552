"""Sketches: what the scan reads in place of the keys."""

import dataclasses

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import hisa_jax as hj
from hisa_jax.testing.oracle import scan as oracle_scan
from hisa_jax.xla import sketch
from tests import contract, draw, oracle


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, np.int8], ids=str)
@pytest.mark.parametrize("D", [32, 65, 128])
def test_four_bits_are_those_of_the_oracle(dtype, D):
    values = (np.random.default_rng(D).standard_normal((300, D)) * 20).astype(dtype)
    values[0], values[1, :32] = 0, 7
    got = sketch.int4(jnp.asarray(values))
    # A scale of 5 bits times a whole number of 3 is exact, also in bfloat16.
    np.testing.assert_array_equal(np.asarray(got, np.float64), oracle_scan.int4(np.asarray(values, np.float64)))
    wide = np.asarray(values, np.float64)
    assert np.abs(np.asarray(got, np.float64) - wide).max() <= np.abs(wide).max() * (1 + 1 / 16) / 14


def test_a_group_with_a_number_that_is_not_finite_is_lost():
    values = np.ones((2, 64), np.float32)
    values[0, 3], values[1, 40] = np.nan, np.inf
    got = np.isnan(sketch.int4(jnp.asarray(values)))
    scales = np.asarray(sketch.pack(jnp.asarray(values))[1], np.float32)
    assert np.isnan(scales).tolist() == [[True, False], [False, True]]
    assert got[0].tolist() == [True] * 32 + [False] * 32 and got[1].tolist() == [False] * 32 + [True] * 32


def test_ties_and_scales_are_decided_exactly():
    """However a compiler divides: numbers one float32 above and below a tie, largest ones about 7 times a scale."""
    ties = np.arange(0.5, 7, dtype=np.float32) * np.float32(1.1875)
    group = np.zeros((3, 32), np.float32)
    group[:, 0] = 7 * 1.1875
    for row, toward in enumerate((0, None, np.inf)):
        group[row, 1:8] = ties if toward is None else np.nextafter(ties, np.float32(toward))
    group[1, 8:15] = -ties
    codes = np.asarray(sketch.int4(jnp.asarray(group))) / np.float32(1.1875)
    below, above = np.arange(7), np.arange(1, 8)
    np.testing.assert_array_equal(codes[:, 0], 7)
    np.testing.assert_array_equal(codes[:, 1:8], [below, below, above])
    np.testing.assert_array_equal(codes[1, 8:15], -below)
    powers = np.float32(2) ** np.arange(-100, 100, 20, dtype=np.float32)
    largest = np.float32(7 * 1.1875) * powers
    values = np.zeros((3, len(largest), 32), np.float32)
    values[:, :, 5] = [np.nextafter(largest, np.float32(0)), largest, np.nextafter(largest, np.float32(np.inf))]
    scales = np.asarray(sketch.pack(jnp.asarray(values))[1][..., 0], np.float32) / powers
    assert (scales == [[1.1875], [1.1875], [1.25]]).all()
    tiny = np.full((1, 32), 2.0**-121, np.float32)
    assert not np.asarray(sketch.int4(jnp.asarray(tiny))).any()


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, np.int8], ids=str)
def test_what_is_kept_is_the_sketch(dtype):
    """Bit for bit, its last group filled up with zeros."""
    values = jnp.asarray((np.random.default_rng(0).standard_normal((50, 2, 72)) * 20).astype(dtype))
    codes, scales = sketch.pack(values)
    assert (codes.shape, codes.dtype, scales.shape, scales.dtype) == ((50, 2, 48), "uint8", (50, 2, 3), "bfloat16")
    got, wanted = sketch.unpack(codes, scales, 72, values.dtype), sketch.int4(values)
    assert got.dtype == wanted.dtype
    np.testing.assert_array_equal(np.asarray(got).view("uint8"), np.asarray(wanted).view("uint8"))


def test_a_byte_holds_two_numbers_of_one_group():
    values = np.zeros((1, 64), np.float32)
    values[0, [0, 16, 15, 31]] = -7, 3, 7, 1
    values[0, 32 + 2] = 14
    codes, scales = sketch.pack(jnp.asarray(values))
    wanted = np.full((1, 32), 0x88)
    wanted[0, [0, 15, 16 + 2]] = 0xB1, 0x9F, 0x8F
    np.testing.assert_array_equal(codes, wanted)
    assert scales.tolist() == [[1, 2]]


@pytest.mark.unoptimised
def test_a_scan_reads_the_sketch_that_pages_keep_and_makes_it_where_they_keep_none():
    q, k, w = (jnp.asarray(x[0]) for x in draw.inputs(1, 4, 75, 4, 64))
    table, offsets, start = jnp.array([[3, 0, 7, 1, 2]], jnp.int32), jnp.array([0, 75]), jnp.array([0])
    method = hj.Scan(topk=16, candidates=32, exact_heads=0, slopes="plain", sketch="int4")

    def blocks(cache):
        return hj.select_paged(q, w, cache, table, jnp.array([0, 4]), offsets[1:], method, return_blocks=True).blocks

    def written(sketch):
        return hj.append(hj.init_cache(10, 16, 64, "float32", sketch=sketch), k, table, offsets, start)

    keeps, keeps_none = written("int4"), written(None)
    assert keeps_none.codes is None and keeps_none.code_scales is None
    np.testing.assert_array_equal(blocks(keeps), blocks(keeps_none))
    others = dataclasses.replace(keeps, codes=keeps.codes[::-1], code_scales=keeps.code_scales[::-1])
    assert (blocks(others) != blocks(keeps)).any()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float8_e4m3fn", "int8"])
@pytest.mark.gate("float32", "float8_e4m3fn")  # sketches of the others are compared by themselves
def test_a_scan_of_a_sketch_is_the_oracles(dtype):
    q, k, w = draw.inputs(2, 6, 150, 4, 40, dtype=dtype)
    method = hj.Scan(topk=16, candidates=32, exact_heads=1, unit=2, sketch="int4")
    got = hj.select(q, k, w, method, return_scores=True, return_blocks=True)
    oracle.assert_same_selection(
        got.indices, got.count, oracle.select(q, k, w, method), contract.TOLERANCE, scores=got.scores, blocks=got.blocks
    )


def test_nan_is_not_lost_where_all_is_compiled_together():
    # A maximum over one e4m3 number and padding was 0 there, and the token scored 0.
    q, w = np.ones((1, 1, 1, 1), np.float32), -np.ones((1, 1, 1), np.float32)
    k = np.ones((1, 33, 1), np.float32)
    k[0, 2] = np.nan
    scales = np.where(np.arange(33) % 5 == 3, 2.0, 1.0).astype(np.float32)[None]
    keys = hj.QuantizedKeys(jnp.asarray(k.astype(ml_dtypes.float8_e4m3fn)), jnp.asarray(scales))
    method = hj.Scan(topk=5, candidates=30, exact_heads=1, unit=2, sketch="int4")
    got = hj.select(q, keys, w, method, return_blocks=True)
    reference = oracle.select(q, keys, w, method)
    assert 1 not in reference.blocks[0, 0]  # tokens 2 and 3: NaN, and the lowest of all scores
    np.testing.assert_array_equal(got.blocks[0, 0], reference.blocks[0, 0])
