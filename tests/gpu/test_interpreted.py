"""Every kernel on the CPU: Mosaic GPU's interpreter with race detection, and Triton kernels in plain interpret mode."""

import jax.numpy as jnp
import numpy as np
import pytest

import hisa_jax as hj
from hisa_jax.kernels_pallas import indexer, mosaic_gpu, triton
from hisa_jax.kernels_pallas.mosaic_gpu import refine as mosaic_refine
from hisa_jax.kernels_pallas.mosaic_gpu import topk as mosaic_topk
from hisa_jax.kernels_pallas.operands import KeptBlocks, Operands
from hisa_jax.kernels_pallas.triton import topk as triton_topk
from hisa_jax.kernels_pallas.triton.sparse_mla import Config, sparse_mla
from tests import kernel_calls
from tests.gpu import draw, promises, reference

E4M3, BF16 = jnp.float8_e4m3fn, jnp.bfloat16
EXACT = {"token_tolerance": 1e-9, "block_tolerance": 1e-9}


@pytest.fixture(autouse=True)
def few_ctas(monkeypatch):
    """Two CTAs, so that each has several queries."""
    monkeypatch.setattr(mosaic_gpu.stages, "n_sms", lambda: 2)


CASES = [  # block_size, block_topk, topk, dtype, has_scale, visible [B, T], S
    pytest.param(
        32, 6, 50, E4M3, True, [[512, 300], [20, 0]], 512, id="batch_few_visible_and_none", marks=pytest.mark.check
    ),
    pytest.param(32, 6, 50, BF16, False, [[400, 33]], 400, id="ragged_tail_bf16", marks=pytest.mark.slow),
    pytest.param(128, 3, 400, E4M3, True, [[640]], 640, id="topk_above_the_candidates", marks=pytest.mark.slow),
]


@pytest.mark.gate("batch_few_visible_and_none")  # tails and bfloat16: test_select.py
@pytest.mark.parametrize(("block_size", "block_topk", "topk", "dtype", "has_scale", "visible", "S"), CASES)
def test_mosaic_hisa_keeps_the_contract(interpret, block_size, block_topk, topk, dtype, has_scale, visible, S):
    visible = np.asarray(visible, np.int32)
    q, k, scale, w = draw.integers(0, *visible.shape, S, 16, 64, dtype, has_scale)
    options = {"topk": topk, "block_size": block_size, "block_topk": block_topk}
    got = kernel_calls.select_hisa(mosaic_gpu, q, k, scale, w, jnp.asarray(visible), **options, interpret=interpret)
    promises.check_hisa(got, q, k, scale, w, visible, **options, **EXACT)


@pytest.mark.gate("batch_few_visible_and_none", "topk_above_the_candidates")
@pytest.mark.parametrize(("block_size", "block_topk", "topk", "dtype", "has_scale", "visible", "S"), CASES)
def test_triton_hisa_keeps_the_contract(block_size, block_topk, topk, dtype, has_scale, visible, S):
    visible = np.asarray(visible, np.int32)
    q, k, scale, w = draw.integers(1, *visible.shape, S, 16, 64, dtype, has_scale)
    options = {"topk": topk, "block_size": block_size, "block_topk": block_topk}
    # The second time the blocks that are always kept score least of all.
    is_forced = np.isin(np.arange(S) // block_size, [0, *((visible - 1) // block_size).ravel()])
    least = jnp.ones_like(q), jnp.broadcast_to(is_forced[:, None], k.shape).astype(dtype), scale, -jnp.ones_like(w)
    for inputs in ((q, k, scale, w), least):
        got = kernel_calls.select_hisa(triton, *inputs, jnp.asarray(visible), **options, interpret=True)
        promises.check_hisa(got, *inputs, visible, **options, **EXACT)


@pytest.mark.gate(333)
@pytest.mark.parametrize("S", [pytest.param(520, marks=pytest.mark.slow), 333, pytest.param(9, marks=pytest.mark.slow)])
def test_mosaic_flat_keeps_the_contract(interpret, S):
    visible = np.asarray([[S, S // 2]], np.int32)
    q, k, scale, w = draw.integers(2, 1, 2, S, 16, 64, E4M3, True)
    got = kernel_calls.select_flat(mosaic_gpu, q, k, scale, w, jnp.asarray(visible), topk=50, interpret=interpret)
    promises.check_flat(got, q, k, scale, w, visible, topk=50, token_tolerance=1e-9)


@pytest.mark.oldest
def test_streaming_topk_of_triton_equals_one_piece(monkeypatch):
    monkeypatch.setattr(triton.stages, "_FLAT_WIDTH", 512)
    visible = np.asarray([[1200, 700]], np.int32)
    q, k, _, w = draw.integers(4, 1, 2, 1200, 16, 64, BF16, False)
    got = kernel_calls.select_flat(triton, q, k, None, w, jnp.asarray(visible), topk=100, interpret=True)
    promises.check_flat(got, q, k, None, w, visible, topk=100, token_tolerance=1e-9)


def _packed(seed, lengths_q, lengths_k, T, N):
    """A packed batch in buffers of T queries and N keys: arrays, offsets, visible; rows of padding after them."""
    q, k, scale, w = (x[0] for x in draw.integers(seed, 1, T, N, 16, 64, E4M3, True))
    cu = [np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32) for lengths in (lengths_q, lengths_k)]
    visible = np.zeros(T, np.int32)
    for r, (n_q, n_k) in enumerate(zip(lengths_q, lengths_k, strict=True)):
        visible[cu[0][r] : cu[0][r + 1]] = np.maximum(n_k - n_q + 1 + np.arange(n_q), 0)
    return (q, k, scale, w, jnp.asarray(visible)), tuple(map(jnp.asarray, cu))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "queries"),
    [pytest.param("mosaic_gpu", 4, marks=pytest.mark.exhaustive), ("triton", 8192)],
    ids=["mosaic_a_few_queries_at_a_time", "triton_one_piece"],
)
def test_packed_sequences_keep_the_contract(backend, queries, monkeypatch, request):
    # More blocks than are kept, an empty sequence, one with fewer tokens than a block; 3 rows of padding.
    lengths_q, lengths_k = [2, 0, 1, 3], [300, 40, 9, 230]
    arrays, cu = _packed(9, lengths_q, lengths_k, 9, 600)
    monkeypatch.setattr(indexer, "QUERIES", queries)
    module, mode = triton, True
    if backend == "mosaic_gpu":
        module, mode = mosaic_gpu, request.getfixturevalue("interpret")
    options = {"topk": 50, "block_size": 32, "block_topk": 4}
    hisa = kernel_calls.select_hisa(module, *arrays, **options, cu_seqlens=cu, interpret=mode)
    flat = kernel_calls.select_flat(module, *arrays, topk=50, cu_seqlens=cu, interpret=mode)
    for r in np.flatnonzero(lengths_q):
        rows, keys = (slice(int(x[r]), int(x[r + 1])) for x in cu)
        q, k, scale, w, visible = arrays
        one = q[None, rows], k[None, keys], scale[None, keys], w[None, rows], np.asarray(visible)[None, rows]
        promises.check_hisa([x[None, rows] for x in hisa], *one, **options, **EXACT)
        promises.check_flat([x[None, rows] for x in flat], *one, topk=50, token_tolerance=1e-9)
    for indices, count in (hisa[:2], flat):
        assert (np.asarray(indices)[6:] == -1).all() and (np.asarray(count)[6:] == 0).all()


@pytest.mark.slow
def test_nan_scores_are_chosen_last(interpret):
    q, k, _, w = draw.integers(5, 1, 1, 256, 16, 64, BF16, False)
    k = k.at[0, 17].set(jnp.nan)
    visible = np.asarray([[256]], np.int32)
    options = {"topk": 255, "block_size": 64, "block_topk": 4}
    for got in (
        kernel_calls.select_hisa(mosaic_gpu, q, k, None, w, jnp.asarray(visible), **options, interpret=interpret),
        kernel_calls.select_hisa(triton, q, k, None, w, jnp.asarray(visible), **options, interpret=True),
    ):
        assert set(range(256)) - set(np.asarray(got[0]).ravel().tolist()) == {17}


@pytest.mark.slow
@pytest.mark.parametrize("block_size", [32, 256])
def test_refine_takes_several_blocks_a_tile_and_several_tiles_a_block(interpret, block_size):
    q, k, scale, w = draw.integers(6, 1, 2, 768, 16, 64, E4M3, True)
    blocks = np.asarray([[0, 1, 2], [0, 2, -1]], np.int32)
    visible = np.asarray([3 * block_size - 5, 3 * block_size], np.int32)
    first = jnp.zeros((2,), jnp.int32)
    kept = KeptBlocks(ids=jnp.asarray(blocks), visible=jnp.asarray(visible), first=first, size=block_size)
    options = {"config": mosaic_refine.Config(ring=4), "n_ctas": 1, "interpret": interpret}
    indices, count = mosaic_refine.refine(Operands(q[0], w[0], k[0], scale[0]), kept, k_top=40, **options)
    scores = reference.token_scores(q[0], k[0], scale[0], w[0])
    for t in range(2):
        tokens = reference.tokens_of(blocks[t][blocks[t] >= 0], visible[t], block_size)
        reference.assert_selection(np.asarray(indices[t]), int(count[t]), scores[t], tokens, 40, 1e-9, f"query {t}")


def _sort_keys(seed):
    """Rows of sort keys with ties, forced and invisible ones."""
    rng = np.random.default_rng(seed)
    x = rng.integers(-40, 40, (5, 1024)).astype(np.int32)
    x[0, rng.integers(0, 1024, 9)] = 2**31 - 1
    x[1, rng.integers(0, 1024, 700)] = -(2**31)
    x[2] = 7
    limit = np.asarray([1024, 1024, 1024, 130, 0], np.int32)
    return np.where(np.arange(1024) < limit[:, None], x, -(2**31)), limit


def _check_topk(x, limit, got):
    for t in range(len(x)):
        # A row that keeps all it sees is not looked at.
        candidates = np.arange(limit[t]) if limit[t] <= 100 else np.flatnonzero(x[t] > -(2**31))
        wanted = reference.best(x[t].astype(np.float64), candidates, 100)
        count = int(got[1][t])
        np.testing.assert_array_equal(np.asarray(got[0][t])[:count], wanted)
        assert (np.asarray(got[0][t])[count:] == -1).all()


@pytest.mark.oldest
def test_mosaic_topk_breaks_ties_from_the_left(interpret):
    x, limit = _sort_keys(7)
    _check_topk(x, limit, mosaic_topk.topk(jnp.asarray(x), jnp.asarray(limit), 100, n_ctas=2, interpret=interpret))


def test_triton_topk_breaks_ties_from_the_left():
    x, limit = _sort_keys(7)
    _check_topk(x, limit, triton_topk.topk(jnp.asarray(x), jnp.asarray(limit), 100, interpret=True))


@pytest.mark.parametrize("n_splits", [1, 3])
@pytest.mark.parametrize("is_quantized", [False, True])
@pytest.mark.gate("False-1", "False-3", "True-3")
def test_sparse_mla_is_a_softmax_over_the_chosen(n_splits, is_quantized):
    rng = np.random.default_rng(8)
    V = 256 if is_quantized else 64  # in 8 bits two groups, of unlike scales
    q, kv = rng.standard_normal((1, 2, 16, V + 16)), rng.standard_normal((1, 70, V + 16))
    kv[..., :64] *= 3
    indices = np.stack([rng.permutation(70)[:40] for _ in range(2)])[None].astype(np.int32)
    indices[0, 1, 5:] = -1
    config = Config(tile_n=16, tile_s=16, n_splits=n_splits)
    q, kv = jnp.asarray(q, BF16), jnp.asarray(kv, BF16)
    latents = kv
    if is_quantized:
        latents = hj.quantize_latents(kv, V, "float32")
        kv = latents.dequantize()
    o, lse = sparse_mla(q, latents, jnp.asarray(indices), value_dim=V, scale=0.02, config=config, interpret=True)
    qf, kvf = np.asarray(q, np.float64), np.asarray(kv, np.float64)
    for t in range(2):
        rows = kvf[0, indices[0, t][indices[0, t] >= 0]]
        logits = 0.02 * qf[0, t] @ rows.T
        p = np.exp(logits)
        np.testing.assert_allclose(np.asarray(lse[0, t]), np.log(p.sum(1)), atol=4e-3)
        np.testing.assert_allclose(
            np.asarray(o[0, t], np.float32), (p / p.sum(1, keepdims=True)) @ rows[:, :V], atol=4e-2
        )


def test_sparse_mla_of_nothing_is_zero():
    o, lse = sparse_mla(
        jnp.ones((1, 1, 16, 80), BF16),
        jnp.ones((1, 16, 80), BF16),
        jnp.full((1, 1, 16), -1, jnp.int32),
        value_dim=64,
        scale=1.0,
        config=Config(tile_n=16, tile_s=16),
        interpret=True,
    )
    assert not np.asarray(o, np.float32).any() and np.isneginf(np.asarray(lse)).all()
