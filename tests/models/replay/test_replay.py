"""A training forward pass runs exactly what a rollout selected, and the experts it took.

On tiny models, with every form of record. In the gate is what test_docs.py has of it.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import hisa_jax as hj
from hisa_jax import models
from tests.models import golden, serving

from . import rollouts


def off(logprobs, r):
    """The largest difference of log-probabilities that the rollout made."""
    return np.abs(np.asarray(logprobs) - r.logprobs)[np.asarray(r.is_made)].max()


@pytest.mark.exhaustive
def test_logprobs_are_the_rollouts_with_replay_and_not_without():
    """The trainer selects by another indexer. What it would have chosen is told, and how far that is."""
    r = rollouts.rollout()
    r.check(rollouts.trainer().config)
    assert int(r.is_made.sum()) == 3 * serving.N_NEW and (r.logprobs[r.is_made] < 0).all()
    out = rollouts.run(r, compare=True)
    assert off(out.logprobs, r) < 2e-5
    report = models.replay_report(r, out)
    assert report.logprob_change == off(out.logprobs, r) and report.n_made == 3 * serving.N_NEW
    # Queries that see 8 tokens or fewer have no choice.
    n = sum(len(prompt) + serving.N_NEW - 1 for prompt in rollouts.PROMPTS)
    assert report.n_queries == n and report.experts == (1.0,) and len(report.selections) == 2
    for all_, with_choice in zip(report.selections, report.choices, strict=True):
        assert 0 < with_choice < all_ < 1 and abs((1 - all_) * n - (1 - with_choice) * (n - 3 * 8)) < 1e-3
    graph, state = nnx.split(rollouts.trainer())
    without = jax.jit(lambda s, t, to: models.training_forward(nnx.merge(graph, s), t, targets=to))
    # Padding is on the right, where no query sees it.
    assert off(without(state, r.tokens, r.targets).logprobs, r) > 1


@pytest.mark.exhaustive
def test_without_replay_it_is_the_model():
    """On whole rows, and on packed ones each sequence as if alone."""
    model, r = serving.model(), rollouts.rollout()
    logits = models.training_forward(model, r.tokens, cu_seqlens=r.cu_seqlens).logits
    is_real = r.sequence >= 0
    np.testing.assert_allclose(logits[is_real], model(r.tokens, mask=is_real)[is_real], atol=2e-4)
    packed = models.pack_rollouts([r], length=100)
    other = models.training_forward(model, packed.tokens, cu_seqlens=packed.cu_seqlens).logits
    np.testing.assert_allclose(other[packed.sequence == 2], logits[2][is_real[2]], atol=2e-4)


@pytest.mark.exhaustive
@pytest.mark.parametrize("how", ["packed", "from_topk", "from_there_packed", "remat", "eager"])
def test_losses_and_gradients_are_the_same(how):
    graph, state = nnx.split(rollouts.trainer())

    def losses(state, r, **options):
        out = models.training_forward(nnx.merge(graph, state), r.tokens, selections=r, **options)
        return rollouts.loss(out, r)

    r = rollouts.rollout()
    wanted, gradient = jax.jit(jax.value_and_grad(losses))(state, r)
    options = {}
    if "from" in how:
        r = rollouts.rollout(selections_from=8)
        assert r.skipped == 8 and r.start == 8
    if "packed" in how:
        r = models.pack_rollouts([r], length=70, rows=3, sequences=3)
        assert r.skipped == 0 and r.cu_seqlens.tolist() == [[0, 28, 50, 50], [0, 42, 42, 42], [0, 0, 0, 0]]
    if how == "remat":
        options = dict(remat=True)
    run = jax.value_and_grad(lambda state, r: losses(state, r, **options))
    loss, got = (run if how == "eager" else jax.jit(run))(state, r)
    np.testing.assert_allclose(loss, wanted, rtol=1e-5)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-3), got, gradient)


@pytest.mark.exhaustive
def test_gradients_are_those_of_attention_with_a_mask():
    """The model's expanded form, which JAX differentiates by itself; the indexers take no part in it."""
    model, r = serving.model(), rollouts.rollout()
    graph, state = nnx.split(model)
    mask = jnp.asarray(r.is_made)

    def by_mask(state):
        logits = nnx.merge(graph, state).run(r.tokens, mask=r.sequence >= 0, form="expanded").logits
        return jnp.sum(
            jnp.where(mask, jnp.take_along_axis(jax.nn.log_softmax(logits), r.targets[..., None], 2)[..., 0], 0)
        )

    def by_replay(state):
        out = models.training_forward(nnx.merge(graph, state), r.tokens, selections=r)
        return jnp.sum(jnp.where(mask, out.logprobs, 0))

    for (path, got), (_, want) in zip(
        *(nnx.to_flat_state(jax.jit(jax.grad(f))(state)) for f in (by_replay, by_mask)), strict=True
    ):
        scale = float(jnp.abs(want[...]).max())
        assert ("indexer" in path or "router_bias" in path) == (scale == 0), path
        np.testing.assert_allclose(got[...], want[...], atol=1e-4 * scale, err_msg=str(path))


@pytest.mark.exhaustive
def test_the_indexers_learn_from_the_tokens_of_the_rollout_and_nothing_else_does_from_them():
    """A list of one token leaves nothing to learn; and the KL's gradient reaches indexers alone."""
    graph, state = nnx.split(rollouts.trainer())

    def kl(state, r):
        return jnp.sum(models.training_forward(nnx.merge(graph, state), r.tokens, selections=r).kl)

    r = rollouts.rollout()
    value, gradient = jax.jit(jax.value_and_grad(kl))(state, r)
    assert value > 0.1
    for path, x in nnx.to_flat_state(gradient):
        assert bool(jnp.any(x[...])) == ("indexer" in path), path
    own = [np.where(np.arange(x.shape[2]) == 0, x, -1) for x in r.indices]
    alone = models.Rollout(**{**vars(r), "indices": tuple(own)})
    value, gradient = jax.jit(jax.value_and_grad(kl))(state, alone)
    assert abs(value) < 1e-4 and all(jnp.abs(x[...]).max() < 1e-5 for _, x in nnx.to_flat_state(gradient))


@pytest.mark.exhaustive
@pytest.mark.parametrize("seed", range(3))
def test_experts_of_the_rollout_are_taken_and_the_routers_weights_of_these_learn(seed):
    r, rng = rollouts.rollout(), np.random.default_rng(seed)
    experts = np.argsort(rng.random((*r.tokens.shape, 4)), axis=-1)[..., :2].astype(np.int32)
    other = models.Rollout(**{**vars(r), "experts": (experts,)})
    graph, state = nnx.split(rollouts.trainer())

    def logprobs(state, r):
        return models.training_forward(nnx.merge(graph, state), r.tokens, selections=r).logprobs

    def total(state, r):
        return jnp.sum(logprobs(state, r) * r.is_made)

    assert off(logprobs(state, other), r) > 0.1
    gradient = jax.jit(jax.grad(total))(state, other)
    assert jnp.any(gradient["layers"][1]["mlp"]["router"][...])
    # An expert that no token took learns nothing.
    one = models.Rollout(**{**vars(r), "experts": (np.tile(np.array([1, 3], np.int32), (*r.tokens.shape, 1)),)})
    up = jax.jit(jax.grad(total))(state, one)["layers"][1]["mlp"]["up"][...]
    assert [bool(jnp.any(x)) for x in up] == [False, True, False, True]


@pytest.mark.exhaustive
def test_layers_that_share_a_selection_have_it_once():
    model = golden.model("glm52").with_method(hj.Hisa(topk=8, block_size=4, block_topk=2))
    prompts = golden.ids("glm52")[:, :30].tolist()
    r = models.generate(model, prompts, 4, chunk=16, return_selections=True, stop_ids=()).rollout
    kinds = model.config.indexer_kinds
    assert len(r.indices) == kinds.count("full") < len(kinds) and len(r.experts) == model.config.layer_kinds.count(
        "sparse"
    )
    trainer = model.with_method(None)
    out = models.training_forward(trainer, r.tokens, selections=r, compare=True)
    assert off(out.logprobs, r) < 1e-4 and out.kl.shape == (len(r.indices), *r.tokens.shape)
    assert off(models.training_forward(trainer, r.tokens, targets=r.targets).logprobs, r) > 1e-3


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    "changes", [dict(index_key_dtype="int8"), dict(index_key_dtype="float8_e4m3fn", index_hadamard=True)]
)
def test_a_rollout_by_8_bit_index_keys_is_replayed_by_keys_that_are_not_quantised(changes):
    served = golden.with_config("dsv32", **changes)
    r = models.generate(served, [golden.ids("dsv32")[0].tolist()], 4, chunk=8, return_selections=True).rollout
    for model in (golden.model("dsv32"), served):
        graph, state = nnx.split(model)

        def run(state, graph=graph):
            out = models.training_forward(nnx.merge(graph, state), r.tokens, selections=r, compare=True)
            return jnp.sum(out.kl), out

        (_, out), gradient = jax.jit(jax.value_and_grad(run, has_aux=True))(state)
        assert off(out.logprobs, r) < 1e-4
        assert jnp.any(gradient["layers"][0]["attention"]["indexer"]["k"][...])
        report = models.replay_report(r, out)
        assert (report.selection_share == 1) == (model is served) and report.selection_share > 0.8


@pytest.mark.exhaustive
def test_in_bfloat16_logprobs_are_the_rollouts_up_to_its_rounding():
    state = jax.tree.map(lambda x: x.astype(jnp.bfloat16) if x.dtype == jnp.float32 else x, nnx.state(serving.model()))
    config = serving.model().config
    model = models.from_config(config, rngs=nnx.Rngs(3), method=serving.HISA, dtype=jnp.bfloat16)
    nnx.update(model, jax.tree.map(lambda x, y: x.astype(y.dtype), state, nnx.state(model)))
    r = models.generate(model, rollouts.PROMPTS, 8, chunk=6, stop_ids=(), return_selections=True).rollout
    trainer = model.with_method(None)
    with_ = off(models.training_forward(trainer, r.tokens, selections=r).logprobs, r)
    without = off(models.training_forward(trainer, r.tokens, targets=r.targets).logprobs, r)
    assert with_ < 0.5 < without


@pytest.mark.exhaustive
def test_what_a_query_did_not_select_leaves_no_trace():
    """A NaN in a token's embedding reaches those that selected it, or selected whom it reached, and no other."""
    r = rollouts.by_hand(T=12, K=2)
    for indices in r.indices:
        indices[0, 6:] = np.array([4, 5], np.int32)  # not tokens 0 .. 3, nor the own one
    model = rollouts.trainer()
    graph, state = nnx.split(model)
    poisoned = nnx.merge(graph, jax.tree.map(lambda x: x, state))
    poisoned.embed[...] = poisoned.embed[...].at[int(r.tokens[0, 2])].set(jnp.nan)

    def nan_and_others():
        got, clean = (models.training_forward(m, r.tokens, selections=r).logprobs[0] for m in (poisoned, model))
        is_nan = np.isnan(np.asarray(got))
        np.testing.assert_array_equal(got[~is_nan], clean[~is_nan])
        return np.flatnonzero(is_nan).tolist()

    # Token 3 selects token 2, and token 4 token 3: a layer each.
    assert nan_and_others() == [2, 3, 4]
    for indices in r.indices:
        indices[0, 3:] = np.where(indices[0, 3:] == 2, 1, indices[0, 3:])
    assert nan_and_others() == [2]
