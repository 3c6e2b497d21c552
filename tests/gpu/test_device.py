"""Both backends on a real GPU against the contract in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hisa_jax.kernels_pallas import mosaic_gpu, triton
from hisa_jax.kernels_pallas.triton.sparse_mla import sparse_mla
from tests import kernel_calls
from tests.gpu import draw, promises

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning"),
]
BACKENDS = {"mosaic_gpu": mosaic_gpu, "triton": triton}
E4M3, BF16 = jnp.float8_e4m3fn, jnp.bfloat16
# Relative to the spread of a query's scores. Hopper adds e4m3 products with 14 bits; block means carry 8 bits.
TOKENS, BLOCKS = {E4M3: 2e-3, BF16: 1e-5}, {E4M3: 2e-2, BF16: 2e-2}


@pytest.fixture(params=["mosaic_gpu", "triton"])
def backend(request):
    """A backend that this device can run, or a skip that says why not."""
    if jax.default_backend() != "gpu":
        pytest.skip("needs an NVIDIA GPU")
    module = BACKENDS[request.param]
    reason = module.why_not(jax.devices()[0].compute_capability, 64, 128, E4M3, topk=64)
    if reason:
        pytest.skip(reason)
    return module


def check(module, visible, S, H, D, dtype, has_scale, topk, block_size, block_topk, seed=0, inputs=draw.normal):
    visible = np.asarray(visible, np.int32)
    q, k, scale, w = inputs(seed, *visible.shape, S, H, D, dtype, has_scale)
    options = {"topk": topk, "block_size": block_size, "block_topk": block_topk}
    got = kernel_calls.select_hisa(module, q, k, scale, w, jnp.asarray(visible), **options)
    exact = inputs is draw.integers
    tolerance = {
        "token_tolerance": 0.0 if exact else TOKENS[dtype],
        "block_tolerance": 1e-5 if exact and has_scale is False else BLOCKS[dtype],
    }
    promises.check_hisa(got, q, k, scale, w, visible, **options, **tolerance)
    flat = kernel_calls.select_flat(module, q, k, scale, w, jnp.asarray(visible), topk=topk)
    token_tolerance = tolerance["token_tolerance"]
    promises.check_flat(flat, q, k, scale, w, visible, topk=topk, token_tolerance=token_tolerance)
    return got


@pytest.mark.parametrize("dtype", [E4M3, BF16], ids=["e4m3", "bf16"])
@pytest.mark.parametrize(
    ("H", "D", "block_size"),
    [(16, 64, 128), (32, 128, 128), (128, 128, 128), (64, 128, 32), (64, 128, 64), (64, 64, 256)],
)
def test_head_and_block_sizes(backend, H, D, block_size, dtype):
    S = 24 * block_size
    check(backend, [np.arange(S - 20, S + 1)], S, H, D, dtype, dtype == E4M3, 200, block_size, 8)


def test_dsv32_prefill_tail(backend):
    check(backend, [np.arange(65536 - 23, 65537)], 65536, 64, 128, E4M3, True, 2048, 128, 64)


def test_ragged_batch_with_short_and_empty_rows(backend):
    visible = np.random.default_rng(0).integers(0, 5001, (3, 29))
    visible[0, :4] = (0, 1, 512, 513)
    check(backend, visible, 5000, 64, 128, E4M3, True, 512, 128, 8)


def test_ties_go_to_the_lower_position(backend):
    check(backend, [np.arange(4000, 4097, 5)], 4096, 64, 128, BF16, False, 500, 128, 8, inputs=draw.integers)


def test_equal_scores_keep_the_lowest_tokens(backend):
    q, k = jnp.ones((1, 2, 64, 128), BF16), jnp.ones((1, 4096, 128), BF16)
    w, visible = jnp.ones((1, 2, 64), jnp.float32), jnp.asarray([[4096, 3000]], jnp.int32)
    indices, _, blocks = kernel_calls.select_hisa(
        backend, q, k, None, w, visible, topk=700, block_size=128, block_topk=8
    )
    np.testing.assert_array_equal(blocks[0, 0], [0, 1, 2, 3, 4, 5, 6, 31])
    np.testing.assert_array_equal(indices[0, 0], np.arange(700))


def test_nan_scores_are_chosen_last(backend):
    q, k, _, w = draw.normal(1, 1, 1, 4096, 64, 128, BF16, False)
    k = k.at[0, 17].set(jnp.nan).at[0, 4000].set(jnp.nan)
    visible = jnp.asarray([[4096]], jnp.int32)
    indices, count, _ = kernel_calls.select_hisa(
        backend, q, k, None, w, visible, topk=4094, block_size=128, block_topk=32
    )
    assert int(count[0, 0]) == 4094 and not np.isin([17, 4000], np.asarray(indices)).any()


def test_up_to_the_kept_blocks_hisa_is_the_flat_indexer(backend):
    q, k, scale, w = draw.normal(2, 1, 16, 8192, 64, 128, E4M3, True)
    visible = jnp.arange(8177, 8193, dtype=jnp.int32)[None]
    hisa = kernel_calls.select_hisa(backend, q, k, scale, w, visible, topk=2048, block_size=128, block_topk=64)
    flat = kernel_calls.select_flat(backend, q, k, scale, w, visible, topk=2048)
    np.testing.assert_array_equal(hisa[0], flat[0])


def test_results_do_not_depend_on_the_batch(backend):
    q, k, scale, w = draw.normal(3, 2, 40, 16384, 64, 128, E4M3, True)
    visible = jnp.broadcast_to(jnp.arange(16345, 16385, dtype=jnp.int32), (2, 40))
    options = {"topk": 1024, "block_size": 128, "block_topk": 16}
    whole = kernel_calls.select_hisa(backend, q, k, scale, w, visible, **options)
    part = kernel_calls.select_hisa(backend, q[1:, 7:20], k[1:], scale[1:], w[1:, 7:20], visible[1:, 7:20], **options)
    again = kernel_calls.select_hisa(backend, q, k, scale, w, visible, **options)
    for x, y, z in zip(whole, part, again, strict=True):
        np.testing.assert_array_equal(x[1:, 7:20], y)
        np.testing.assert_array_equal(x, z)


SOAKS = [  # S, H, D, dtype, topk, block_size, block_topk: few shapes, since each compiles, and many draws of each
    (2500, 64, 128, E4M3, 300, 128, 8),
    (3000, 32, 128, E4M3, 1000, 64, 24),
    (2000, 64, 128, BF16, 257, 32, 20),
]


@pytest.mark.parametrize("shape", SOAKS)
def test_soak(backend, shape):
    S, H, D, dtype, topk, block_size, block_topk = shape
    for seed in range(40):
        rng = np.random.default_rng(seed)
        visible = rng.integers(0, S + 1, (2, 3))
        check(backend, visible, S, H, D, dtype, dtype == E4M3, topk, block_size, block_topk, seed)


def test_memory_holds_no_score_matrix(backend):
    """The documented sort keys: none for Mosaic GPU, [T, m * block_size] of at most 4096 queries for Triton."""
    B, T, S, H, D = 1, 4096, 65536, 64, 128
    shapes = [
        ((B, T, H, D), E4M3),
        ((B, S, D), E4M3),
        ((B, S), jnp.float32),
        ((B, T, H), jnp.float32),
        ((B, T), jnp.int32),
    ]
    hisa = jax.jit(lambda *x: kernel_calls.select_hisa(backend, *x, topk=2048, block_size=128, block_topk=64))
    compiled = hisa.lower(*(jax.ShapeDtypeStruct(*shape) for shape in shapes)).compile()
    allowed = 40e6 + (T * 8192 * 4 if backend is triton else 0)
    assert compiled.memory_analysis().temp_size_in_bytes < allowed


@pytest.mark.parametrize(("B", "T", "N"), [(1, 33, 128), (4, 1, 64)], ids=["prefill", "decode"])
def test_sparse_mla(B, T, N):
    if jax.default_backend() != "gpu":
        pytest.skip("needs an NVIDIA GPU")
    rng = np.random.default_rng(5)
    q, kv = (jnp.asarray(rng.standard_normal(shape), BF16) for shape in ((B, T, N, 576), (B, 5000, 576)))
    indices = (
        np.stack([np.sort(rng.permutation(5000)[:2048]) for _ in range(B * T)]).reshape(B, T, 2048).astype(np.int32)
    )
    indices[0, 0, 100:] = -1
    o, lse = sparse_mla(q, kv, jnp.asarray(indices), value_dim=512, scale=576**-0.5)
    qf, kvf = np.asarray(q, np.float32), np.asarray(kv, np.float32)
    for b in range(B):
        for t in range(T):
            rows = kvf[b, indices[b, t][indices[b, t] >= 0]]
            logits = 576**-0.5 * qf[b, t] @ rows.T
            p = np.exp(logits - logits.max(1, keepdims=True))
            want = (p / p.sum(1, keepdims=True)) @ rows[:, :512]
            np.testing.assert_allclose(lse[b, t], np.log(p.sum(1)) + logits.max(1), atol=1e-2)
            error = np.asarray(o[b, t], np.float32) - want
            assert np.linalg.norm(error) < 1e-2 * np.linalg.norm(want)
