"""Blocks by their best token on TPU kernels: what the oracle selects, and the compiler at the sizes of real models.

In the gate 15 CPU seconds: one case interpreted, and one compiled.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hisa_jax as hj
from bench.gpu import limit_rows
from bench.tpu import aot, rows
from hisa_jax import entries
from hisa_jax.kernels_pallas import mosaic_tpu
from hisa_jax.kernels_pallas.mosaic_tpu import units, units_body
from hisa_jax.kernels_pallas.mosaic_tpu.config import LANES
from hisa_jax.kernels_pallas.sort_key import sort_key_of
from hisa_jax.layout import Call, Keys
from tests import draw, oracle

K = 1024


def by_best(size, m, **options):
    return hj.BlockSparse(topk=m * size, block_size=size, scored_by="max", **dict(keep_first=0) | options)


EACH = dict(per_head=True, activation=None)
CASES = {
    # Two steps of keys; a query that sees a part of a block, one that keeps all, one that sees nothing.
    "each_head": (by_best(64, 3, **EACH), (1, 5, 2300, 2, 64), [[-1, 130, 200, 2175, 2299]], "bfloat16"),
    # More queries than are multiplied at a time, tiles that are not full, and more than 128 blocks.
    "many_rows": (by_best(16, 5, keep_last=0, **EACH), (1, 140, 2200, 4, 64), None, "bfloat16"),
    "scales": (by_best(128, 2, keep_first=1, per_head=True), (2, 3, 1100, 3, 128), None, "int8"),
    "one_weighted_head": (by_best(256, 2), (1, 9, 4200, 1, 64), None, "float8_e4m3fn"),
    "heads": (by_best(128, 3, keep_first=1), (1, 9, 2300, 16, 64), None, "bfloat16"),
    "heads_of_small_blocks": (by_best(8, 30, keep_last=0), (1, 5, 2300, 16, 64), None, "int8"),
    "heads_of_large_blocks": (by_best(256, 2, keep_last=0), (2, 3, 2300, 16, 64), None, "float8_e4m3fn"),
}


@pytest.mark.parametrize(
    "case", [name if name == "each_head" else pytest.param(name, marks=pytest.mark.exhaustive) for name in CASES]
)
def test_keeps_the_blocks_of_the_best_tokens(implementation, case):
    """Scores that are exact and often tie, and keys of NaN: one of a block, and all that are absent."""
    method, shape, positions, dtype = CASES[case]
    B, T, S, *_ = shape
    q, k, w = draw.few_scores(*shape)
    q, k = q.astype(draw.DTYPES[dtype]), k.astype(draw.DTYPES[dtype])
    lengths = np.full(B, S - 1, np.int32)
    if positions is None:
        positions = np.sort(np.random.default_rng(0).integers(-1, S - 1, (B, T)), axis=1)
    options = dict(query_positions=np.minimum(np.asarray(positions, np.int32), S - 2), lengths=lengths)
    keys = jnp.asarray(k)
    if dtype == "bfloat16":
        k[:, [70, S - 1]] = np.nan
        keys = jnp.asarray(k)
    else:
        scales = (2.0 ** np.random.default_rng(1).integers(-2, 3, (B, S))).astype(np.float32)
        scales[:, S - 1] = np.nan
        keys = hj.QuantizedKeys(keys, jnp.asarray(scales))
        k = keys
    w = None if method.per_head else w
    wanted = oracle.select(q, k, w, method, **options)
    got = hj.select(
        jnp.asarray(q), keys, None if w is None else jnp.asarray(w), method, implementation=implementation,
        return_blocks=True, **{name: jnp.asarray(x) for name, x in options.items()},
    )  # fmt: skip
    oracle.assert_same_selection(got.indices, got.count, wanted, 0.0, blocks=got.blocks)


@pytest.mark.unoptimised
@pytest.mark.parametrize(
    "size", [8, 256, *(pytest.param(size, marks=pytest.mark.exhaustive) for size in units.BLOCK_SIZES[1:-1])]
)
def test_the_maximum_of_a_block_goes_to_its_lane(size):
    """The rotations and the gather, by themselves: what an interpreted kernel takes half a minute for."""
    scores = np.random.default_rng(0).normal(size=(8, 2 * K)).astype(np.float32)
    scores[:, 5] = -np.inf
    n, first = 2 * K // size, 0 if size < 16 else LANES - 2 * K // size
    before = [jnp.full((8, LANES), -g, jnp.int32) for g in range(max(n // LANES, 1))]
    registers = [jnp.asarray(scores[:, c : c + LANES]) for c in range(0, 2 * K, LANES)]
    groups = np.concatenate(jax.jit(units_body.maxima, static_argnums=(1, 2))(registers, size, first, before), axis=1)
    wanted = np.concatenate(before, axis=1)
    wanted[:, first : first + n] = sort_key_of(jnp.asarray(scores.reshape(8, n, size).max(2)))
    np.testing.assert_array_equal(groups, wanted)


@pytest.mark.parametrize("tile_t", [4, 72])
def test_config_refuses_sizes_that_do_not_tile(tile_t):
    with pytest.raises(ValueError, match="tile_t must be a multiple of 8, and beyond 64 of 64"):
        units.Config(tile_t=tile_t)


DECODE = (limit_rows.M3, limit_rows.EACH_HEAD, 32, 1, 128 * K)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "method", "B", "T", "context", "dtype", "page_size"),
    [
        (*DECODE, "bf16", 128),
        pytest.param(*DECODE, "int8", 64, marks=pytest.mark.exhaustive),
        pytest.param(limit_rows.M3, limit_rows.EACH_HEAD, 4, 512, 128 * K, "e4m3", 256, marks=pytest.mark.exhaustive),
        pytest.param(limit_rows.M3, limit_rows.EACH_HEAD, 1, 4096, 128 * K, "bf16", None, marks=pytest.mark.exhaustive),
        pytest.param(limit_rows.M3, limit_rows.EACH_HEAD, 1, 4096, K * K, "int8", None, marks=pytest.mark.exhaustive),
        pytest.param(limit_rows.V41, limit_rows.SOURCE, 1, 4096, 128 * K, "bf16", None, marks=pytest.mark.exhaustive),
        pytest.param(limit_rows.V41, limit_rows.SOURCE, 8, 128, 128 * K, "e4m3", 64, marks=pytest.mark.exhaustive),
    ],
)
def test_compiles(chip, model, method, B, T, context, dtype, page_size):
    """MiniMax-M3, whose heads choose alone, and the source layer of DeepSeek-V4.1, of small blocks: no score in HBM."""
    D, dtype, one = model.D, rows.DTYPES[dtype], functools.partial(aot.shaped, dtype=jnp.int32)
    scales = dtype != jnp.bfloat16

    def f(q, k, k_scale, w, visible, offsets, table):
        if page_size is None:
            call = Call(q=q, w=w, visible=visible, k=Keys(k, k_scale))
        else:
            cache = dataclasses.replace(hj.init_cache(k.shape[0], page_size, D, dtype), keys=k, scales=k_scale)
            call = Call(q=q, w=w, visible=visible, query_offsets=offsets, table=table, cache=cache)
        return mosaic_tpu.select_blocks(entries.as_keys(call, visible, method), method)

    rows_of = (B, T) if page_size is None else (B * T,)
    keys = (B, context) if page_size is None else (B * context // page_size, page_size)
    program = aot.compile_for(
        chip,
        f,
        aot.shaped(*rows_of, model.H, D, dtype=dtype),
        aot.shaped(*keys, D, dtype=dtype),
        aot.shaped(*keys, dtype=jnp.float32) if scales else None,
        aot.shaped(*rows_of, model.H, dtype=jnp.float32),
        one(*rows_of),
        one(B + 1),
        one(B, context // (page_size or 1)),
        schedules=False,
    )
    assert program.temp_bytes < 64 << 20
