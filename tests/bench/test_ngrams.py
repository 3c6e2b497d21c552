"""Queries, keys and weights made from text, and the task's right answers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hisa_jax as hj
from bench.quality import ngrams

PASSAGE = [f" p{i}" for i in range(20)]


def words(count: int, seed: int = 0) -> list[str]:
    return [f" w{i}" for i in np.random.default_rng(seed).integers(500, size=count)]


@pytest.fixture(scope="module")
def repeated() -> ngrams.Ngrams:
    """A passage at 300 .. 319 that comes again at the end, among random words."""
    return ngrams.Ngrams(words(300) + PASSAGE + words(1660, 1) + PASSAGE)


def test_inputs_have_the_shape_of_the_real_indexer(repeated):
    q, k, w = repeated.inputs(1000, np.array([5, 999]))
    assert (q.shape, k.shape, w.shape) == ((1, 2, 64, 128), (1, 1000, 128), (1, 2, 64))
    assert (q.dtype, k.dtype, w.dtype) == (jnp.bfloat16, jnp.bfloat16, np.float32)


def test_queries_and_keys_have_norm_1_and_some_weights_are_negative(repeated):
    q, k, w = (np.asarray(array, np.float32) for array in repeated.inputs(1000, np.array([5, 999])))
    np.testing.assert_allclose(np.linalg.norm(q, axis=-1), 1, atol=0.01)
    np.testing.assert_allclose(np.linalg.norm(k, axis=-1), 1, atol=0.01)
    assert 0 < np.mean(w < 0) < 0.2


def test_equal_text_and_seed_give_equal_inputs_and_another_seed_gives_others():
    tokens, positions = words(400), np.array([100, 399])
    first, again, other = (ngrams.Ngrams(tokens, seed).inputs(400, positions) for seed in (0, 0, 1))
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert np.mean(first.k != other.k) > 0.9


def test_hashes_are_the_same_in_every_process():
    assert hex(ngrams.Ngrams(["a", "b"]).hashes[2][1]) == "0x6feb66ca806d6f45"


def test_a_key_depends_on_the_tokens_before_it_alone():
    tokens = words(600)
    whole = ngrams.Ngrams(tokens).inputs(600, np.array([0])).k
    cut = ngrams.Ngrams(tokens[:500]).inputs(500, np.array([0])).k
    np.testing.assert_array_equal(whole[:, :500], cut)


def test_tiles_of_keys_leave_no_seam(repeated, monkeypatch):
    whole = repeated.inputs(2000, np.array([0])).k
    monkeypatch.setattr(ngrams, "_TILE", 64)
    np.testing.assert_array_equal(repeated.inputs(2000, np.array([0])).k, whole)


def test_the_right_answer_is_the_earlier_place_of_the_longest_ngram(repeated):
    task = ngrams.task(repeated, 2000, 9, recent=100)
    # Only the last 9 tokens of the passage end a 12-gram of it.
    np.testing.assert_array_equal(task.positions, np.arange(1991, 2000))
    np.testing.assert_array_equal(np.concatenate(task.places), np.arange(311, 320))
    assert task.orders == [12] * 9


def test_recent_places_are_no_answers(repeated):
    task = ngrams.task(repeated, 2000, 9, recent=1681)
    assert all(len(places) == 0 for places, t in zip(task.places, task.positions, strict=True) if t > 1990)


@pytest.mark.parametrize("context", [1, 2, 13])
def test_short_contexts_have_as_many_queries_as_tokens(repeated, context):
    np.testing.assert_array_equal(ngrams.task(repeated, context, 64, 0).positions, np.arange(context))


def test_repeated_passages_are_found_by_the_flat_indexer(repeated):
    task = ngrams.task(repeated, 2000, 9, recent=100)
    q, k, w = map(jnp.asarray, repeated.inputs(2000, task.positions))
    selection = hj.select(q, k, w, hj.Dsa(topk=64), query_positions=jnp.asarray(task.positions, jnp.int32)[None])
    for places, selected in zip(task.places, np.asarray(selection.indices[0]), strict=True):
        assert set(places.tolist()) <= set(selected.tolist())
