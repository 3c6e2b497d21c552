"""The forward pass of layers that are stacked and scanned replays, too: what trains whole models here."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import hisa_jax as hj
from hisa_jax import models
from hisa_jax.models.training import forward
from hisa_jax.models.training.weights import Skeleton, weights_of
from tests.models.training import tiny

pytestmark = pytest.mark.exhaustive


@pytest.mark.parametrize("start", [0, 16])
def test_stacked_layers_replay_as_the_model_does(start):
    skeleton = Skeleton(tiny.CONFIG, "float32")
    weights = skeleton.initial(0)
    model = skeleton.model(weights)
    prompts = np.random.default_rng(0).integers(0, 256, (2, 40)).tolist()
    options = dict(chunk=16, return_selections=True, selections_from=start)
    padded = models.generate(model.with_method(tiny.HISA), prompts, 8, **options).rollout
    attend = functools.partial(forward.sparse, method=hj.Dsa(topk=16))
    for r in (padded, models.pack_rollouts([padded], length=100)):

        def run(weights, r):
            logits, kl = forward.forward(skeleton.stacked(weights), r.tokens, attend, r)
            return jnp.sum(kl) + jnp.sum(logits * r.is_made[..., None]), (logits, kl)

        (_, (logits, kl)), gradient = jax.jit(jax.value_and_grad(run, has_aux=True))(weights, r)
        wanted = models.training_forward(model, r.tokens, selections=r)
        is_real = r.sequence >= 0
        np.testing.assert_allclose(logits[is_real], wanted.logits[is_real], atol=1e-4)
        np.testing.assert_allclose(kl[:, is_real], wanted.kl[:, is_real], atol=1e-5)
        assert np.abs(wanted.logprobs - r.logprobs)[r.is_made].max() < 1e-4
        assert all(jnp.any(x) for x in gradient.values())
    # As `training.step` splits a batch: every array of a record by its first axis.
    mesh = models.make_mesh()
    step = jax.shard_map(
        lambda weights, r: forward.forward(skeleton.stacked(weights), r.tokens, attend, r)[0],
        mesh=mesh, in_specs=(P(), P("data")), out_specs=P("data"), check_vma=False,
    )  # fmt: skip
    np.testing.assert_allclose(
        jax.jit(step)(weights, padded),
        models.training_forward(model, padded.tokens, selections=padded).logits,
        atol=1e-4,
    )
    other, _ = forward.forward(skeleton.stacked(weights_of(model)), padded.tokens, attend)
    assert np.abs(other - models.training_forward(model, padded.tokens, selections=padded).logits).max() > 1e-3


def test_other_stages_refuse_a_record():
    skeleton = Skeleton(tiny.CONFIG, "float32")
    model = skeleton.model(skeleton.initial(0))
    r = models.generate(model, [[1, 2, 3]], 2, return_selections=True).rollout
    with pytest.raises(ValueError, match="forward: attend is .*dense.*, wanted `sparse` with a method"):
        forward.forward(skeleton.stacked(weights_of(model)), jnp.asarray(r.tokens), forward.dense, r)
