"""The stages of what indexers differ in, one by one, by Triton, interpreted; whole indexers: test_entries.py. 4 s."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

import hisa_jax as hj
from hisa_jax.kernels_pallas import mosaic_gpu, triton
from hisa_jax.kernels_pallas.triton import topk as triton_topk
from hisa_jax.pallas import tokens_of_blocks
from hisa_jax.xla import stages
from tests import draw, kernel_calls, oracle
from tests.gpu import reference

POSITIONS = np.array([[-1, 0, 40, 250, 255]], np.int32)


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn"])
@pytest.mark.gate("bfloat16")
def test_blocks_of_one_head_score_what_their_best_visible_token_does(dtype):
    # Blocks of which a tile has several and no whole number. The first one, always kept, scores least. One is the best
    # although it has NaN, and the last one is for who sees its token 251.
    method = hj.BlockSparse(topk=96, block_size=24, keep_last=0, scored_by="max", activation=None)
    budget = np.array([[96, 96, 0, 96, 60]], np.int32)
    rng, (q, w) = np.random.default_rng(0), (np.zeros((1, 5, 1, 64)), np.ones((1, 5, 1), np.float32))
    q[..., 3], k = 1, rng.integers(-4, 5, (1, 256, 64))
    k[0, :24, 3], k[0, 48:72, 3], k[0, 240:, 3], k[0, 251, 3], k[0, 55, 3] = -9, -9, -6, 9, 8
    q, k = draw.cast(q, dtype), draw.cast(k, dtype)
    k[0, 53] = np.nan  # of the unit of the best
    call = kernel_calls.call_of(*map(jnp.asarray, (q, k)), None, *map(jnp.asarray, (w, POSITIONS + 1)))
    n_kept = stages.how_many_kept(-(-call.queries.visible // 24), method, jnp.asarray(budget[0]))
    blocks = triton.select_blocks(call, method, True, n_kept)
    got = call.unflatten(tokens_of_blocks(blocks, call.queries.visible, method))
    wanted = oracle.select(q, k, w, method, query_positions=POSITIONS, budget=budget)
    oracle.assert_same_selection(*map(np.asarray, got), wanted, 0.0)


def test_rows_choose_as_many_as_each_may():
    rng = np.random.default_rng(0)
    x = rng.integers(-9, 9, (6, 70)).astype(np.int32)
    limit, most = np.array([70, 70, 70, 5, 0, 70], np.int32), np.array([-3, 0, 1, 9, 4, 99], np.int32)
    got, count = triton_topk.topk(*map(jnp.asarray, (x, limit)), 20, most=jnp.asarray(most), interpret=True)
    for t in range(6):
        k = int(np.clip(most[t], 0, 20))
        wanted = reference.best(x[t].astype(np.float64), np.arange(limit[t]), k) if min(k, limit[t]) else []
        np.testing.assert_array_equal(np.asarray(got[t])[: len(wanted)], wanted)
        assert int(count[t]) == len(wanted) and (np.asarray(got[t])[len(wanted) :] == -1).all()


@pytest.mark.parametrize("backend", ["triton", "mosaic_gpu"])
@pytest.mark.gate("triton")
def test_the_best_of_lists_within_budgets(backend, monkeypatch):
    monkeypatch.setattr(mosaic_gpu.stages, "n_sms", lambda: 2)  # fewer than queries
    ids = np.array([[[0, 3, -1], [31, 0, 0], [5, 4, 2], [31, 1, 9], [2, 99, -5]]], np.int32)
    method, size, budget = hj.Dsa(topk=12), 8, np.array([[3, 3, 30, 5, 0]], np.int32)
    q, k, w = draw.few_scores(1, 5, 256, 16, 64)
    q, k = draw.cast(q, "bfloat16"), draw.cast(k, "bfloat16")
    wanted = oracle.select(
        q, k, w, method, query_positions=POSITIONS, candidates=ids, candidate_size=size, budget=budget
    )  # fmt: skip
    call = kernel_calls.call_of(*map(jnp.asarray, (q, k)), None, *map(jnp.asarray, (w, POSITIONS + 1)))
    listed = hj.CandidateBlocks(jnp.asarray(ids), size).in_order(256)
    call = dataclasses.replace(call, candidates=listed, budget=jnp.asarray(budget))
    module, how = (triton, True) if backend == "triton" else (mosaic_gpu, plgpu.InterpretGPUParams())
    indices, count = jax.tree.map(np.asarray, call.unflatten(module.select_flat(call, 12, how)))
    oracle.assert_same_selection(indices, count, wanted, 0.0)
