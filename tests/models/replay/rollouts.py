"""Rollouts of a tiny model, and records that are made by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hisa_jax import models
from tests.models import serving

PROMPTS = tuple(map(tuple, serving.requests(3, seed=1)))  # of 21, 15 and 35 tokens, where queries select 8


@functools.cache
def rollout(kinds=("dense", "sparse"), **options):
    """By HISA; of layers of these kinds."""
    model = serving.model(kinds=kinds)
    made = models.generate(
        model, PROMPTS, serving.N_NEW, chunk=serving.CHUNK, stop_ids=(), return_selections=True, **options
    )
    return made.rollout


@functools.cache
def trainer():
    """The same weights, whose own indexer is the flat one: it selects otherwise wherever there is a choice."""
    return serving.model().with_method(None)


@functools.cache
def program(**options):
    """`training_forward` compiled, of a state and a record."""
    graph = nnx.graphdef(trainer())
    return jax.jit(lambda state, r: models.training_forward(nnx.merge(graph, state), r.tokens, selections=r, **options))


def run(r, **options):
    return program(**options)(nnx.state(trainer()), r)


def assert_same(a, b):
    """Every number of two records; log-probabilities up to rounding, since batches of other sizes have made them."""
    assert (a.topk, a.start) == (b.topk, b.start)
    for one, other in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert one.shape == other.shape and one.dtype == other.dtype
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5 if one.dtype == np.float32 else 0)


def by_hand(T=6, K=3, **changes):
    """A record of one sequence of T + 1 tokens for the tiny model: each query selects the last tokens it sees."""
    at = np.arange(T, dtype=np.int32)
    indices = np.maximum(at[:, None] - K + 1, 0) + np.arange(K, dtype=np.int32)
    indices = np.where(indices <= at[:, None], indices, -1).astype(np.int32)[None]
    arrays = dict(
        tokens=at[None] + 1, targets=at[None] + 2, logprobs=np.zeros((1, T), np.float32), is_made=at[None] >= T - 2,
        sequence=np.zeros((1, T), np.int32), cu_seqlens=np.array([[0, T]], np.int32), indices=(indices, indices.copy()),
        experts=(np.tile(np.array([0, 2], np.int32), (1, T, 1)),), topk=(K, K),
    )  # fmt: skip
    return models.Rollout(**arrays | changes)


def changed(array, at, value):
    """A copy with another number."""
    array = np.array(array)
    array[at] = value
    return array


def loss(out, r):
    """Of log-probabilities and indexers, over what the rollout made."""
    return -jnp.sum(out.logprobs * r.is_made) + jnp.sum(out.kl)
