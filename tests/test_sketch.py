"""Sketches: what the scan reads in place of the keys."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import hisa_jax as hj
from hisa_jax.xla import sketch
from tests import contract, draw, oracle
from tests.oracle import scan as oracle_scan


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
    assert got[0].tolist() == [True] * 32 + [False] * 32 and got[1].tolist() == [False] * 32 + [True] * 32


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float8_e4m3fn", "int8"])
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
