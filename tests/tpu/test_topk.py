"""The exact top-k in VMEM against NumPy, to the last position."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bench.tpu import aot
from hisa_jax.kernels_pallas.mosaic_tpu import refine_body
from hisa_jax.kernels_pallas.mosaic_tpu.topk import Config, from_tiles, padded_groups, to_tiles, topk
from hisa_jax.kernels_pallas.sort_key import FORCED, INVISIBLE, sort_key_of


def rows_of(kind: str, T: int, W: int) -> np.ndarray:
    draw = np.random.default_rng(0)
    normal = np.asarray(sort_key_of(jnp.asarray(draw.normal(size=(T, W)), jnp.float32))).copy()
    if kind == "normal":
        return normal
    if kind == "any_bits":
        return draw.integers(INVISIBLE + 1, FORCED, (T, W)).astype(np.int32)
    if kind == "few_values":
        # Most ties are at the threshold, and better ones come after them.
        return draw.choice(3, (T, W), p=[0.4, 0.5, 0.1]).astype(np.int32)
    if kind == "all_equal":
        return np.full((T, W), 7, np.int32)
    if kind == "infinite":
        scores = draw.choice([-np.inf, np.inf, 0.0, -0.0, np.nan, 1e-38, 3.0], (T, W))
        return np.asarray(sort_key_of(jnp.asarray(scores, jnp.float32))).copy()
    if kind == "ragged":
        for row in range(T):
            normal[row, draw.integers(0, W + 1) :] = INVISIBLE
        normal[0] = INVISIBLE
        return normal
    assert kind == "forced"
    normal[:, ::7] = FORCED
    return normal


KINDS = ("normal", "any_bits", "few_values", "all_equal", "infinite", "ragged", "forced")


def wanted(x: np.ndarray, k: int) -> np.ndarray:
    out = np.full((x.shape[0], k), -1)
    for row, sort_keys in zip(out, x, strict=True):
        best = np.lexsort((np.arange(len(sort_keys)), -sort_keys.astype(np.int64)))[
            : min(k, (sort_keys != INVISIBLE).sum())
        ]
        row[: len(best)] = np.sort(best)
    return out


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_takes_the_largest_and_the_lowest_columns_of_ties(kind, interpret):
    x = rows_of(kind, 11, 1500)
    indices, count = topk(x, (x != INVISIBLE).sum(1), 300, config=Config(tiles=1), interpret=interpret)
    np.testing.assert_array_equal(indices, wanted(x, 300))
    np.testing.assert_array_equal(count, np.minimum((x != INVISIBLE).sum(1), 300))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("T", "W", "k", "tiles"),
    [
        pytest.param(1, 1, 1, 1, marks=pytest.mark.exhaustive),
        pytest.param(3, 100, 200, 1, marks=pytest.mark.exhaustive),  # fewer candidates than are wanted
        (17, 1025, 64, 2),  # a filter of blocks, odd numbers everywhere
        pytest.param(8, 8192, 2048, 1, marks=pytest.mark.exhaustive),  # the candidates of dsv32
        pytest.param(
            5, 17000, 2500, 1, marks=pytest.mark.exhaustive
        ),  # more than one span of tables, more than two registers of slots
    ],
)
def test_shapes(T, W, k, tiles, interpret):
    x = rows_of("ragged", T, W)
    indices, _ = topk(x, (x != INVISIBLE).sum(1), k, config=Config(tiles=tiles), interpret=interpret)
    np.testing.assert_array_equal(indices, wanted(x, k))


def test_tiles_are_the_memory_order_of_rows():
    x = np.arange(16 * 1024, dtype=np.int32).reshape(16, 1024)
    tiled = to_tiles(x, 16, padded_groups(1024))
    assert tiled[1, 8 * 3 + 2, 5] == x[8 + 2, 3 * 128 + 5]
    np.testing.assert_array_equal(from_tiles(tiled), x)


def test_columns_of_kept_blocks_become_positions():
    """Of lists of more blocks than a register has lanes; no column is no position."""
    rng, size = np.random.default_rng(0), 32
    ids = np.sort(rng.integers(0, 1000, (8, 256)), axis=1).astype(np.int32)
    columns = rng.integers(-1, 256 * size, (8, 128)).astype(np.int32)
    parts = [jnp.asarray(ids[:, :128]), jnp.asarray(ids[:, 128:])]
    positions = refine_body.positions_of(jnp.asarray(columns), parts, size)
    blocks = np.take_along_axis(ids, np.maximum(columns, 0) // size, axis=1)
    np.testing.assert_array_equal(positions, np.where(columns < 0, -1, blocks * size + columns % size))


@pytest.mark.parametrize(
    ("W", "k"),
    [*(pytest.param(*sizes, marks=pytest.mark.exhaustive) for sizes in ((8192, 2048), (1024, 64))), (131072, 2048)],
)
def test_compiles(chip, W, k):
    operands = (jax.ShapeDtypeStruct((64, W), jnp.int32), jax.ShapeDtypeStruct((64,), jnp.int32))
    aot.compile_for(chip, lambda x, n: topk(x, n, k), *operands, schedules=False)
