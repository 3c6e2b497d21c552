"""The indexer's loss against its dense form, which has the whole [T, S] of everything."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import ClosedJaxpr

import hisa_jax as hj
from hisa_jax.xla import query_tiles
from tests import draw

SCALE = 0.3


def inputs(seed, B, T, S, H, D, N, dtype="float32"):
    rng = np.random.default_rng(seed)
    q, k, attention_q, kv = (
        draw.cast(rng.normal(size=shape), dtype) for shape in ((B, T, H, D), (B, S, D), (B, T, N, 24), (B, S, 24))
    )
    w = 0.3 * rng.normal(size=(B, T, H))  # of any sign
    return tuple(map(jnp.asarray, (q, k, w.astype(np.float32), attention_q, kv)))


def some(seed, B, T, S, K):
    """[B, T, K] lists of unlike lengths, an empty one among them."""
    rng = np.random.default_rng(seed)
    indices = np.stack([[rng.permutation(S)[:K] for _ in range(T)] for _ in range(B)]).astype(np.int32)
    indices[rng.random(indices.shape) < 0.3] = -1
    indices[0, 0] = -1
    return jnp.asarray(indices)


def dense(q, k, w, attention_q, kv, is_candidate):
    """[B, T] of what has `is_candidate` [B, T, S], for JAX to differentiate."""
    q, k, attention_q, kv = (x.astype(jnp.float32) for x in (q, k, attention_q, kv))
    masked = lambda x, mask: jnp.where(mask, x, -1e30)  # noqa: E731
    products = jnp.einsum("bthd,bsd->bths", q, k, precision="highest")
    scores = jnp.einsum("bths,bth->bts", jax.nn.relu(products), w, precision="highest")
    logits = SCALE * jnp.einsum("btnd,bsd->btns", attention_q, kv, precision="highest")
    target = jnp.mean(jax.nn.softmax(masked(logits, is_candidate[:, :, None, :]), axis=-1), axis=2)
    target = jax.lax.stop_gradient(jnp.where(is_candidate, target, 0))
    log_p = jax.nn.log_softmax(masked(scores, is_candidate), axis=-1)
    terms = target * (jnp.log(jnp.where(target > 0, target, 1.0)) - jnp.where(target > 0, log_p, 0.0))
    return jnp.where(jnp.any(is_candidate, -1), jnp.sum(terms, -1), 0.0)


def both(operands, indices, is_candidate, seed=0):
    """(loss, gradients) of ours and of the dense form, under one random cotangent."""
    d_loss = jnp.asarray(np.random.default_rng(seed).normal(size=operands[0].shape[:2]), jnp.float32)
    ours = lambda q, k, w: hj.indexer_kl(q, k, w, *operands[3:], scale=SCALE, indices=indices)  # noqa: E731
    for f in (ours, lambda q, k, w: dense(q, k, w, *operands[3:], is_candidate)):
        loss, pull = jax.vjp(jax.jit(f), *operands[:3])
        yield loss, pull(d_loss)


SHAPES = {
    "one": (1, 1, 1, 1, 8, 1),
    "odd": (2, 5, 37, 3, 16, 5),
    "wide": (1, 9, 64, 16, 32, 4),
}


@pytest.mark.gate("one_tile-float32-odd", "tiles_of_few_queries-bfloat16-wide")
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("few", [False, True], ids=["one_tile", "tiles_of_few_queries"])
def test_loss_and_gradients_are_those_of_the_dense_form(shape, dtype, few, monkeypatch):
    B, T, S, *_ = shape
    if few:
        monkeypatch.setattr(query_tiles, "_TILE_BYTES", 1 << 13)
    operands = inputs(1, *shape, dtype)
    causal = np.arange(S) < np.arange(S - T + 1, S + 1)[:, None]
    indices = some(2, B, T, S, min(S, 11))
    listed = np.zeros((B, T, S), bool)
    for b, t in np.ndindex(B, T):
        listed[b, t, indices[b, t][indices[b, t] >= 0]] = True
    tolerance = dict(rtol=2e-4, atol=2e-5) if dtype == "float32" else dict(rtol=2e-2, atol=2e-2)
    for which, is_candidate in ((None, np.broadcast_to(causal, (B, T, S))), (indices, listed)):
        (loss, gradients), (wanted_loss, wanted) = both(operands, which, jnp.asarray(is_candidate))
        np.testing.assert_allclose(loss, wanted_loss, rtol=2e-4, atol=2e-5)
        for got, want in zip(gradients, wanted, strict=True):
            np.testing.assert_allclose(np.asarray(got, np.float32), np.asarray(want, np.float32), **tolerance)


def test_the_attention_is_a_target_and_gets_no_gradient():
    operands = inputs(3, 1, 4, 20, 2, 8, 3)
    loss = lambda attention_q, kv: jnp.sum(hj.indexer_kl(*operands[:3], attention_q, kv, scale=SCALE))  # noqa: E731
    for gradient in jax.grad(loss, argnums=(0, 1))(*operands[3:]):
        np.testing.assert_array_equal(gradient, 0)


def test_a_perfect_indexer_has_no_loss_and_no_gradient():
    """One head of weight 1 that scores as the single attention head does, all products being positive."""
    rng = np.random.default_rng(0)
    q, k = (jnp.asarray(rng.uniform(0.1, 1, shape), jnp.float32) for shape in ((1, 6, 1, 8), (1, 30, 8)))
    loss = lambda q, k: hj.indexer_kl(q, k, jnp.ones((1, 6, 1)), q, k, scale=1.0)  # noqa: E731
    np.testing.assert_allclose(loss(q, k), 0, atol=1e-6)
    for gradient in jax.grad(lambda *x: jnp.sum(loss(*x)), argnums=(0, 1))(q, k):
        np.testing.assert_allclose(gradient, 0, atol=1e-5)


def largest(jaxpr):
    """Elements of the largest array that a program makes."""
    sizes = [0]
    for eqn in jaxpr.eqns:
        sizes += [int(np.prod(x.aval.shape)) for x in eqn.outvars if hasattr(x.aval, "shape")]
        for inner in jax.tree.leaves(eqn.params, is_leaf=lambda x: hasattr(x, "eqns") or isinstance(x, ClosedJaxpr)):
            if isinstance(inner, ClosedJaxpr):
                sizes.append(largest(inner.jaxpr))
            elif hasattr(inner, "eqns"):
                sizes.append(largest(inner))
    return max(sizes)


@pytest.mark.parametrize("K", [None, 2048], ids=["dense_warm_up", "sparse_stage"])
def test_nothing_of_queries_times_keys_is_made(K):
    B, T, S, H, D, N = 1, 8192, 16384, 16, 64, 8
    f32 = jnp.float32
    shapes = [((B, T, H, D), f32), ((B, S, D), f32), ((B, T, H), f32), ((B, T, N, 96), f32), ((B, S, 96), f32)]
    operands = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
    indices = None if K is None else jax.ShapeDtypeStruct((B, T, K), jnp.int32)

    def step(q, k, w, attention_q, kv, indices):
        return jnp.sum(hj.indexer_kl(q, k, w, attention_q, kv, scale=1.0, indices=indices))

    made = largest(jax.make_jaxpr(jax.grad(step, argnums=(0, 1, 2)))(*operands, indices).jaxpr)
    assert made <= 1.1 * max(T * (K or 0), T * H * D) < T * S / 4  # the arguments, padded to whole tiles


@pytest.mark.parametrize("is_dense", [False, True], ids=["sparse", "dense"])
def test_what_no_query_sees_leaves_no_trace_in_loss_or_gradient(is_dense):
    """Tokens that are no candidates; and queries whose loss is not used, with the tokens that they alone see."""
    B, T, S = 2, 6, 40
    q, k, w, attention_q, kv = inputs(3, B, T, S, 4, 16, 3)
    indices = None if is_dense else jnp.where(some(4, B, T, S, 9) < 30, some(4, B, T, S, 9), -1)
    is_used = jnp.arange(T) < T - 2
    seen = np.arange(S) < S - 2 if is_dense else np.zeros((B, S), bool)
    if not is_dense:
        for b in range(B):
            seen[b, [i for i in np.asarray(indices[b, : T - 2]).reshape(-1) if i >= 0]] = True
    seen = jnp.asarray(np.broadcast_to(seen, (B, S)))

    @jax.jit
    def run(filling):
        fill = lambda x, mask: jnp.where(mask.reshape(mask.shape + (1,) * (x.ndim - mask.ndim)), x, filling)  # noqa: E731
        used = jnp.broadcast_to(is_used, (B, T))
        rows, tokens = [fill(x, used) for x in (q, w, attention_q)], [fill(x, seen) for x in (k, kv)]
        loss, pull = jax.vjp(
            lambda q, k, w: hj.indexer_kl(q, k, w, rows[2], tokens[1], scale=SCALE, indices=indices),
            rows[0], tokens[0], rows[1],
        )  # fmt: skip
        return loss[:, : T - 2], pull(jnp.where(used, 1.0, 0.0))

    wanted = run(0.0)
    assert all(np.asarray(x).any() for x in jax.tree.leaves(wanted))
    for poison in (np.nan, np.inf):
        jax.tree.map(np.testing.assert_array_equal, run(poison), wanted)
    spoilt = hj.indexer_kl(q, k.at[:, 0].set(jnp.nan), w, attention_q, kv, scale=SCALE)
    assert jnp.isnan(spoilt).all()


def test_wrong_arguments_are_named():
    q, k, w, attention_q, kv = inputs(0, 1, 4, 20, 2, 8, 3)
    with pytest.raises(ValueError, match=r"indexer_kl: attention_kv is \[1, 19, 24\], wanted \[1, 20, 24\]"):
        hj.indexer_kl(q, k, w, attention_q, kv[:, :19], scale=1.0)
    with pytest.raises(TypeError, match="indexer_kl: indices is float32, wanted int32"):
        hj.indexer_kl(q, k, w, attention_q, kv, scale=1.0, indices=jnp.zeros((1, 4, 3)))
    with pytest.raises(ValueError, match="T = 4 queries but k only S = 3 keys"):
        hj.indexer_kl(q, k[:, :3], w, attention_q, kv[:, :3], scale=1.0)
