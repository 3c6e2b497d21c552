"""The Hopper kernel of sparse MLA: interpreted with race detection, lowered for an H200, run where there is one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hisa_jax as hj
from hisa_jax.kernels_pallas.mosaic_gpu.sparse_mla import Config, heuristic, sparse_mla, why_not
from tests.gpu.test_lowering import lower, quantized_latents

BF16, SCALE = jnp.bfloat16, 576**-0.5


@pytest.fixture
def gpu():
    if jax.default_backend() != "gpu":
        pytest.skip("needs an NVIDIA GPU")


def draw(B, T, N, S, K, seed=0):
    """Lists of all lengths: a full one, an empty one, a single token, then any; some have indices out of range."""
    rng = np.random.default_rng(seed)
    q, kv = (jnp.asarray(rng.standard_normal(shape), BF16) for shape in ((B, T, N, 576), (B, S, 576)))
    indices = np.full((B * T, K), -1, np.int32)
    for t, row in enumerate(indices):
        n = (min(K, S), 0, 1)[t] if t < 3 else int(rng.integers(0, min(K, S) + 1))
        row[:n] = np.sort(rng.permutation(S)[:n])
        if t > 2 and n > 2:
            row[:2] = (np.iinfo(np.int32).min, S)
            row[n - 1] = np.iinfo(np.int32).max
    return q, kv, indices.reshape(B, T, K)


def expected(q, kv, indices):
    """One query: [N, 576], [S, 576], [K] -> [N, 512], [N] in float64."""
    rows = np.asarray(kv, np.float64)[indices[(indices >= 0) & (indices < kv.shape[0])]]
    if not len(rows):
        return np.zeros((q.shape[0], 512)), np.full(q.shape[0], -np.inf)
    logits = SCALE * np.asarray(q, np.float64) @ rows.T
    p = np.exp(logits - logits.max(1, keepdims=True))
    return p / p.sum(1, keepdims=True) @ rows[:, :512], np.log(p.sum(1)) + logits.max(1)


def check(q, kv, indices, latents=None, lse_error=1e-3, **options):
    kv_given = kv if latents is None else latents
    o, lse = sparse_mla(q, kv_given, jnp.asarray(indices), value_dim=512, scale=SCALE, **options)
    assert o.dtype == q.dtype and o.shape == (*q.shape[:3], 512) and lse.shape == q.shape[:3]
    o, lse = np.asarray(o, np.float64), np.asarray(lse)
    for b, t in np.ndindex(*indices.shape[:2]):
        want_o, want_lse = expected(np.asarray(q[b, t], np.float32), np.asarray(kv[b], np.float32), indices[b, t])
        assert np.linalg.norm(o[b, t] - want_o) <= 1e-2 * np.linalg.norm(want_o), (b, t)
        np.testing.assert_allclose(lse[b, t], want_lse, atol=lse_error, err_msg=f"query {b}, {t}")


def quantized(kv, scale="float32"):
    """The same in 8 bits, and what they are in bfloat16."""
    latents = hj.quantize_latents(kv, scale=scale)
    return latents, latents.dequantize().astype(BF16)


@pytest.mark.exhaustive  # 10 seconds
def test_latents_in_8_bits_interpreted(interpret):
    q, kv, indices = draw(1, 3, 16, 130, 101)
    latents, plain = quantized(kv)
    check(q, plain, indices, latents=latents, config=Config(n_splits=1), n_ctas=1, interpret=interpret)


@pytest.mark.parametrize("n_splits", [1, 2])
@pytest.mark.gate(2)
def test_interpreted(interpret, n_splits):
    # One CTA, so that it has several queries: the ring of tiles goes on from one to the next.
    check(*draw(1, 4, 16, 130, 101), config=Config(n_splits=n_splits), n_ctas=1, interpret=interpret)


def test_tokens_not_selected_leave_no_trace(interpret):
    q, kv, indices = draw(2, 1, 16, 90, 20)
    for b in range(2):
        others = np.setdiff1d(np.arange(90), indices[b])
        kv = kv.at[b, others].set(jnp.nan)
    check(q, kv, indices, n_ctas=1, interpret=interpret)


@pytest.mark.parametrize(
    ("B", "T", "S", "N", "K"),
    [(1, 4096, 65536, 128, 2048), (32, 1, 8192, 64, 2048), (128, 1, 131072, 128, 2048), (3, 5, 100, 16, 33)],
    ids=["prefill", "decode_32", "decode_128", "odd"],
)
def test_lowers(B, T, S, N, K):
    def attend(q, kv, indices):
        return sparse_mla(q, kv, indices, value_dim=512, scale=SCALE)

    shapes = ((B, T, N, 576), BF16), ((B, S, 576), BF16), ((B, T, K), jnp.int32)
    assert "custom_call" in lower(attend, *shapes)


def test_latents_in_8_bits_lower():
    def attend(q, indices, *latents):
        return sparse_mla(q, hj.QuantizedLatents(*latents), indices, value_dim=512, scale=SCALE)

    shapes = ((128, 1, 128, 576), BF16), ((128, 1, 2048), jnp.int32), *quantized_latents(128, 8192)
    assert "custom_call" in lower(attend, *shapes)


def test_refusals_say_why():
    shape = {"N": 128, "key_dim": 576, "value_dim": 512, "dtype": BF16}
    assert why_not("9.0", **shape) is None
    assert "Hopper" in why_not("8.0", **shape)
    assert "needs bfloat16" in why_not("9.0", **{**shape, "dtype": jnp.float32})
    assert "576" in why_not("9.0", **{**shape, "key_dim": 512})
    assert "16, 32, 64 or 128 heads" in why_not("9.0", **{**shape, "N": 8})


def test_every_multiprocessor_has_work():
    for n_queries, N in ((1, 128), (1, 16), (7, 64), (32, 128), (128, 128)):
        programs = n_queries * max(N // 64, 1) * heuristic(n_queries, N, 2048).n_splits
        assert programs > 66 or programs == n_queries * max(N // 64, 1) * 16


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("B", "T", "N", "S", "K"),
    [(2, 9, 128, 3000, 2048), (1, 150, 64, 5000, 777), (3, 5, 32, 100, 33), (2, 3, 16, 700, 1)],
)
def test_on_device(gpu, B, T, N, S, K):
    check(*draw(B, T, N, S, K))


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("B", "T", "N", "S", "K"), [(2, 9, 128, 3000, 2048), (1, 150, 64, 5000, 777), (3, 5, 32, 100, 33)]
)
@pytest.mark.parametrize("scale", ["ue8m0", "float32"])
def test_latents_in_8_bits_on_device(gpu, B, T, N, S, K, scale):
    q, kv, indices = draw(B, T, N, S, K)
    latents, plain = quantized(kv * jnp.exp(jnp.arange(S) % 9 - 4)[None, :, None].astype(BF16), scale)
    # A scale that is no power of two is rounded to bfloat16 first: 2^-9 of what its group gives to a logit, and logits
    # are up to 5 here. `plain` rounds products alone.
    check(q / 50, plain, indices, latents=latents, lse_error=1e-3 if scale == "ue8m0" else 5 * 2**-9)


@pytest.mark.gpu
def test_every_number_of_8_bits_and_nan_on_device(gpu):
    """Subnormal ones, too; NaN of a token that a query chooses makes its output NaN, that of others nothing."""
    numbers = np.tile(np.arange(256, dtype=np.uint8), 2)
    numbers[numbers % 128 == 127] = 0
    values = np.stack([np.roll(numbers, shift) for shift in range(64)])
    values = jnp.asarray(np.concatenate([values, np.full((1, 512), 127, np.uint8)])).view(jnp.float8_e4m3fn)[None]
    latents = hj.QuantizedLatents(values, jnp.full((1, 65, 4), 2.0**-6), jnp.ones((1, 65, 64), BF16))
    q = jax.random.normal(jax.random.key(0), (1, 2, 64, 576), BF16) / 8
    indices = np.stack([np.arange(64), np.r_[np.arange(63), 64]])[None].astype(np.int32)
    check(q[:, :1], latents.dequantize().astype(BF16), indices[:, :1], latents=latents)
    o, _ = sparse_mla(q, latents, jnp.asarray(indices), value_dim=512, scale=SCALE)
    assert np.isnan(np.asarray(o[0, 1], np.float32)).all() and np.isfinite(np.asarray(o[0, 0], np.float32)).all()


@pytest.mark.gpu
@pytest.mark.parametrize("n_splits", [2, 5, 16])
def test_splits_on_device(gpu, n_splits):
    check(*draw(2, 5, 128, 9000, 2048), config=Config(n_splits=n_splits))


@pytest.mark.gpu
def test_same_bits_again_and_no_trace_on_device(gpu):
    q, kv, indices = draw(1, 6, 128, 4000, 512, seed=1)
    others = np.setdiff1d(np.arange(4000), indices)
    attend = lambda kv: sparse_mla(q, kv, jnp.asarray(indices), value_dim=512, scale=SCALE)  # noqa: E731
    for x, y in zip(attend(kv), attend(kv.at[0, others].set(jnp.nan)), strict=True):
        np.testing.assert_array_equal(np.asarray(x, np.float32), np.asarray(y, np.float32))
