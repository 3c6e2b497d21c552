"""A query's blocks over several CTAs: what decoding does, where there are fewer queries than multiprocessors."""

import jax.numpy as jnp
import numpy as np
import pytest

from hisa_jax.kernels_pallas.mosaic_gpu import refine
from hisa_jax.kernels_pallas.operands import KeptBlocks, Operands
from hisa_jax.kernels_pallas.triton import topk
from tests.gpu import draw, reference
from tests.gpu.test_lowering import lower

E4M3 = jnp.float8_e4m3fn


@pytest.mark.parametrize("n_parts", [1, 2])
def test_parts_of_a_query_make_the_same_selection(interpret, n_parts):
    block_size, S = 32, 1024
    q, k, scale, w = draw.integers(9, 1, 2, 2 * S, 16, 64, E4M3, True)
    k = k.at[0, S + 3].set(jnp.nan)
    blocks = np.full((2, 20), -1, np.int32)
    blocks[0] = np.sort(np.random.default_rng(0).permutation(32)[:20])  # more than a part holds
    blocks[1, :3] = [0, 2, 31]  # the second part has nothing
    visible, first_block = np.asarray([S - 7, S - 7], np.int32), np.asarray([0, S // block_size], np.int32)
    options = {"config": refine.Config(ring=4), "n_parts": n_parts, "n_ctas": 3}
    ids, visible, first = map(jnp.asarray, (blocks, visible, first_block))
    operands, kept = (
        Operands(q[0], w[0], k[0], scale[0]),
        KeptBlocks(ids=ids, visible=visible, first=first, size=block_size),
    )
    sort_keys = refine.refine_scores(operands, kept, **options, interpret=interpret)
    limit = np.full(2, 640) if n_parts > 1 else (blocks >= 0).sum(1) * block_size
    limit = jnp.asarray(limit, jnp.int32)
    indices, count = topk.topk(sort_keys, limit, 50, kept, interpret=True)
    for t in range(2):
        own = slice(t * S, (t + 1) * S)
        scores = reference.token_scores(q[0, t : t + 1], k[0, own], scale[0, own], w[0, t : t + 1])[0]
        tokens = reference.tokens_of(blocks[t][blocks[t] >= 0], visible[t], block_size)
        reference.assert_selection(np.asarray(indices[t]), int(count[t]), scores, tokens, 50, 1e-9, f"query {t}")


def test_split_fills_the_ctas_with_equal_parts():
    config = refine.Config(ring=4)  # 512 columns: 16 laps of 8192
    for T, n_parts in ((1, 16), (8, 16), (9, 8), (32, 4), (66, 2), (67, 1), (4096, 1)):
        assert refine.split(T, 64, 128, config, 132) == n_parts
    assert refine.split(1, 3, 128, config, 132) == 1


def test_parts_lower():
    def scores(q, w, k, k_scale, block_ids, visible, first_block):
        operands = Operands(q, w, k, k_scale)
        kept = KeptBlocks(ids=block_ids, visible=visible, first=first_block, size=128)
        return refine.refine_scores(operands, kept, config=refine.Config(ring=4), n_parts=16)

    f32, i32 = jnp.float32, jnp.int32
    shapes = ((1, 64, 128), E4M3), ((1, 64), f32), ((131072, 128), E4M3), ((131072,), f32), ((1, 64), i32)
    assert "custom_call" in lower(scores, *shapes, ((1,), i32), ((1,), i32))
