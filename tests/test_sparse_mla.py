"""Sparse MLA against the oracle, forward and backward."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized

import hisa_jax as hj
from tests import draw, oracle


def inputs(B, T, S, N, K, latent=32, rope=16, dtype="float32", seed=0):
    """Queries, latents, and lists of unlike lengths: a full one, an empty one, some with holes."""
    rng = np.random.default_rng(seed)
    q, kv = (draw.cast(rng.normal(size=shape), dtype) for shape in ((B, T, N, latent + rope), (B, S, latent + rope)))
    indices = np.stack([[rng.permutation(S)[:K] for _ in range(T)] for _ in range(B)]).astype(np.int32)
    indices[rng.random(indices.shape) < 0.3] = -1
    indices[0, 0] = np.arange(K)
    indices[0, -1] = -1
    return q, kv, indices


def dense(q, kv, indices, scale, value_dim, sink=None):
    """The same in plain differentiable JAX, for the gradients."""
    is_real = indices >= 0
    selected = jax.vmap(lambda kv, at: kv[at])(kv, jnp.maximum(indices, 0))
    logits = jnp.einsum("btnd,btkd->btnk", q, selected, precision="highest") * scale
    logits = jnp.where(is_real[:, :, None, :], logits, -1e30)
    lse = jax.nn.logsumexp(logits, axis=-1)
    total = lse if sink is None else jnp.logaddexp(lse, jnp.broadcast_to(sink, lse.shape))
    p = jnp.where(jnp.any(is_real, -1)[:, :, None, None], jnp.exp(logits - total[..., None]), 0)
    return jnp.einsum("btnk,btkv->btnv", p, selected[..., :value_dim], precision="highest"), lse


class SparseMlaTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.named_parameters(
        ("one_token", 1, 1, 1, 1, 1),
        ("odd_sizes", 2, 5, 37, 3, 7),
        ("many_heads", 1, 3, 50, 128, 20),
        ("several_tiles", 1, 70, 300, 64, 256),  # a tile holds 512 queries x heads x tokens / 16384
    )
    def test_output_and_logsumexp_are_the_oracles(self, B, T, S, N, K):
        q, kv, indices = inputs(B, T, S, N, K)
        attend = self.variant(functools.partial(hj.sparse_mla, scale=0.15, value_dim=32, return_lse=True))
        out, lse = attend(*map(jnp.asarray, (q, kv, indices)))
        wanted, wanted_lse = oracle.sparse_mla(q, kv, indices, 32, 0.15)
        np.testing.assert_allclose(out, wanted, rtol=2e-5, atol=2e-5)
        np.testing.assert_allclose(lse, wanted_lse, rtol=2e-5, atol=2e-5)

    def test_the_real_sizes_are_the_defaults(self):
        q, kv, indices = inputs(1, 2, 300, 128, 64, latent=512, rope=64)
        out = hj.sparse_mla(*map(jnp.asarray, (q, kv, indices)), scale=576**-0.5)
        chex.assert_shape(out, (1, 2, 128, 512))
        np.testing.assert_allclose(out, oracle.sparse_mla(q, kv, indices, 512, 576**-0.5)[0], rtol=1e-4, atol=1e-4)

    def test_bfloat16_stays_within_its_rounding(self):
        q, kv, indices = inputs(2, 5, 100, 16, 40, dtype="bfloat16")
        out = hj.sparse_mla(*map(jnp.asarray, (q, kv, indices)), scale=0.15, value_dim=32)
        chex.assert_type(out, jnp.bfloat16)
        wanted = oracle.sparse_mla(q, kv, indices, 32, 0.15)[0]
        np.testing.assert_allclose(np.asarray(out, np.float32), wanted, rtol=2e-2, atol=1e-2)

    def test_rows_that_select_nothing_give_zeros(self):
        q, kv, indices = inputs(2, 5, 37, 3, 7)
        out, lse = hj.sparse_mla(*map(jnp.asarray, (q, kv, indices)), scale=0.1, value_dim=32, return_lse=True)
        self.assertTrue(np.all(np.asarray(out[0, -1]) == 0) and np.all(np.isneginf(np.asarray(lse[0, -1]))))

    def test_a_sink_takes_its_share_and_gives_no_value(self):
        q, kv, indices = inputs(2, 5, 37, 3, 7)
        sink = np.array([-1.0, 0.5, 30.0], np.float32)
        attend = functools.partial(hj.sparse_mla, *map(jnp.asarray, (q, kv, indices)), scale=0.1, value_dim=32)
        out, lse = attend(sink=jnp.asarray(sink), return_lse=True)
        wanted, _ = oracle.sparse_mla(q, kv, indices, 32, 0.1, sink)
        np.testing.assert_allclose(out, wanted, rtol=2e-5, atol=2e-5)
        np.testing.assert_array_equal(lse, attend(return_lse=True)[1])  # without the sink, to merge partial results

    def test_a_sink_of_minus_infinity_is_none(self):
        q, kv, indices = map(jnp.asarray, inputs(2, 5, 37, 3, 7))  # one list is empty

        def attend(q, sink):
            return hj.sparse_mla(q, kv, indices, scale=0.1, value_dim=32, sink=sink)

        none = jnp.full((3,), -jnp.inf)
        np.testing.assert_array_equal(attend(q, none), attend(q, None))
        gradients = jax.grad(lambda q, sink: jnp.sum(attend(q, sink)), (0, 1))(q, none)
        self.assertTrue(all(np.isfinite(x).all() for x in gradients))

    def test_partial_results_merge_by_their_logsumexp(self):
        q, kv, indices = inputs(1, 4, 60, 3, 20)
        attend = functools.partial(hj.sparse_mla, jnp.asarray(q), jnp.asarray(kv), scale=0.1, value_dim=32)
        whole = attend(jnp.asarray(indices))
        parts = [attend(jnp.asarray(half), return_lse=True) for half in (indices[..., :8], indices[..., 8:])]
        total = jnp.logaddexp(parts[0][1], parts[1][1])
        weights = [jnp.nan_to_num(jnp.exp(lse - total))[..., None] for _, lse in parts]
        merged = sum(out * weight for (out, _), weight in zip(parts, weights, strict=True))
        np.testing.assert_allclose(merged, whole, rtol=1e-5, atol=1e-5)

    def test_indices_outside_and_tokens_not_selected_leave_no_trace(self):
        q, kv, indices = inputs(1, 3, 20, 2, 6)
        indices[0, 1] = [3, 20, -5, 1000, 7, np.iinfo(np.int32).min]
        wanted = hj.sparse_mla(*map(jnp.asarray, (q, kv, indices)), scale=0.1, value_dim=32)
        np.testing.assert_allclose(wanted, oracle.sparse_mla(q, kv, indices, 32, 0.1)[0], rtol=2e-5, atol=2e-5)
        kv[0, np.setdiff1d(np.arange(20), indices[0])] = np.nan
        got = hj.sparse_mla(*map(jnp.asarray, (q, kv, indices)), scale=0.1, value_dim=32)
        np.testing.assert_array_equal(got, wanted)

    @parameterized.parameters((0, 3, 20, 4), (2, 0, 20, 4), (2, 3, 0, 4), (2, 3, 20, 0))
    def test_empty_axes_give_zeros(self, B, T, S, K):
        out, lse = hj.sparse_mla(
            jnp.ones((B, T, 4, 24)),
            jnp.ones((B, S, 24)),
            jnp.zeros((B, T, K), jnp.int32),
            scale=0.1,
            value_dim=16,
            return_lse=True,
        )
        chex.assert_shape(out, (B, T, 4, 16))
        self.assertTrue(np.all(np.asarray(out) == 0) and np.all(np.isneginf(np.asarray(lse))))

    @parameterized.product(with_sink=[False, True], T=[3, 70])
    def test_gradients_are_those_of_the_dense_form(self, with_sink, T):
        q, kv, indices = map(jnp.asarray, inputs(2, T, 90, 16, 64))
        sink = jnp.linspace(-1, 1, 16) if with_sink else None
        cotangent = jnp.asarray(np.random.default_rng(1).normal(size=(2, T, 16, 32)).astype(np.float32))

        def loss(attend, q, kv, sink):
            out, lse = attend(q, kv, sink)
            return jnp.sum(out * cotangent) + 0.1 * jnp.sum(jnp.where(lse > -1e20, lse, 0))

        def sparse(q, kv, sink):
            return hj.sparse_mla(q, kv, indices, scale=0.15, value_dim=32, sink=sink, return_lse=True)

        def reference(q, kv, sink):
            return dense(q, kv, indices, 0.15, 32, sink)

        arguments = (0, 1, 2) if with_sink else (0, 1)
        with jax.numpy_rank_promotion("allow"):
            got = jax.jit(jax.grad(functools.partial(loss, sparse), arguments))(q, kv, sink)
            wanted = jax.jit(jax.grad(functools.partial(loss, reference), arguments))(q, kv, sink)
        chex.assert_trees_all_close(got, wanted, rtol=2e-4, atol=2e-4)

    def test_memory_of_both_passes_is_that_of_a_tile(self):
        # The issue's size: dense logits alone would be 4096 * 128 * 2048 floats, 4 GiB.
        shapes = ((1, 4096, 128, 576), jnp.bfloat16), ((1, 8192, 576), jnp.bfloat16), ((1, 4096, 2048), jnp.int32)
        arrays = [jax.ShapeDtypeStruct(*shape) for shape in shapes]

        def loss(q, kv, indices):
            return jnp.sum(hj.sparse_mla(q, kv, indices, scale=0.1).astype(jnp.float32))

        def temporary_bytes(function):
            return jax.jit(function).lower(*arrays).compile().memory_analysis().temp_size_in_bytes

        out_bytes, q_bytes = 4096 * 128 * 512 * 2, 4096 * 128 * 576 * 2
        self.assertLess(temporary_bytes(loss), 3 * out_bytes + (256 << 20))
        self.assertLess(temporary_bytes(jax.grad(loss, (0, 1))), 4 * (out_bytes + q_bytes) + (512 << 20))


@pytest.mark.slow
def test_the_issue_size_runs():
    """64 of 4096 queries of the real size, end to end, on a CPU."""
    q = jnp.ones((1, 64, 128, 576), jnp.bfloat16)
    kv = jnp.ones((1, 8192, 576), jnp.bfloat16)
    indices = jnp.broadcast_to(jnp.arange(2048, dtype=jnp.int32) * 4, (1, 64, 2048))
    out = hj.sparse_mla(q, kv, indices, scale=0.04)
    assert jnp.allclose(out.astype(jnp.float32), 1.0)
