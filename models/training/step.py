"""One step of a stage: loss, gradient over passes and devices, update. Compiled once a stage."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import hisa_jax as hj
from hisa_jax.models.training import forward
from hisa_jax.models.training.lighthouse import lighthouse
from hisa_jax.models.training.optimizer import make_optimizer, trained
from hisa_jax.models.training.recipe import Attention, Recipe, Stage
from hisa_jax.models.training.weights import Skeleton, Weights

AXIS = "data"


class Metrics(NamedTuple):
    """Means over a step's bytes, float32 scalars. `text_loss` and `answer_loss` in nats a byte: bytes that answer no
    question, and those that do; `answers_right`: share of these that are the likeliest byte; `kl`: mean over layers."""

    loss: Array
    text_loss: Array
    answer_loss: Array
    answers_right: Array
    kl: Array
    gradient_norm: Array


class _Sums(NamedTuple):
    """Over bytes; `texts` and `answers` are how many there are."""

    loss: Array
    text_loss: Array
    texts: Array
    answer_loss: Array
    right: Array
    answers: Array
    kl: Array


Step = Callable[[Weights, optax.OptState, Array, Array], tuple[Weights, optax.OptState, Metrics]]


def make_step(recipe: Recipe, stage: Stage, attention: Attention, skeleton: Skeleton, mesh: Mesh) -> Step:
    """A compiled step of a stage.

    Args:
        recipe, stage: what is trained.
        attention: that of the step, see `Stage.attention_at`.
        skeleton: the model.
        mesh: of one axis, `AXIS`, over which a step's sequences are split; weights are on each device.

    Returns: (weights, optimiser's state, tokens [A, rows, context + 1] uint8, is_answer likewise bool) -> new weights,
        new state, metrics. Weights and state are donated.
    """
    optimizer = make_optimizer(recipe, stage)

    def gradient(weights: Weights, tokens: Array, is_answer: Array) -> tuple[Weights, _Sums]:
        learnt, fixed = trained(stage, weights)
        one = jax.grad(functools.partial(_loss, recipe, stage, attention, skeleton, fixed), has_aux=True)

        def add(sums: Any, batch: tuple[Array, Array]) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, sums, one(learnt, *batch)), None

        zeros = jax.eval_shape(one, learnt, tokens[0], is_answer[0])
        sums, _ = lax.scan(add, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), zeros), (tokens, is_answer))
        # Sums, not means, so that a pass with few answers weighs what it should.
        change, sums = lax.psum(sums, AXIS)
        return jax.tree.map(lambda x: x / (sums.texts + sums.answers), change), sums

    batch = P(None, AXIS)
    split = jax.shard_map(gradient, mesh=mesh, in_specs=(P(), batch, batch), out_specs=P(), check_vma=False)

    everywhere, here = NamedSharding(mesh, P()), placement(mesh)

    @functools.partial(
        jax.jit, donate_argnums=(0, 1), in_shardings=(everywhere, everywhere, here, here), out_shardings=everywhere
    )
    def step(weights: Weights, state: optax.OptState, tokens: Array, is_answer: Array) -> Any:
        change, sums = split(weights, tokens, is_answer)
        learnt, fixed = trained(stage, weights)
        updates, state = optimizer.update(change, state, learnt)
        bytes_, answers = sums.texts + sums.answers, jnp.maximum(sums.answers, 1)
        metrics = Metrics(
            loss=sums.loss / bytes_, text_loss=sums.text_loss / sums.texts, answer_loss=sums.answer_loss / answers,
            answers_right=sums.right / answers, kl=sums.kl / bytes_, gradient_norm=optax.tree.norm(change),
        )  # fmt: skip
        return fixed | optax.apply_updates(learnt, updates), state, metrics

    return step


def placement(mesh: Mesh) -> NamedSharding:
    """Where a step wants its tokens."""
    return NamedSharding(mesh, P(None, AXIS))


def _attend(recipe: Recipe, stage: Stage, attention: Attention) -> forward.Attend | list[forward.Attend]:
    if attention == "sparse":
        assert not isinstance(stage.method, hj.Lighthouse)  # Stage has checked
        return functools.partial(forward.sparse, method=stage.method or recipe.config.method)
    if attention == "dense":
        return forward.dense if stage.trained == "model" else forward.warm_up
    assert isinstance(stage.method, hj.Lighthouse)
    over_entries: forward.Attend = functools.partial(lighthouse, method=stage.method)
    n, ends = recipe.config.num_hidden_layers, stage.dense_ends
    return [over_entries if ends <= layer < n - ends else forward.dense for layer in range(n)]


def _loss(
    recipe: Recipe, stage: Stage, attention: Attention, skeleton: Skeleton, fixed: Weights, learnt: Weights,
    tokens: Array, is_answer: Array,
) -> tuple[Array, _Sums]:  # fmt: skip
    attend = _attend(recipe, stage, attention)
    wanted = tokens[:, 1:].astype(jnp.int32)
    logits, kl = forward.forward(skeleton.stacked(fixed | learnt), tokens[:, :-1].astype(jnp.int32), attend)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, wanted)
    answers = is_answer[:, 1:].astype(jnp.float32)
    texts = 1 - answers
    divergence = jnp.float32(0) if kl is None else jnp.sum(jnp.mean(kl, axis=0))
    # The indexers' loss moves the indexers alone, as `forward` detaches what they read.
    language = jnp.sum(losses * (texts + recipe.answer_weight * answers))
    total = {"model": language, "indexer": divergence, "all": language + divergence}[stage.trained]
    is_right = (jnp.argmax(logits, axis=-1) == wanted).astype(jnp.float32)
    return total, _Sums(
        loss=total, text_loss=jnp.sum(losses * texts), texts=jnp.sum(texts), answer_loss=jnp.sum(losses * answers),
        right=jnp.sum(is_right * answers), answers=jnp.sum(answers), kl=divergence,
    )  # fmt: skip
