"""Heads as kernels are given them score what they did before. 1 s."""

import jax.numpy as jnp
import numpy as np
import pytest

import hisa_jax as hj
from hisa_jax import kernel_heads
from hisa_jax.layout import Call, Keys
from hisa_jax.xla import stages
from tests import draw


@pytest.mark.parametrize(
    ("H", "method", "wanted"),
    [(1, hj.Dsa(), 16), (4, hj.Dsa(activation=None), 16), (16, hj.Hisa(activation=None), 32), (12, hj.Dsa(), 12)],
)
def test_heads_for_kernels_have_the_scores_of_the_callers(H, method, wanted):
    q, k, w = draw.inputs(1, 1, 9, H, 32, dtype="bfloat16")
    k[0, 3], k[0, 4, 5], k[0, 5, 5] = np.nan, np.inf, -np.inf
    call = Call(q=jnp.asarray(q), w=jnp.asarray(w), visible=jnp.full((1, 1), 9), k=Keys(jnp.asarray(k), None))
    heads, same = kernel_heads.as_kernels_take(call, method)
    assert heads.q.shape[2] == wanted == kernel_heads.n_heads(H, method) and same.activation == "relu"
    keys = Keys(call.k.values[0], None)
    before = stages.scores(call.q[0, 0], keys, call.w[0, 0], method.activation)
    after = stages.scores(heads.q[0, 0], keys, heads.w[0, 0], same.activation)
    np.testing.assert_allclose(after, before, rtol=1e-5, atol=1e-5)


def test_a_scan_of_repeated_heads_has_as_many_more_exact_ones():
    assert kernel_heads.of_heads(4, hj.Scan(exact_heads=3)).exact_heads == 12
    assert kernel_heads.of_heads(16, hj.Scan(exact_heads=3)).exact_heads == 3
    assert kernel_heads.is_flat(hj.Scan(), 4) and not kernel_heads.is_flat(hj.Scan(sketch="int4"), 4)
