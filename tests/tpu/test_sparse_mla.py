"""Sparse attention on TPU against NumPy, from token lists and from masked blocks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bench import shapes
from bench.tpu import aot
from hisa_jax.kernels_pallas import mosaic_tpu
from hisa_jax.kernels_pallas.mosaic_tpu import sparse_mla as module
from hisa_jax.kernels_pallas.mosaic_tpu.sparse_mla import Config, sparse_mla, sparse_mla_blocks
from tests.gpu import draw, promises


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


@pytest.mark.parametrize("block_size", [128, pytest.param(256, marks=pytest.mark.exhaustive)])
def test_attends_to_the_masked_tokens_of_blocks(block_size, interpret):
    B, T, S, N, E = 1, 3, 1024, 16, 160
    q, kv, chosen = case(B, T, S, N, E)
    n = S // block_size
    ids = np.where(chosen.reshape(B, T, n, block_size).any(-1), np.arange(n), n)
    ids = np.sort(ids, axis=2)
    mask = np.take_along_axis(chosen.reshape(B, T, n, block_size), np.minimum(ids, n - 1)[..., None], axis=2)
    ids = np.where(ids < n, ids, -1).astype(np.int32)
    options = dict(value_dim=128, scale=E**-0.5)
    assert_close(
        sparse_mla_blocks(q, kv, ids, mask, **options, interpret=interpret), attention(q, kv, chosen, **options)
    )


def test_from_the_indexer_to_the_attention_without_a_list(interpret):
    """The indexer hands out its kept blocks and a mask of their tokens, and the attention takes them as they are."""
    B, T, S, lengths, options = 1, 9, 1024, [1000], dict(topk=200, block_size=128, block_topk=3)
    visible = np.maximum(np.asarray(lengths, np.int32)[:, None] - np.arange(T - 1, -1, -1, dtype=np.int32), 0)
    inputs = draw.integers(0, B, T, S, 16, 64, jnp.bfloat16, False)
    mask, count, blocks = mosaic_tpu.select_hisa(
        *inputs, visible, **options, lengths=jnp.asarray(lengths), is_masked=True, interpret=interpret
    )
    tokens = np.maximum(blocks, 0)[..., None] * 128 + np.arange(128)
    indices = np.full((B, T, 200), -1, np.int32)
    chosen = np.zeros((B, T, S), bool)
    for at in np.ndindex(B, T):
        of_query = np.sort(tokens[at][np.asarray(mask[at]) > 0])
        indices[at][: len(of_query)], chosen[at][of_query] = of_query, True
    promises.check_hisa(
        (indices, count, blocks), *inputs, visible, **options, token_tolerance=1e-9, block_tolerance=1e-9
    )
    q, kv, _ = case(B, T, S, 16, 160)
    mla = dict(value_dim=128, scale=160**-0.5)
    assert_close(sparse_mla_blocks(q, kv, blocks, mask, **mla, interpret=interpret), attention(q, kv, chosen, **mla))


def test_says_what_it_declines():
    assert module.why_not("TPU v5 lite", 128, 576, 512, jnp.bfloat16) is None
    assert "bfloat16" in module.why_not("TPU7x", 128, 576, 512, jnp.float32)
    assert "16 heads" in module.why_not("TPU7x", 8, 576, 512, jnp.bfloat16)
    assert "multiple of 128" in module.why_not("TPU7x", 16, 576, 500, jnp.bfloat16)
    assert "this device is 'cpu'" in module.why_not("cpu", 16, 576, 512, jnp.bfloat16)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("B", "T", "context"), [pytest.param(1, 64, 131072, marks=pytest.mark.exhaustive), (32, 1, 32768)]
)
def test_compiles(chip, B, T, context):
    model = shapes.DSV32
    N, E = model.mla_heads, model.mla_dim
    q, kv = jax.ShapeDtypeStruct((B, T, N, E), jnp.bfloat16), jax.ShapeDtypeStruct((B, context, E), jnp.bfloat16)
    indices = jax.ShapeDtypeStruct((B, T, model.topk), jnp.int32)
    options = dict(value_dim=model.mla_value_dim, scale=E**-0.5)
    aot.compile_for(chip, lambda *operands: sparse_mla(*operands, **options), q, kv, indices, schedules=False)
    ids = jax.ShapeDtypeStruct((B, T, model.block_topk), jnp.int32)
    mask = jax.ShapeDtypeStruct((B, T, model.block_topk, model.block_size), jnp.bool_)
    f = lambda *operands: sparse_mla_blocks(*operands, **options)  # noqa: E731
    aot.compile_for(chip, f, q, kv, ids, mask, schedules=False)
