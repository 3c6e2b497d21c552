"""The oracle's attention to the selected tokens."""

import math

import numpy as np

from tests import oracle


def test_sparse_mla_by_hand():
    # one head, Dk = 2, value_dim = 1, scale 1: logits ln 1, ln 3 -> p = 1/4, 3/4, out = 4/4 + 8 * 3/4 = 7, lse = ln 4.
    # With a sink of ln 4 the denominator is 8: out = 3.5, lse as before.
    q, kv = np.array([[[[0.0, 1.0]]]]), np.array([[[4, 0], [99, 99], [8, math.log(3)]]])
    for indices in ([[[0, 2, -1]]], [[[0, 2, 3]]], [[[-7, 0, 2]]]):
        out, lse = oracle.sparse_mla(q, kv, indices, 1, 1.0)
        np.testing.assert_allclose([out.item(), lse.item()], [7, math.log(4)])
    out, lse = oracle.sparse_mla(q, kv, [[[0, 2]]], 1, 1.0, sink=np.array([math.log(4)]))
    np.testing.assert_allclose([out.item(), lse.item()], [3.5, math.log(4)])


def test_sparse_mla_of_nothing_is_zero():
    q, kv = np.ones((1, 2, 3, 4)), np.ones((1, 5, 4))
    out, lse = oracle.sparse_mla(q, kv, np.full((1, 2, 3), -1), 2, 1.0, sink=np.zeros(3))
    assert out.shape == (1, 2, 3, 2) and (out == 0).all() and (lse == -np.inf).all()


def test_sparse_mla_of_everything_is_dense_attention_and_large_logits_do_not_overflow():
    rng = np.random.default_rng(1)
    q, kv = 30 * rng.normal(size=(2, 3, 4, 6)), 30 * rng.normal(size=(2, 7, 6))
    out, lse = oracle.sparse_mla(q, kv, np.broadcast_to(rng.permutation(7), (2, 3, 7)), 5, 0.5)
    logits = 0.5 * np.einsum("btnd,bsd->btns", q, kv)
    p = np.exp(logits - logits.max(-1, keepdims=True))
    np.testing.assert_allclose(out, np.einsum("btns,bsd->btnd", p / p.sum(-1, keepdims=True), kv[..., :5]), atol=1e-10)
    np.testing.assert_allclose(lse, np.log(p.sum(-1)) + logits.max(-1))
