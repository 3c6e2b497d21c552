"""Choosing in rows that a mask divides, against the oracle on each sequence by itself; 4 s, most of it compiling."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hisa_jax as hj
from hisa_jax.integrations import maxtext, rows
from tests import oracle

B, T, H, D = 2, 48, 4, 16
METHOD = hj.Hisa(topk=6, block_size=4, block_topk=3)
SEGMENTS = np.array([[1] * 18 + [2] * 23 + [0] * 7, [5] * T])


def draw(seed=0):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape).astype(np.float32) for shape in ((B, T, H, D), (B, T, D), (B, T, H))]


@jax.jit
def choose(q, k, w, is_seen, columns):
    return rows.select(q, k, w, rows.seen_of(is_seen, columns), columns, method=METHOD, implementation="auto")


def assert_alone(indices, row, tokens, given):
    """The tokens, in their order, choose among themselves as the oracle says, by their columns."""
    alone = [x[row : row + 1, tokens] for x in given]
    want = oracle.select(*alone, METHOD)
    place = np.full(T + 1, -1, np.int32)
    place[tokens] = np.arange(len(tokens))
    got = place[np.asarray(indices)[row, tokens]]  # -1, no token, stays: it is the last entry's
    oracle.assert_same_selection(got[None], (got >= 0).sum(-1, dtype=np.int32)[None], want, tolerance=1e-5)


def test_sequences_of_a_row_choose_as_each_by_itself_and_what_has_no_token_after_the_others():
    given = draw()
    q, k, w = map(jnp.asarray, given)
    packed = (SEGMENTS[:, :, None] == SEGMENTS[:, None, :]) & np.tril(np.ones((T, T), bool))
    in_order = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
    indices = choose(q, k, w, jnp.asarray(packed), in_order)
    for row, segment in ((0, 1), (0, 2), (0, 0), (1, 5)):
        assert_alone(indices, row, np.flatnonzero(SEGMENTS[row] == segment), given)

    # A cache: a prompt that does not fill its part, then what was decoded, from column 32 on.
    held = (np.arange(T) < np.array([[9], [30]])) | (np.arange(T) >= 32)
    seen = held[:, None, :] & np.tril(np.ones((T, T), bool)) & held[:, :, None]
    columns = jnp.argsort(~jnp.asarray(held), axis=1, stable=True).astype(jnp.int32)
    indices = choose(q, k, w, jnp.asarray(seen), columns)
    for row in range(B):
        assert_alone(indices, row, np.flatnonzero(held[row]), given)
        assert (np.asarray(indices)[row, ~held[row]] == -1).all()


def test_scores_are_the_indexers_however_many_heads_are_scored_at_once():
    given = draw(1)
    want = np.stack([oracle.token_scores(*one) for one in zip(*given, strict=True)])
    q, k, w = map(jnp.asarray, given)
    gradients = []
    for chunk in (1, H):
        score = jax.value_and_grad(lambda q, c=chunk: jnp.sum(rows.scores(q, k, w, c, "highest") * want), argnums=0)
        total, gradient = jax.jit(score)(q)
        np.testing.assert_allclose(total, (want**2).sum(), rtol=1e-5)
        gradients.append(gradient)
    np.testing.assert_allclose(*gradients, atol=1e-3)


def test_a_mask_with_holes_is_an_error_under_checked():
    seen = np.tril(np.ones((1, 8, 8), bool))
    hj.checked(rows.seen_of)(jnp.asarray(seen), None)
    seen[0, 5, 2] = False
    with pytest.raises(jax.experimental.checkify.JaxRuntimeError, match="is_seen has a query with unseen tokens"):
        hj.checked(rows.seen_of)(jnp.asarray(seen), None)


def test_without_maxtext_its_adapter_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "maxtext", None)
    with pytest.raises(ModuleNotFoundError, match="the package maxtext is missing: pip install maxtext"):
        maxtext.install(METHOD)
