"""Latents in 8 bits on a GPU: append of Triton, and the sparse attention of Triton and by `hj.sparse_mla_paged`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hisa_jax as hj
from hisa_jax.kernels_pallas.triton.append import append
from hisa_jax.kernels_pallas.triton.sparse_mla import sparse_mla
from tests.gpu.test_sparse_mla_mosaic import SCALE, draw, expected, quantized


def write(name, interpret=False):
    """A cache that two requests append 21 tokens to, by a backend."""
    cache = hj.init_cache(6, 16, 16, jnp.bfloat16, latent_dim=300, latent_dtype=jnp.float8_e4m3fn, latent_value_dim=256)
    k = jax.random.normal(jax.random.key(0), (21, 16), jnp.bfloat16)
    latents = hj.quantize_latents(jax.random.normal(jax.random.key(1), (21, 300)), 256)
    table = jnp.array([[4, 1], [2, 5]], jnp.int32)
    arrays = table, jnp.array([0, 18, 21], jnp.int32), jnp.array([0, 5], jnp.int32)
    if interpret:
        return append(cache, (k, None, latents), *arrays, interpret=True)
    return hj.append(cache, k, *arrays, latents=latents, implementation=name)


def assert_alike(got, wanted):
    for a, b in zip(jax.tree.leaves(got.latents), jax.tree.leaves(wanted.latents), strict=True):
        np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))


@pytest.mark.exhaustive  # 6 seconds
def test_append_writes_what_xla_writes():
    assert_alike(write("triton", interpret=True), write("xla"))


@pytest.mark.gpu
def test_append_writes_what_xla_writes_on_device(gpu):
    assert_alike(write("triton"), write("xla"))


@pytest.mark.gpu
@pytest.mark.parametrize(("B", "T", "N", "S", "K"), [(2, 9, 128, 3000, 2048), (3, 5, 32, 100, 33)])
def test_triton_on_device(gpu, B, T, N, S, K):
    q, kv, indices = draw(B, T, N, S, K)
    latents, plain = quantized(kv)
    o, lse = sparse_mla(q, latents, jnp.asarray(indices), value_dim=512, scale=SCALE)
    for b, t in np.ndindex(B, T):
        want_o, want_lse = expected(np.asarray(q[b, t], np.float32), np.asarray(plain[b], np.float32), indices[b, t])
        assert np.linalg.norm(np.asarray(o[b, t], np.float64) - want_o) <= 1e-2 * np.linalg.norm(want_o), (b, t)
        np.testing.assert_allclose(lse[b, t], want_lse, atol=2e-3)


@pytest.mark.gpu
def test_pages_on_device(gpu):
    """All implementations, tokens that are not selected NaN."""
    q, kv, indices = draw(1, 7, 64, 256, 100)
    others = np.setdiff1d(np.arange(256), indices)
    latents, _ = quantized(kv.at[0, others].set(jnp.nan))
    cache = hj.init_cache(4, 64, 0, latent_dim=576, latent_dtype=jnp.float8_e4m3fn)
    cache = hj.append(
        cache, jnp.zeros((256, 0), jnp.bfloat16), jnp.arange(4, dtype=jnp.int32)[None, ::-1], jnp.array([0, 256]),
        jnp.array([0]), latents=jax.tree.map(lambda x: x[0], latents),
    )  # fmt: skip
    attend = functools.partial(
        hj.sparse_mla_paged, q[0], cache, jnp.asarray(indices[0]), jnp.arange(4, dtype=jnp.int32)[None, ::-1],
        jnp.array([0, 7], jnp.int32), scale=SCALE,
    )  # fmt: skip
    wanted = np.asarray(attend(implementation="xla"), np.float32)
    for name in ("mosaic_gpu", "triton"):
        got = np.asarray(attend(implementation=name), np.float32)
        assert np.linalg.norm(got - wanted) <= 1e-2 * np.linalg.norm(wanted)


@pytest.fixture
def gpu():
    if jax.default_backend() != "gpu":
        pytest.skip("needs an NVIDIA GPU")
