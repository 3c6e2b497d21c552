"""The oracle's quantised keys and queries."""

import itertools

import ml_dtypes
import numpy as np

from tests import oracle
from tests.oracle.cases import draw


def test_e4m3_takes_the_largest_value_to_448():
    # amax 2: scale = 2 * float32(1/448), 2 -> 448, 1 -> 224, -0.5 -> -112.
    values, scales = oracle.quantize_keys(np.array([[1, -0.5, 2, 0]]))
    assert values.dtype == ml_dtypes.float8_e4m3fn and scales.dtype == np.float32
    assert values.astype(float).tolist() == [[224, -112, 448, 0]]
    assert scales[0] == np.float32(2) * np.float32(1 / 448)


def test_e4m3_rounds_half_to_even_down_to_subnormals():
    grid = np.arange(0, 0x7F, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)  # 0 .. 448
    middle = (grid[:-1] + grid[1:]) / 2
    below, above = np.nextafter(middle, np.float32(0)), np.nextafter(middle, np.float32(448))
    for x, wanted in (
        (middle, np.arange(126) + np.arange(126) % 2),
        (below, np.arange(126)),
        (above, np.arange(1, 127)),
    ):
        values, scales = oracle.quantize_keys(np.append(x, np.float32(448)), scale="ue8m0")
        assert scales == 1  # so that nothing but the rounding of the value is seen
        np.testing.assert_array_equal(values[:-1].view(np.uint8), wanted)


def test_ue8m0_rounds_the_scale_up_to_a_power_of_two():
    # 448 -> 1 exactly; the next float32 above -> 2; 1 / 448 = 0.0022.. -> 2^-8; floor 1e-4 / 448 = 2.2e-7 -> 2^-22.
    amax = np.array([448, np.nextafter(np.float32(448), np.float32(449)), 1, 0, 3.5 * 2**20], np.float32)
    _, scales = oracle.quantize_keys(amax[:, None], scale="ue8m0")
    assert scales.tolist() == [1, 2, 2**-8, 2**-22, 2**13]
    rng = np.random.default_rng(0)
    amax = np.exp(rng.uniform(-8, 20, 2000)).astype(np.float32)
    for dtype, largest in (("float8_e4m3fn", 448), ("int8", 127)):
        _, scales = oracle.quantize_keys(amax[:, None], dtype, "ue8m0")
        np.testing.assert_array_equal(scales, 2.0 ** np.ceil(np.log2(amax.astype(float) / largest)))


def test_int8_is_symmetric_and_rounds_half_to_even():
    # amax 127 -> scale 127 * float32(1/127) = 1: 0.5 -> 0, 1.5 -> 2, -2.5 -> -2.
    values, scales = oracle.quantize_keys(np.array([127, 0.5, 1.5, -2.5, -127]), np.int8)
    assert scales == 1 and values.dtype == np.int8 and values.tolist() == [127, 0, 2, -2, -127]


def test_a_key_that_is_not_finite_never_looks_good():
    k = np.array([[1, np.nan], [np.inf, 1], [1, 1]])
    for dtype, scale in itertools.product(("float8_e4m3fn", "int8"), ("float32", "ue8m0")):
        values, scales = oracle.quantize_keys(k, dtype, scale)
        scores = oracle.token_scores(np.ones((1, 1, 2)), values, np.ones((1, 1)), scales)
        assert np.isnan(scores[0, :2]).all() and np.isfinite(scores[0, 2])


def test_the_query_scale_is_folded_into_the_weights():
    (q,), _, (w,) = draw(9, 1, 3, 1, 2, 16)
    values, folded = oracle.quantize_queries(q, w)
    assert folded.dtype == np.float32 and values.shape == q.shape
    keys_values, scales = oracle.quantize_keys(q)
    np.testing.assert_array_equal(values.view(np.uint8), keys_values.view(np.uint8))
    np.testing.assert_array_equal(folded, w * scales)


def test_quantisation_errs_by_at_most_half_a_step():
    (_, (k,), _) = draw(10, 1, 1, 50, 1, 128)
    for dtype, scale in itertools.product(("float8_e4m3fn", "int8"), ("float32", "ue8m0")):
        values, scales = oracle.quantize_keys(k, dtype, scale)
        step = scales[:, None] * 0.5 if dtype == "int8" else np.maximum(np.abs(k) * 2**-4, scales[:, None] * 2**-10)
        assert (np.abs(oracle.dequantize(values, scales) - k) <= step * (1 + 1e-5)).all()
