"""The hierarchical indexer in TPU interpret mode: races found, copies done only when waited for, memory full of NaN."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hisa_jax.kernels_pallas import mosaic_tpu
from hisa_jax.kernels_pallas.mosaic_tpu import block_filter, decode, pool, pool_body, query_tiles, ragged, refine
from hisa_jax.kernels_pallas.mosaic_tpu.config import CHIPS, Choice
from tests import kernel_calls
from tests.gpu import draw, promises, reference

pytestmark = pytest.mark.slow
BF16, INT8, E4M3 = jnp.bfloat16, jnp.int8, jnp.float8_e4m3fn
EXACT = {"token_tolerance": 1e-9, "block_tolerance": 1e-9}
NEAR = {"token_tolerance": 1e-5, "block_tolerance": 1e-4}


def run(inputs, visible, interpret, *, lengths=None, **options):
    """`select_hisa`, with NaN where a sequence has no keys or scales."""
    q, k, k_scale, w = inputs
    B, S, _ = k.shape
    lengths = np.full((B,), S, np.int32) if lengths is None else np.asarray(lengths, np.int32)
    absent = jnp.asarray(np.arange(S) >= lengths[:, None])
    if k_scale is not None:
        k_scale = jnp.where(absent, jnp.nan, k_scale)
    else:
        k = jnp.where(absent[..., None], jnp.asarray(jnp.nan, k.dtype), k)
    lengths, visible = jnp.asarray(lengths), jnp.asarray(visible)
    return kernel_calls.select_hisa(
        mosaic_tpu, q, k, k_scale, w, visible, lengths=lengths, interpret=interpret, **options
    )


PREFILL = [  # dtype, has_scale, block_size, H, D, topk, block_topk, S, visible [B, T], lengths
    pytest.param(BF16, False, 64, 16, 64, 100, 6, 1100, [[*range(1091, 1100), 20, 0], [*range(290, 300), 64]],
                 [1099, 300], id="bf16_ragged_few_visible_and_none",
                 marks=pytest.mark.check),
    pytest.param(INT8, True, 128, 16, 128, 300, 4, 1500, [[*range(1490, 1500)]], [1500], id="int8_scales",
                 marks=pytest.mark.exhaustive),
    pytest.param(E4M3, True, 256, 32, 64, 1100, 3, 1280, [[*range(1270, 1280)]], [1280], id="e4m3_topk_above_kept",
                 marks=pytest.mark.exhaustive),
]  # fmt: skip


@pytest.mark.parametrize(
    ("dtype", "has_scale", "block_size", "H", "D", "topk", "block_topk", "S", "visible", "lengths"), PREFILL
)
def test_prefill_keeps_the_contract(
    interpret, dtype, has_scale, block_size, H, D, topk, block_topk, S, visible, lengths
):
    """Exactly where sums are exact, a key of NaN among them; but near the threshold on normal data. To compile takes
    longer than to run, so one program runs all three."""
    visible = np.asarray(visible, np.int32)
    shape = *visible.shape, S, H, D, dtype, has_scale
    options = {"topk": topk, "block_size": block_size, "block_topk": block_topk}
    for inputs, tolerances in (
        (draw.integers(0, *shape), EXACT),
        (with_nan(draw.integers(0, *shape), S - 2), EXACT),
        (draw.normal(7, *shape), NEAR),
    ):
        got = run(inputs, visible, interpret, lengths=lengths, **options)
        promises.check_hisa(got, *inputs, visible, **options, **tolerances)


def with_nan(inputs, position):
    q, k, k_scale, w = inputs
    if k_scale is None:
        return q, k.at[:, position].set(jnp.nan), None, w
    return q, k, k_scale.at[:, position].set(jnp.nan), w


@pytest.mark.exhaustive  # compiled at such sizes in test_indexer_compiles.py
def test_keys_beyond_vmem_are_copied_block_by_block(interpret, monkeypatch):
    """And their scales."""
    monkeypatch.setattr(refine, "_RESIDENT_BYTES", 0)
    visible = np.asarray([[*range(700, 708), 30], [*range(1015, 1024)]], np.int32)
    inputs = draw.integers(1, 2, 9, 1024, 16, 64, INT8, True)
    options = {"topk": 90, "block_size": 64, "block_topk": 5}
    got = run(inputs, visible, interpret, lengths=[708, 1024], **options)
    promises.check_hisa(got, *inputs, visible, **options, **EXACT)


@pytest.mark.parametrize(
    "lengths",
    [
        pytest.param([1000, 70], id="split", marks=pytest.mark.exhaustive),
        pytest.param([1024, 0, 65, 333], id="batch"),
        pytest.param([1024, 0, 65, 1, 700, 333, 128, 129, 1000], id="large_batch", marks=pytest.mark.exhaustive),
    ],
)
def test_decode_keeps_the_contract(interpret, lengths):
    visible = np.asarray(lengths, np.int32)[:, None]
    inputs = draw.integers(2, len(lengths), 1, 1024, 16, 64, INT8, True)
    options = {"topk": 90, "block_size": 64, "block_topk": 5}
    got = run(inputs, visible, interpret, lengths=lengths, **options)
    promises.check_hisa(got, *inputs, visible, **options, **EXACT)


@pytest.mark.exhaustive
@pytest.mark.parametrize(("H", "block_size"), [(128, 64), (16, 256)])
def test_every_kind_of_tile(interpret, H, block_size):
    """More candidates a product than a block, and fewer; several steps a list; ties, forced blocks and NaN weights."""
    S = 32 * block_size
    visible = np.asarray([[S - 1] * 8], np.int32)
    inputs = draw.integers(3, 1, 8, S, H, 64, BF16, False)
    options = {"topk": 10 * block_size, "block_size": block_size, "block_topk": 20}
    promises.check_hisa(run(inputs, visible, interpret, **options), *inputs, visible, **options, **EXACT)


@pytest.mark.oldest
@pytest.mark.parametrize(
    ("dtype", "has_scale"),
    [pytest.param(BF16, False, id="bf16", marks=pytest.mark.exhaustive), pytest.param(E4M3, True, id="e4m3")],
)
def test_means_are_over_the_tokens_present(interpret, dtype, has_scale):
    B, n, block_size, D = 2, 16, 64, 64
    _, k, k_scale, _ = draw.normal(5, B, 1, n * block_size, 16, D, dtype, has_scale)
    lengths = np.asarray([n * block_size, 200], np.int32)
    got = np.asarray(pool.pool(ragged.in_blocks(k, k_scale, block_size), jnp.asarray(lengths), interpret=interpret))
    for b in range(B):
        wanted = reference.block_means(k[b], None if k_scale is None else k_scale[b], block_size, lengths[b])
        present = -(-lengths[b] // block_size)
        np.testing.assert_allclose(got[b, :present], wanted[:present], rtol=1e-5, atol=1e-6)


@pytest.mark.exhaustive
@pytest.mark.parametrize(("mean_parts", "tolerance"), [(1, 5e-3), (2, 2e-5)])
def test_blocks_agree_with_float64_but_near_the_threshold(interpret, mean_parts, tolerance):
    """Pooled in the kernel, and from kept means as `decode` does it."""
    B, T, n, block_size, H, D = 1, 8, 64, 64, 16, 128
    q, k, _, w = draw.normal(6, B, T, n * block_size, H, D, BF16, False)
    eligible = jnp.full((T,), n, jnp.int32)
    call = kernel_calls.call_of(q, k, None, w, jnp.full((B, T), n * block_size))
    queries, batch = ragged.of_call(call, block_size)
    choice = Choice(k=16, keep_first=1, keep_last=1, interpret=interpret)
    config = block_filter.Config(tile_t=8, mean_parts=mean_parts)
    tiles = query_tiles.split(batch, T, None, T, 8, 1)
    (pooled,) = block_filter.block_filter(queries, batch, tiles, eligible, choice=choice, config=config)
    means = pool_body.parts_of(pool.pool(batch.keys, batch.lengths, interpret=interpret), mean_parts)
    means = jnp.pad(means, ((0, 0), (0, 128 - n), (0, 0)))
    few = jax.tree.map(lambda x: x[:4], queries)
    chip, sequence = CHIPS["TPU v6e"], np.zeros(4, np.int32)
    (few,) = refine.refine(*decode.as_refinement(few, means, sequence, eligible[:4], choice=choice, chip=chip))
    float_means = reference.block_means(k[0], None, block_size, n * block_size)
    scores = reference.token_scores(q[0], float_means, None, w[0])
    for blocks in (np.asarray(pooled), np.asarray(few)):
        for t in range(len(blocks)):
            promises.check_blocks(blocks[t], scores[t], n * block_size, block_size, 16, tolerance, f"query {t}")


def test_refusals_say_why():
    shape = {"H": 64, "D": 128, "q_dtype": BF16, "k_dtype": BF16, "topk": 2048}
    for kind in ("TPU v5 lite", "TPU v5", "TPU v6 lite", "TPU7x"):
        assert mosaic_tpu.why_not(kind, **shape) is None
    assert "TPU v5e, v5p, v6e or v7x" in mosaic_tpu.why_not("TPU v4", **shape)
    assert "16, 32, 64 or 128 heads" in mosaic_tpu.why_not("TPU7x", **{**shape, "H": 48})
    assert "one dtype" in mosaic_tpu.why_not("TPU7x", **{**shape, "k_dtype": INT8})
    assert "bfloat16, int8 or float8_e4m3fn" in mosaic_tpu.why_not(
        "TPU7x", **{**shape, "q_dtype": jnp.float32, "k_dtype": jnp.float32}
    )
    assert "blocks of 64, 128 or 256" in mosaic_tpu.why_not("TPU7x", **shape, block_size=32)
    assert "topk at most" in mosaic_tpu.why_not("TPU7x", **{**shape, "topk": 1 << 20})
