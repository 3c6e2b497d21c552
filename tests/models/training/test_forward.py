"""The differentiable pass over whole sequences computes what the model that generates computes."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hisa_jax as hj
from hisa_jax.models.training import forward
from hisa_jax.models.training.attention import causal_attention
from hisa_jax.models.training.batches import held_out_samples
from hisa_jax.models.training.lighthouse import lighthouse
from hisa_jax.models.training.retrieval import answered
from hisa_jax.models.training.weights import Skeleton, weights_of
from tests.models.training import tiny

pytestmark = pytest.mark.slow

FLAT = hj.Dsa(topk=16)


@pytest.fixture(scope="module")
def model():
    skeleton = Skeleton(tiny.CONFIG, "float32")
    return skeleton.model(skeleton.initial(0))


def of_training(stacked, tokens, attend):
    """`forward.forward` as one program: its operations, each compiled by itself, take twice as long."""
    return jax.jit(functools.partial(forward.forward, attend=attend))(stacked, tokens)


def of_the_model(model, tokens):
    return jax.jit(lambda model, tokens: model(tokens))(model, tokens)


@pytest.mark.gate("hisa")  # the flat indexer: the next two tests
@pytest.mark.parametrize(
    "method",
    [FLAT, tiny.HISA, hj.Scan(topk=16, candidates=24, exact_heads=1), hj.BlockSparse(topk=16, block_size=8)],
    ids=["flat", "hisa", "scan", "bs"],
)
def test_sparse_is_the_model_with_that_method(model, method):
    tokens = jax.random.randint(jax.random.key(1), (2, 72), 0, 256)
    stacked = Skeleton(tiny.CONFIG, "float32").stacked(weights_of(model))
    logits, kl = of_training(stacked, tokens, functools.partial(forward.sparse, method=method))
    chex.assert_trees_all_close(logits, of_the_model(model.with_method(method), tokens), atol=1e-4, rtol=1e-4)
    assert kl.shape == (2, 2, 72) and (kl > -1e-5).all()


def test_dense_is_the_model_that_selects_every_token(model):
    tokens = jax.random.randint(jax.random.key(1), (2, 64), 0, 256)
    stacked = Skeleton(tiny.CONFIG, "float32").stacked(weights_of(model))
    logits, _ = of_training(stacked, tokens, forward.dense)
    wanted = of_the_model(model.with_method(hj.Dsa(topk=64)), tokens)
    chex.assert_trees_all_close(logits, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("rope", ["last", pytest.param("before", marks=pytest.mark.exhaustive)])
def test_a_pyramid_of_one_level_is_dense(model, rope):
    """Every entry a token: rotated, scaled and put back as in the model. 2 seconds."""
    tokens = jax.random.randint(jax.random.key(1), (2, 64), 0, 256)
    stacked = Skeleton(tiny.CONFIG, "float32").stacked(weights_of(model))
    method = hj.Lighthouse(levels=1, pool=2, topk=8, tile=8, rope=rope)
    wanted, _ = of_training(stacked, tokens, forward.dense)
    got, extra = of_training(stacked, tokens, functools.partial(lighthouse, method=method))
    assert extra is None
    chex.assert_trees_all_close(got, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.exhaustive
def test_layers_may_attend_differently(model):
    """Dense, then over entries, then over selected tokens: each where it is said. 2 seconds."""
    tokens = jax.random.randint(jax.random.key(1), (1, 64), 0, 256)
    stacked = Skeleton(tiny.CONFIG, "float32").stacked(weights_of(model))
    over_entries = functools.partial(lighthouse, method=tiny.LIGHTHOUSE)
    sparse = functools.partial(forward.sparse, method=hj.Dsa(topk=64))
    logits = {}
    for name, attend in dict(
        dense=forward.dense, dense_twice=[forward.dense] * 2, sparse_last=[forward.dense, sparse],
        entries_last=[forward.dense, over_entries], entries=over_entries,
    ).items():  # fmt: skip
        logits[name], extra = forward.forward(stacked, tokens, attend)
        assert (extra is None) == (name != "sparse_last")
    assert forward.forward(stacked, tokens, [forward.dense, sparse])[1].shape == (1, 1, 64)
    np.testing.assert_array_equal(logits["dense_twice"], logits["dense"])
    chex.assert_trees_all_close(logits["sparse_last"], logits["dense"], atol=1e-4, rtol=1e-4)
    assert not np.allclose(logits["entries_last"], logits["dense"], atol=1e-4)
    assert not np.allclose(logits["entries_last"], logits["entries"], atol=1e-4)
    with pytest.raises(ValueError, match="attend is of 3 layers, wanted the model's 2"):
        forward.forward(stacked, tokens, [forward.dense] * 3)


def test_the_indexer_learns_from_its_own_loss_alone_and_the_model_from_the_text_alone(model):
    skeleton, weights = Skeleton(tiny.CONFIG, "float32"), weights_of(model)
    tokens = jax.random.randint(jax.random.key(1), (1, 48), 0, 256)

    def losses(weights, which):
        attend = functools.partial(forward.sparse, method=FLAT)
        logits, kl = forward.forward(skeleton.stacked(weights), tokens, attend)
        return (jnp.sum(logits**2), jnp.sum(kl))[which]

    of_text, of_indexer = jax.jit(lambda weights: [jax.grad(losses)(weights, which) for which in (0, 1)])(weights)
    for gradients, wanted in (
        (of_text, lambda name: ".indexer." not in name),
        (of_indexer, lambda name: ".indexer." in name),
    ):
        assert {name for name, x in gradients.items() if np.any(x)} == {name for name in weights if wanted(name)}


@pytest.mark.gate(1, 700)  # one token; several tiles, the last of them partial
@pytest.mark.parametrize("T", [1, 511, 700])
def test_attention_in_tiles_is_attention_at_once(T):
    q, k, v = (jax.random.normal(jax.random.key(i), (2, T, 3, 8)) for i in range(3))

    def at_once(q, k, v):
        logits = jnp.einsum("btnd,bsnd->bnts", q, k) * 0.3
        logits = jnp.where(jnp.tril(jnp.ones((T, T), bool)), logits, -jnp.inf)
        return jnp.einsum("bnts,bsnd->btnd", jax.nn.softmax(logits), v)

    def tiled(q, k, v):
        return causal_attention(q, k, v, 0.3)

    chex.assert_trees_all_close(*(jax.jit(f)(q, k, v) for f in (tiled, at_once)), atol=1e-5)
    loss = lambda f: jax.jit(jax.grad(lambda *x: jnp.sum(f(*x) ** 2), argnums=(0, 1, 2)))(q, k, v)  # noqa: E731
    chex.assert_trees_all_close(loss(tiled), loss(at_once), atol=1e-4)


def test_an_answer_is_right_if_each_of_its_bytes_is_the_likeliest():
    (sample,) = held_out_samples(tiny.corpus(), "multikey", 1024, 1, 0, n_keys=4, n_questions=3)
    likeliest = np.append(sample.tokens[1:], 0)
    assert answered(likeliest, sample) == [True, True, True]
    for at in (sample.questions[1].answer, sample.questions[1].stop - 1):
        wrong = likeliest.copy()
        wrong[at - 1] += 1
        assert answered(wrong, sample) == [True, False, True]
    likeliest[[sample.questions[1].answer - 2, sample.questions[1].stop - 1]] += 1  # around the answer
    assert answered(likeliest, sample) == [True, True, True]


def test_layers_of_several_kinds_are_refused():
    from hisa_jax import models

    with pytest.raises(ValueError, match="training wants layers that are alike"):
        Skeleton(models.glm52())
