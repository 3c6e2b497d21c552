"""Every plausible porting mistake fails a golden check: each is made here, in our code, on purpose.

As the mistakes of tests/mutants they are made in the exhaustive run: 20 s.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

import hisa_jax as hj
from hisa_jax import models
from hisa_jax.models import dsa, modeling, moe, rope
from hisa_jax.models.cache import contiguous

from . import golden

pytestmark = [pytest.mark.slow, pytest.mark.exhaustive]


def failures(case, model):
    """Names of the golden checks that this model fails, as the golden tests make them."""
    numbers, failed = golden.numbers(case), set()
    out = model.run(golden.ids(case), trace=True)

    def check(name, got, want, limit):
        if not np.abs(np.asarray(got, np.float64) - want).max() <= limit:
            failed.add(name)

    check("logits", out.logits, numbers["logits"], golden.LOGITS)
    for i, layer in enumerate(out.layers):
        check("hidden", layer.hidden, numbers[f"L{i}.hidden"], golden.HIDDEN)
        if golden.selects(case, i) and layer.index_inputs is not None:
            want = numbers[f"L{i}.index_scores"]
            got = np.where(np.isfinite(want), golden.token_scores(layer.index_inputs), 0)
            check("scores", got, np.where(np.isfinite(want), want, 0), golden.SCORES)
            selected = golden.as_mask(layer.selection, want.shape[-1])
            check("selection", selected, numbers[f"L{i}.index_selected"], 0)
    return failed


def changed(case, **settings):
    """The model under another config: mistakes that are one setting."""
    return golden.with_config(case, **settings)


def patched(case, monkeypatch, owner, name, function):
    """The model with one of our functions replaced."""
    monkeypatch.setattr(owner, name, function)
    return golden.model(case)


def with_parameter(case, find, change):
    """The model with one parameter of every layer that has it replaced."""
    model = nnx.clone(golden.model(case))
    for layer in model.layers:
        parameter = find(layer)
        if parameter is not None:
            parameter[...] = change(parameter[...])
    return model


@pytest.mark.parametrize("case", golden.CASES)
def test_without_a_mistake_nothing_fails(case):
    assert failures(case, golden.model(case)) == set()


SETTINGS = [
    # Case, setting, its wrong value, checks that must fail.
    ("dsv32", "indexer_rope_interleave", True, {"logits", "scores", "selection"}),
    ("glm5", "indexer_rope_interleave", False, {"logits", "scores", "selection"}),
    ("dsv32", "rope_interleave", False, {"logits", "hidden"}),
    ("glm5", "rope_interleave", False, {"logits", "hidden"}),
    # 1e-6 where the config has 1e-5 and the other way round: the block norms and those of the latents.
    ("glm5", "rms_norm_eps", 1e-6, {"hidden"}),
    ("dsv32", "rms_norm_eps", 1e-5, {"hidden"}),
    ("glm5", "lora_norm_eps", 1e-5, {"hidden"}),
    ("dsv32", "lora_norm_eps", 1e-5, {"hidden"}),
    ("dsv32", "index_norm_eps", 1e-5, {"scores"}),
    ("glm5", "index_norm_eps", 1e-5, {"scores"}),
    ("dsv32", "index_topk", 7, {"logits", "selection"}),
    ("dsv32", "index_topk", 9, {"logits", "selection"}),
    ("glm52", "index_topk", 7, {"logits", "selection"}),
    ("glm52", "index_topk", 9, {"logits", "selection"}),
    ("dsv32", "yarn", None, {"logits", "scores"}),
    ("glm5", "rope_theta", 1e4, {"logits", "scores"}),
    ("dsv32", "n_group", 1, {"logits"}),
    ("dsv32", "topk_group", 3, {"logits"}),
    ("dsv32", "num_experts_per_tok", 2, {"logits"}),
    ("glm5", "norm_topk_prob", False, {"logits"}),
    ("glm5", "routed_scaling_factor", 1.0, {"logits"}),
]


@pytest.mark.parametrize(("case", "name", "value", "fails"), SETTINGS)
def test_a_wrong_setting_fails(case, name, value, fails):
    settings = {name: value} | ({"topk_group": 1} if name == "n_group" else {})
    assert failures(case, changed(case, **settings)) >= fails


def test_no_mscale_in_the_softmax_fails():
    yarn = golden.model("dsv32").config.yarn
    model = changed("dsv32", yarn=dataclasses.replace(yarn, mscale=0.0, mscale_all_dim=0.0, attention_factor=1.0))
    assert failures("dsv32", model) >= {"logits", "hidden"}


def test_mscale_in_rope_where_it_cancels_fails():
    yarn = golden.model("dsv32").config.yarn
    assert failures("dsv32", changed("dsv32", yarn=dataclasses.replace(yarn, attention_factor=1.1386))) >= {"logits"}


def test_an_indexer_in_every_layer_of_a_model_that_shares_fails_to_load():
    with pytest.raises(models.CheckpointError, match=r"layers\.2\.self_attn\.indexer.*missing"):
        changed("glm52", indexer_kinds=("full",) * 7)


def test_sharing_the_first_selection_instead_of_the_last_fails(monkeypatch):
    first, call = [], dsa.Attention.__call__

    def stale(self, x, *, selection, **arguments):
        out = call(self, x, selection=first[0] if self.indexer is None else selection, **arguments)
        first.append(out[2])
        return out

    model = patched("glm52", monkeypatch, dsa.Attention, "__call__", stale)
    assert failures("glm52", model) >= {"logits", "hidden"}


@pytest.mark.parametrize("case", ["dsv32", "glm5"])
def test_a_dropped_bias_of_the_index_keys_fails(case):
    model = with_parameter(case, lambda layer: layer.attention.indexer.k_norm_bias, jnp.zeros_like)
    assert failures(case, model) >= {"scores", "selection", "logits"}


def test_an_rms_norm_of_the_index_keys_fails(monkeypatch):
    model = patched("dsv32", monkeypatch, dsa, "layer_norm", lambda x, s, b, eps: dsa.rms_norm(x, s, eps) + b)
    assert failures("dsv32", model) >= {"scores", "selection", "logits"}


@pytest.mark.parametrize("case", ["dsv32", "glm5"])
def test_no_relu_fails(case, monkeypatch):
    def select(q, w, cache, tables, cu_seqlens_q, lengths, method):
        k = contiguous(cache.keys, tables, lengths)
        (B, S, _), T = k.shape, len(q) // len(tables)
        scores = jnp.einsum("bthd,bsd,bth->bts", q.reshape(B, T, *q.shape[1:]), k, w.reshape(B, T, -1))
        scores = jnp.where(jnp.arange(S) <= jnp.arange(T)[:, None], scores, -jnp.inf)
        best, indices = lax.top_k(scores, method.topk)
        indices = jnp.where(jnp.isinf(best), -1, indices).reshape(B * T, -1)
        return hj.Selection(indices=indices, count=jnp.sum(indices >= 0, axis=-1))

    model = patched(case, monkeypatch, dsa.hj, "select_paged", select)
    assert failures(case, model) >= {"selection", "logits"}


def test_no_head_scale_fails_in_the_scores_alone():
    """H^-1/2 is positive, so it changes no choice."""
    model = with_parameter("glm5", lambda layer: layer.attention.indexer.w, lambda w: w * 6**0.5)
    assert failures("glm5", model) == {"scores"}


def test_absolute_head_weights_fail(monkeypatch):
    queries = dsa.Indexer.queries

    def positive(self, *arguments):
        q, w = queries(self, *arguments)
        return q, jnp.abs(w)

    assert failures("dsv32", patched("dsv32", monkeypatch, dsa.Indexer, "queries", positive)) >= {"selection", "logits"}


def test_head_weights_from_the_state_before_its_norm_fail(monkeypatch):
    queries = dsa.Indexer.queries

    def unnormed(self, q_latent, x, table):
        return queries(self, q_latent, x * 2, table)

    assert failures("dsv32", patched("dsv32", monkeypatch, dsa.Indexer, "queries", unnormed)) >= {"scores"}


def test_rope_on_the_last_dims_of_the_index_keys_fails(monkeypatch):
    def turn_last(self, x, table):
        R = self.config.qk_rope_head_dim
        turned = rope.rotate(x[..., -R:], table, self.config.indexer_rope_interleave)
        return jnp.concatenate([x[..., :-R], turned], axis=-1)

    model = patched("dsv32", monkeypatch, dsa.Indexer, "_turn", turn_last)
    assert failures("dsv32", model) >= {"scores", "selection", "logits"}


def test_a_hadamard_rotation_of_one_side_fails(monkeypatch):
    keys = dsa.Indexer.keys

    def unrotated(self, *arguments):
        rotating = self.config
        self.config = dataclasses.replace(rotating, index_hadamard=False)
        try:
            return keys(self, *arguments)
        finally:
            self.config = rotating

    model = changed("dsv32", index_hadamard=True)
    monkeypatch.setattr(dsa.Indexer, "keys", unrotated)
    assert failures("dsv32", model) >= {"scores", "selection", "logits"}


def routed_wrong(case, monkeypatch, choose):
    """The model with the router replaced: choose(scores, biased, config) -> experts, their raw weights."""

    def route(logits, bias, config):
        scores = jax.nn.sigmoid(logits)
        experts, weights = choose(scores, scores + bias, config)
        weights = weights / (jnp.sum(weights, axis=-1, keepdims=True) + 1e-20)
        return experts, weights * config.routed_scaling_factor

    return patched(case, monkeypatch, moe, "route", route)


def kept_groups(biased, config, best=2, fill=-jnp.inf):
    grouped = biased.reshape(*biased.shape[:2], config.n_group, -1)
    of_group = jnp.sum(lax.top_k(grouped, best)[0], axis=-1)
    kept = jax.nn.one_hot(lax.top_k(of_group, config.topk_group)[1], config.n_group).sum(axis=-2) > 0
    return jnp.where(kept[..., None], grouped, fill).reshape(biased.shape)


def pick(chooser, weigher, config):
    experts = lax.top_k(chooser, config.num_experts_per_tok)[1]
    return experts, jnp.take_along_axis(weigher, experts, axis=-1)


def test_the_routers_mistakes_are_made_on_a_right_copy_of_it(monkeypatch):
    model = routed_wrong("dsv32", monkeypatch, lambda s, biased, c: pick(kept_groups(biased, c), s, c))
    assert failures("dsv32", model) == set()


ROUTERS = {
    "the expert bias in the weights": lambda s, biased, c: pick(kept_groups(biased, c), biased, c),
    "no expert bias": lambda s, biased, c: pick(kept_groups(s, c), s, c),
    "no group limit": lambda s, biased, c: pick(biased, s, c),
    "groups ranked by their best expert": lambda s, biased, c: pick(kept_groups(biased, c, best=1), s, c),
    "groups ranked without the bias": lambda s, biased, c: pick(
        jnp.where(jnp.isinf(kept_groups(s, c)), -jnp.inf, biased), s, c
    ),
}


@pytest.mark.parametrize("mistake", ROUTERS)
def test_a_wrong_router_fails(mistake, monkeypatch):
    assert failures("dsv32", routed_wrong("dsv32", monkeypatch, ROUTERS[mistake])) >= {"logits", "hidden"}


def test_masking_groups_by_zero_fails_where_biased_scores_are_negative(monkeypatch):
    """The golden biases leave every biased score positive, so this mistake needs a bias that does not."""
    logits = jnp.asarray([[[1.0, 0.5, 2.0, 3.0]]])
    bias = jnp.asarray([-2.0, -2.0, -0.5, -3.0])
    config = dataclasses.replace(
        golden.model("dsv32").config, n_routed_experts=4, n_group=2, topk_group=1, num_experts_per_tok=2
    )
    # Groups: biased -1.27, -1.38 sum to -2.65; 0.38, -2.05 to -1.67. The second is kept, with both of its experts.
    right, _ = moe.route(logits, bias, config)
    assert sorted(right[0, 0].tolist()) == [2, 3]
    biased = jax.nn.sigmoid(logits) + bias
    wrong, _ = pick(kept_groups(biased, config, fill=0.0), biased, config)
    assert sorted(wrong[0, 0].tolist()) != [2, 3]


def test_no_shared_expert_fails(monkeypatch):
    class Nothing:
        def __call__(self, x):
            return jnp.zeros_like(x)

    model = nnx.clone(golden.model("glm5"))
    for layer in model.layers[1:]:
        monkeypatch.setattr(layer.mlp, "shared", nnx.data(Nothing()))
    assert failures("glm5", model) >= {"logits", "hidden"}


def test_swapped_halves_of_a_query_fail():
    """Rope dims first, as the indexer has them, where MLA has them last."""
    model = with_parameter("glm5", lambda layer: layer.attention.q_b, lambda q_b: jnp.roll(q_b, 8, axis=-1))
    assert failures("glm5", model) >= {"logits", "hidden"}


def test_looking_one_token_ahead_or_short_fails(monkeypatch):
    right = dsa.select
    for shift in (-1, 1):
        monkeypatch.setattr(
            dsa,
            "select",
            lambda q, w, memory, slots, lengths, *rest, s=shift: right(q, w, memory, slots, lengths + s, *rest),
        )
        assert failures("glm5", golden.model("glm5")) >= {"selection", "logits"}


def test_plain_norms_of_the_block_without_their_scale_fail():
    for name in ("attention_norm", "mlp_norm"):
        model = with_parameter("glm5", lambda layer, name=name: getattr(layer, name), jnp.ones_like)
        assert failures("glm5", model) >= {"logits"}


def test_a_final_norm_left_out_fails(monkeypatch):
    calls, right = [0], modeling.rms_norm

    def skip_the_last(x, scale, eps):
        calls[0] += 1
        return x if calls[0] == 7 else right(x, scale, eps)

    assert failures("glm5", patched("glm5", monkeypatch, modeling, "rms_norm", skip_the_last)) == {"logits"}
