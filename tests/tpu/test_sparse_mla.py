"""Sparse attention on TPU against NumPy, from token lists."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bench import shapes
from bench.tpu import aot
from hisa_jax.kernels_pallas.mosaic_tpu import sparse_mla as module
from hisa_jax.kernels_pallas.mosaic_tpu.sparse_mla import Config, sparse_mla


def attention(q, kv, chosen, value_dim, scale):
    """[B, T, N, E], [B, S, E], [B, T, S] bool -> o, lse, in float64."""
    logits = scale * np.einsum("btne,bse->btns", np.asarray(q, np.float64), np.asarray(kv, np.float64))
    p = np.where(chosen[:, :, None], np.exp(logits), 0)
    total = p.sum(-1, keepdims=True)
    o = p / np.maximum(total, 1e-300) @ np.asarray(kv, np.float64)[:, None, :, :value_dim]
    with np.errstate(divide="ignore"):
        return o, np.log(total[..., 0])


def case(B, T, S, N, E, seed=0):
    """Queries of the last T tokens; one that chose nothing, one that chose all it sees."""
    draw = np.random.default_rng(seed)
    q = jnp.asarray(draw.standard_normal((B, T, N, E)), jnp.bfloat16)
    kv = jnp.asarray(draw.standard_normal((B, S, E)), jnp.bfloat16)
    chosen = draw.random((B, T, S)) < draw.choice([0.02, 0.5], (B, T, 1))
    chosen &= np.arange(S) <= np.arange(S - T, S)[:, None]
    chosen[0, 0], chosen[0, -1] = False, True
    return q, kv, chosen


def lists_of(chosen, K):
    out = np.full((*chosen.shape[:2], K), -1, np.int32)
    for at in np.ndindex(chosen.shape[:2]):
        tokens = np.flatnonzero(chosen[at])
        out[at][: len(tokens)] = tokens
    return jnp.asarray(out)


def assert_close(got, want):
    o, lse = got
    np.testing.assert_allclose(np.asarray(o, np.float32), want[0], atol=0.02)
    np.testing.assert_allclose(lse, want[1], atol=1e-3)


@pytest.mark.parametrize(
    ("B", "T", "S", "N", "E", "value_dim", "K"),
    [(2, 3, 700, 16, 160, 128, 700), pytest.param(1, 2, 1300, 32, 192, 128, 1400, marks=pytest.mark.exhaustive)],
)
def test_attends_to_the_listed_tokens(B, T, S, N, E, value_dim, K, interpret):
    q, kv, chosen = case(B, T, S, N, E)
    options = dict(value_dim=value_dim, scale=E**-0.5)
    got = sparse_mla(q, kv, lists_of(chosen, K), **options, config=Config(tile_s=256), interpret=interpret)
    assert_close(got, attention(q, kv, chosen, **options))
    assert np.isneginf(got[1][0, 0]).all() and not np.asarray(got[0][0, 0]).any()


def test_says_what_it_declines():
    assert module.why_not("TPU v5 lite", 128, 576, 512, jnp.bfloat16) is None
    assert "bfloat16" in module.why_not("TPU7x", 128, 576, 512, jnp.float32)
    assert "16 heads" in module.why_not("TPU7x", 8, 576, 512, jnp.bfloat16)
    assert "multiple of 128" in module.why_not("TPU7x", 16, 576, 500, jnp.bfloat16)
    assert "this device is 'cpu'" in module.why_not("cpu", 16, 576, 512, jnp.bfloat16)


@pytest.mark.exhaustive  # in the gate test_pod_steps.py compiles it, on pages
@pytest.mark.slow
@pytest.mark.parametrize(("B", "T", "context"), [(1, 64, 131072), (32, 1, 32768)])
def test_compiles(chip, B, T, context):
    model = shapes.DSV32
    N, E = model.mla_heads, model.mla_dim
    q, kv = jax.ShapeDtypeStruct((B, T, N, E), jnp.bfloat16), jax.ShapeDtypeStruct((B, context, E), jnp.bfloat16)
    indices = jax.ShapeDtypeStruct((B, T, model.topk), jnp.int32)
    options = dict(value_dim=model.mla_value_dim, scale=E**-0.5)
    aot.compile_for(chip, lambda *operands: sparse_mla(*operands, **options), q, kv, indices, schedules=False)
