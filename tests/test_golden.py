"""Selections of public model code, from tests/golden (see its README), come out of `select` exactly.

The scores there are those of tiny random models: index queries and keys after RoPE, weights without the D^-1/2.
"""

import pathlib

import jax.numpy as jnp
import numpy as np
import pytest

import hisa_jax as hj

GOLDEN = pathlib.Path(__file__).parent / "golden"
# DeepSeek-V4 selects among keys compressed 4 to 1: a query sees those that are complete.
CASES = {"dsv32": (8, 1), "glm5": (8, 1), "glm52": (8, 1), "dsv4": (3, 4)}


def layers(case):
    """(name, q, k, w, index_scores, index_selected, positions) of each layer that has an indexer."""
    inputs, golden = np.load(GOLDEN / case / "indexer.npz"), np.load(GOLDEN / case / "golden.npz")
    _, tokens_a_key = CASES[case]
    for name in sorted({key.split(".")[0] for key in inputs}):
        q, k, w = (jnp.asarray(inputs[f"{name}.{part}"]) for part in "qkw")
        positions = (np.arange(q.shape[1], dtype=np.int32) + 1) // tokens_a_key - 1
        positions = jnp.asarray(np.broadcast_to(positions, q.shape[:2]))
        w = w * q.shape[-1] ** -0.5
        yield name, q, k, w, golden[f"{name}.index_scores"], golden[f"{name}.index_selected"], positions


def as_mask(selection, S):
    """[B, T, topk] indices -> [B, T, S] bool."""
    return (np.asarray(selection.indices)[..., None] == np.arange(S)).any(axis=2)


@pytest.mark.parametrize("case", CASES)
def test_the_flat_indexer_selects_what_public_model_code_selects(case):
    method = hj.Dsa(topk=CASES[case][0])
    for name, q, k, w, scores, selected, positions in layers(case):
        got = hj.select(q, k, w, method, query_positions=positions, return_scores=True)
        np.testing.assert_array_equal(as_mask(got, k.shape[1]), selected, err_msg=name)
        at = np.maximum(np.asarray(got.indices), 0)
        wanted = np.where(np.asarray(got.indices) >= 0, np.take_along_axis(scores, at, axis=2), -np.inf)
        np.testing.assert_allclose(got.scores, wanted, atol=1e-4, err_msg=name)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("block_size", [3, 4, 16])
def test_hisa_with_all_blocks_kept_selects_the_same(case, block_size):
    for name, q, k, w, _, selected, positions in layers(case):
        method = hj.Hisa(topk=CASES[case][0], block_size=block_size, block_topk=-(-k.shape[1] // block_size) + 1)
        got = hj.select(q, k, w, method, query_positions=positions)
        np.testing.assert_array_equal(as_mask(got, k.shape[1]), selected, err_msg=name)


@pytest.mark.parametrize("case", CASES)
def test_hisa_selects_the_best_golden_scores_inside_the_blocks_it_kept(case):
    topk = CASES[case][0]
    for name, q, k, w, scores, _, positions in layers(case):
        method = hj.Hisa(topk=topk, block_size=2, block_topk=max(topk // 2, 2))
        got = hj.select(q, k, w, method, query_positions=positions, return_blocks=True)
        kept = (np.asarray(got.blocks)[..., None] == np.arange(k.shape[1]) // 2).any(axis=2)
        inside = np.where(kept, scores, -np.inf)
        best = np.argsort(-inside, axis=2, kind="stable")[..., :topk]
        wanted = np.zeros_like(kept)
        np.put_along_axis(wanted, best, True, axis=2)
        np.testing.assert_array_equal(as_mask(got, k.shape[1]), wanted & np.isfinite(inside), err_msg=name)
