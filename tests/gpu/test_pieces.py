"""Stages of the Triton backend by themselves, where a whole selection would not show what they get wrong. 4 s."""

import jax.numpy as jnp
import numpy as np
import pytest

from hisa_jax.kernels_pallas.operands import KeptBlocks, Operands
from hisa_jax.kernels_pallas.pages import Pages
from hisa_jax.kernels_pallas.sort_key import INVISIBLE
from hisa_jax.kernels_pallas.triton.pool import pool
from hisa_jax.kernels_pallas.triton.refine import Config, refine_scores
from tests.gpu import draw, reference

E4M3, BF16 = jnp.float8_e4m3fn, jnp.bfloat16


def test_a_mean_is_over_the_tokens_present_whatever_the_others_hold():
    """A partly filled block is always kept, so no selection depends on its mean."""
    size, counts = 16, np.array([16, 1, 0, 15, 8], np.int32)
    k = np.random.default_rng(0).integers(-8, 9, (len(counts) * size, 64)).astype(np.float32)
    is_there = (np.arange(size) < counts[:, None]).reshape(-1, 1)
    spoilt = jnp.asarray(np.where(is_there, k, np.nan), BF16)
    means, _ = pool(spoilt, None, jnp.asarray(counts), block_size=size, interpret=True)
    wanted = np.where(is_there, k, 0).reshape(-1, size, 64).sum(1) / np.maximum(counts, 1)[:, None]
    np.testing.assert_array_equal(means[:, 0], wanted.astype(BF16))


@pytest.mark.parametrize("page_size", [None, 64])
def test_refinement_scores_every_key_of_a_block_whatever_the_tile(page_size):
    """Two tiles a block and two tiles a page."""
    block_size, S, T = 128, 512, 2
    q, k, scale, w = (x[0] for x in draw.integers(1, 1, T, S, 16, 64, E4M3, True))
    blocks, visible = np.array([[0, 2, 3], [1, -1, -1]], np.int32), np.array([500, 256], np.int32)
    order, pages = np.arange(S), None
    if page_size:
        table = np.random.default_rng(2).permutation(S // page_size).astype(np.int32)
        pages = Pages(table=jnp.asarray(table), size=page_size, n_pages=len(table))
        order = np.argsort((table[:, None] * page_size + np.arange(page_size)).reshape(-1))
    operands, first = Operands(q, w, k[order], scale[order], pages), jnp.zeros(T, jnp.int32)
    kept = KeptBlocks(ids=jnp.asarray(blocks), visible=jnp.asarray(visible), first=first, size=block_size)
    got = np.asarray(refine_scores(operands, kept, config=Config(tile_s=32), interpret=True))
    scores = reference.token_scores(q, k, scale, w)
    for t in range(T):
        positions = (blocks[t][:, None] * block_size + np.arange(block_size)).reshape(-1)
        seen = (positions >= 0) & (positions < visible[t])
        assert (got[t][~seen] == INVISIBLE).all()
        sort_keys = np.where(got[t] < 0, got[t] ^ (2**31 - 1), got[t]).view(np.float32)
        np.testing.assert_array_equal(sort_keys[seen], scores[t][positions[seen]])
