"""Latents in 8 bits: what they are, in caches, and in the sparse attention against the oracle. 4 s in the gate."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hisa_jax as hj
from hisa_jax.kernels_pallas.mosaic_gpu import sparse_mla as mosaic_gpu
from hisa_jax.kernels_pallas.mosaic_tpu import sparse_mla as mosaic_tpu
from hisa_jax.kernels_pallas.triton import sparse_mla as triton
from tests import oracle
from tests.test_sparse_mla import inputs


def quantized(kv, value_dim=32, **options):
    return hj.quantize_latents(jnp.asarray(kv), value_dim, **options)


def test_a_token_has_656_bytes_and_comes_back_from_them():
    kv = jax.random.normal(jax.random.key(0), (2, 5, 576))
    found = hj.quantize_latents(kv)
    rows = found.to_bytes()
    assert rows.shape == (2, 5, 656) and rows.dtype == jnp.uint8 and found.shape == (2, 5, 576)
    again = hj.QuantizedLatents.from_bytes(rows)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(again), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))
    token = np.asarray(rows[1, 2])
    np.testing.assert_array_equal(token[512:528].view(np.float32), found.scales[1, 2])
    np.testing.assert_array_equal(token[528:].view(jnp.bfloat16), found.rope[1, 2])


def test_values_are_within_half_a_step_of_e4m3_and_exact_in_bfloat16():
    kv = jax.random.normal(jax.random.key(1), (64, 300)) * jnp.exp(jax.random.normal(jax.random.key(2), (64, 1)))
    found = quantized(kv, 256)
    values, wanted = np.asarray(found.dequantize()[:, :256]), np.asarray(kv[:, :256])
    amax = np.abs(wanted.reshape(64, 2, 128)).max(-1)
    # A step is an eighth of the power of two below, or of the smallest normal number 2^-6.
    floor = np.repeat(np.asarray(found.scales) * 2.0**-6, 128, axis=1)
    assert (np.abs(values - wanted) <= np.maximum(np.abs(wanted), floor) / 16).all()
    assert (np.log2(found.scales) % 1 == 0).all() and (found.scales * 448 >= amax).all()
    assert (found.scales * 224 < amax).all(), "a scale is larger than needed"
    np.testing.assert_array_equal(values, np.asarray(jnp.asarray(values).astype(jnp.bfloat16), np.float32))
    np.testing.assert_array_equal(found.rope, kv[:, 256:].astype(jnp.bfloat16))


def test_the_error_of_an_output_is_that_of_e4m3():
    """Normal latents of the real sizes, 90 a query: 0.035 of the norm, of which bfloat16 has 0.002."""
    q, kv, indices = inputs(1, 3, 300, 16, 128, latent=512, rope=64)
    attend = functools.partial(hj.sparse_mla, jnp.asarray(q), indices=jnp.asarray(indices), scale=576**-0.5)
    out, wanted = attend(kv=hj.quantize_latents(jnp.asarray(kv))), oracle.sparse_mla(q, kv, indices, 512, 576**-0.5)[0]
    error = np.linalg.norm(np.asarray(out) - wanted) / np.linalg.norm(wanted)
    assert 0.015 < error < 0.04, error


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("scale_format", ["ue8m0", "float32"])
@pytest.mark.gate("ue8m0-bfloat16", "float32-float32")
def test_outputs_are_the_oracles_of_the_dequantised_latents(dtype, scale_format):
    q, kv, indices = inputs(2, 5, 37, 3, 7, dtype=dtype)
    latents = quantized(kv, scale=scale_format)
    out, lse = hj.sparse_mla(jnp.asarray(q), latents, jnp.asarray(indices), scale=0.15, value_dim=32, return_lse=True)
    wanted, wanted_lse = oracle.sparse_mla(q, latents.dequantize(), indices, 32, 0.15)
    tolerance = 2e-5 if dtype == "float32" else 2e-2
    np.testing.assert_allclose(np.asarray(out, np.float32), wanted, rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(lse, wanted_lse, rtol=tolerance, atol=tolerance)


def test_tokens_not_selected_leave_no_trace_and_no_gradient_goes_through():
    q, kv, indices = map(jnp.asarray, inputs(1, 3, 20, 2, 6))
    others = np.setdiff1d(np.arange(20), indices[0])

    def loss(q, latents):
        return jnp.sum(hj.sparse_mla(q, latents, indices, scale=0.1, value_dim=32) ** 2)

    latents = quantized(kv)
    d_q, d_latents = jax.grad(loss, (0, 1))(q, latents)
    np.testing.assert_allclose(d_q, jax.grad(loss)(q, latents.dequantize()), rtol=1e-4, atol=1e-6)
    assert not any(np.asarray(x, np.float32).any() for x in jax.tree.leaves(d_latents))
    np.testing.assert_array_equal(loss(q, latents), loss(q, quantized(kv.at[0, others].set(jnp.nan))))


def test_pages_keep_them_through_append_copies_and_truncate():
    q, kv, indices = inputs(1, 3, 24, 2, 6)
    cache = hj.init_cache(8, 8, 16, jnp.float32, latent_dim=48, latent_dtype=jnp.float8_e4m3fn, latent_value_dim=32)
    assert cache.latents.shape == (8, 8, 48)
    table, latents = jnp.array([[5, 2, 7]], jnp.int32), quantized(kv[0])
    cache = hj.append(cache, jnp.ones((24, 16)), table, jnp.array([0, 24]), jnp.array([0]), latents=latents)
    cache = hj.copy_pages(cache, jnp.array([2], jnp.int32), jnp.array([0], jnp.int32))
    attend = functools.partial(hj.sparse_mla_paged, jnp.asarray(q[0]), scale=0.1, value_dim=32)
    offsets = jnp.array([0, 3], jnp.int32)
    got = attend(cache, jnp.asarray(indices[0]), jnp.array([[5, 0, 7]], jnp.int32), offsets)
    wanted = oracle.sparse_mla(q, latents.dequantize()[None], indices, 32, 0.1)[0][0]
    np.testing.assert_allclose(got, wanted, rtol=2e-5, atol=2e-5)
    server = hj.IndexCache.from_pages(cache.keys, table, jnp.array([24]), latents=cache.latents)
    np.testing.assert_array_equal(attend(server, jnp.asarray(indices[0]), table, offsets), got)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: hj.quantize_latents(jnp.ones((2, 300)), 200), ValueError, "value_dim=200, wanted a multiple of 128"),
        (lambda: hj.quantize_latents(jnp.ones((2, 8)), 9), ValueError, r"latents is \[2, 8\], wanted value_dim=9"),
        (lambda: hj.quantize_latents(jnp.ones((2, 8), jnp.int8), 4), TypeError, "latents is int8"),
        (lambda: hj.QuantizedLatents.from_bytes(jnp.zeros((2, 655), jnp.uint8)), ValueError, "528 bytes and 2 a rope"),
        (lambda: hj.QuantizedLatents.from_bytes(jnp.zeros((2, 656))), TypeError, "rows is float32"),
        (
            lambda: hj.init_cache(2, 16, 8, latent_dim=64, latent_dtype=jnp.float8_e4m3fn),
            ValueError, "latent_value_dim=512, wanted at most latent_dim=64",
        ),
        (lambda: attend_other(value_dim=16), ValueError, "value_dim=16, wanted 32, as the latents are quantised"),
        (lambda: attend_other(S=3), ValueError, r"kv.scales is \[1, 3, 1\], wanted \[1, 4, 1\]"),
        (lambda: append_other(), TypeError, "latents is .*, wanted QuantizedLatents, as the cache holds them"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_a_clear_error(call, error, match):
    with pytest.raises(error, match=match):
        call()


def attend_other(value_dim=32, S=4):
    latents = quantized(jnp.ones((1, 4, 48)))
    if S != 4:
        latents = hj.QuantizedLatents(latents.values, latents.scales[:, :3], latents.rope)
    return hj.sparse_mla(
        jnp.ones((1, 2, 2, 48)), latents, jnp.zeros((1, 2, 1), jnp.int32), scale=1.0, value_dim=value_dim
    )


def append_other():
    cache = hj.init_cache(2, 8, 0, latent_dim=48, latent_dtype=jnp.float8_e4m3fn, latent_value_dim=32)
    tables = jnp.zeros((1, 1), jnp.int32), jnp.array([0, 1]), jnp.array([0])
    return hj.append(cache, jnp.ones((1, 0), jnp.bfloat16), *tables, latents=jnp.ones((1, 48), jnp.bfloat16))


def test_backends_say_whether_they_read_them():
    shape: dict = dict(N=64, key_dim=576, value_dim=512, dtype=jnp.bfloat16, is_quantized=True)
    assert "not quantised" in mosaic_tpu.why_not("TPU v5 lite", **shape)
    assert "8.9" in triton.why_not("8.0", **shape) and triton.why_not("9.0", **shape) is None
    assert mosaic_gpu.why_not("9.0", **shape) is None
