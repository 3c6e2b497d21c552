"""Trains model and indexers together through sparse attention: DeepSeek-V3.2's second stage.

The model learns from the next token alone, through attention to the tokens that its indexers select; an indexer learns
from its divergence from that attention over the selected tokens alone, its input detached from the model.
"""

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name

from bench.smollm2 import training
from bench.smollm2.filters import kept
from bench.smollm2.indexers import Indexers, index_keys, index_queries, index_scores
from bench.smollm2.measure import view_of
from bench.smollm2.model import KEPT, Config, Weights, attention_mass, chunked, logits, masked, rope_table, run


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe(training.Recipe):
    """As `training.Recipe`, whose `rate` is the indexers'; `model_rate` is the model's, `topk` tokens are selected."""

    T: int = 4096
    steps: int = 1000
    rate: float = 3e-4
    model_rate: float = 3e-5
    per_call: int = 10
    topk: int = 64


class State(NamedTuple):
    """`weights` and `indexers` in float32, their moments, the step."""

    weights: Weights
    indexers: Indexers
    moments: Any
    step: Array


def _optimizers(recipe: Recipe) -> tuple[optax.GradientTransformation, optax.GradientTransformation]:
    def one(rate: float) -> optax.GradientTransformation:
        schedule = optax.join_schedules(
            [optax.linear_schedule(0, rate, 20), optax.linear_schedule(rate, rate / 10, recipe.steps - 20)], [20]
        )
        return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule, b1=0.9, b2=0.95))

    return one(recipe.model_rate), one(recipe.rate)


def first_state(weights: Weights, indexers: Indexers, recipe: Recipe) -> State:
    weights = jax.tree.map(lambda x: x.astype(jnp.float32), weights)
    of_model, of_indexers = _optimizers(recipe)
    return State(weights, indexers, (of_model.init(weights), of_indexers.init(indexers)), jnp.int32(0))


def loss(
    weights: Weights, indexers: Indexers, config: Config, tokens: Array, rows: Array, topk: int
) -> tuple[Array, tuple[Array, Array]]:
    """The sum of both losses, and each: nats a token, the mean divergence of a layer at some rows."""
    T = tokens.shape[0]
    table = rope_table(config, jnp.arange(T))

    def attend(h: Array, q: Array, k: Array, v: Array, one: Indexers) -> tuple[Array, Array]:
        h = lax.stop_gradient(h)
        ik = index_keys(one, h, table)

        def selected(some: Array) -> Array:
            view = view_of(one, h, some, config, ik, products=h.dtype)
            return kept(view.exact, jnp.full_like(some, topk))

        # Kept for the gradient: choosing again would cost more than all else.
        mask = checkpoint_name(lax.stop_gradient(chunked(selected, T)), KEPT)
        out = chunked(lambda some: masked(q[some], k, v, mask[some]), T)
        target = jnp.where(mask[rows], attention_mass(lax.stop_gradient(q[rows]), lax.stop_gradient(k), rows + 1), 0)
        target = target / jnp.sum(target, axis=1, keepdims=True)
        iq, iw = index_queries(one, h[rows], (table[0][rows], table[1][rows]))
        return out, training.divergence(target, index_scores(iq, ik, iw, h.dtype), mask[rows])

    x, divergences = run(weights, config, tokens, attend, own=indexers, remat=True)
    logs = jax.nn.log_softmax(logits(weights, x[:-1]), axis=-1)
    nats = -jnp.mean(jnp.take_along_axis(logs, tokens[1:, None], axis=-1))
    return nats + jnp.sum(divergences), (nats, jnp.mean(divergences))


def make_steps(config: Config, recipe: Recipe, dtype: Any) -> Callable[..., tuple[State, Any]]:
    """(state, text, offsets [n], rows [n, n_queries]) -> the state after n steps, losses; computes in `dtype`."""
    of_model, of_indexers = _optimizers(recipe)

    def whole(both: tuple[Weights, Indexers], tokens: Array, rows: Array) -> tuple[Array, tuple[Array, Array]]:
        weights = jax.tree.map(lambda x: x.astype(dtype), both[0])
        return loss(weights, both[1], config, tokens, rows, recipe.topk)

    @functools.partial(jax.jit, donate_argnums=0)
    def steps(state: State, text: Array, offsets: Array, rows: Array) -> tuple[State, Any]:
        def one(state: State, drawn: tuple[Array, Array]) -> tuple[State, tuple[Array, Array]]:
            tokens = lax.dynamic_slice_in_dim(text, drawn[0], recipe.T)
            both = state.weights, state.indexers
            (_, losses), gradient = jax.value_and_grad(whole, has_aux=True)(both, tokens, drawn[1])
            changes, moments = zip(
                of_model.update(gradient[0], state.moments[0]),
                of_indexers.update(gradient[1], state.moments[1]),
                strict=True,
            )
            weights, indexers = (optax.apply_updates(x, change) for x, change in zip(both, changes, strict=True))
            return State(weights, indexers, tuple(moments), state.step + 1), losses

        return lax.scan(one, state, (offsets, rows))

    return steps


def train(
    state: State,
    config: Config,
    recipe: Recipe,
    text: np.ndarray,
    dtype: Any,
    until: float,
    report: Callable[[dict[str, Any]], None],
) -> State:
    """Trains to the end of the schedule, or until `time.monotonic()` passes `until`; reports every call."""
    steps = make_steps(config, recipe, dtype)
    on_device, start, first = jnp.asarray(text, jnp.int32), time.monotonic(), int(state.step)
    while (step := int(state.step)) < recipe.steps and time.monotonic() < until:
        n = min(recipe.per_call, recipe.steps - step)
        offsets, rows = training.draw(recipe, text.size, step, n)
        state, (nats, kl) = steps(state, on_device, jnp.asarray(offsets), jnp.asarray(rows))
        row = {"kind": "joint", "step": step + n, "nats": float(jnp.mean(nats)), "kl": float(jnp.mean(kl))}
        seconds = time.monotonic() - start
        report({**row, "seconds": seconds, "each": seconds / (step + n - first)})
    return state
