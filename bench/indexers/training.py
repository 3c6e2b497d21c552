"""Trains indexers over pools beside a frozen model, by their divergence from where its attention looks.

The warm-up of DeepSeek Sparse Attention, on pools: the target of an entry is what the heads attend to in its tokens,
among the whole entries that a query sees. The tail is always attended to and takes no part.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array, lax

from bench.indexers.model import Pools, of_pools
from hisa_jax.models.dsa import Attention, Projections, Table
from hisa_jax.models.rope import rope_table
from hisa_jax.models.training import forward
from hisa_jax.models.training.batches import Batches, prefetched
from hisa_jax.models.training.sparse import kl_target
from hisa_jax.models.training.text import Corpus
from hisa_jax.models.training.weights import Stacked

_EARLIEST = 64  # queries that see fewer tokens choose all of them anyway
_RISE = 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """How: windows of T tokens, one a step, and the loss at so many of their queries.

    The rate rises for 20 steps and falls by a line to a twentieth. Half of the windows have questions in them.
    """

    T: int = 4096
    queries: int = 128
    steps: int = 400
    rate: float = 3e-3
    seed: int = 0


def optimizer(recipe: Recipe) -> optax.GradientTransformation:
    def rate(step: Array) -> Array:
        return recipe.rate * jnp.minimum(1, (step + 1) / _RISE) * jnp.maximum(0.05, 1 - step / recipe.steps)

    return optax.chain(optax.clip_by_global_norm(5.0), optax.adam(rate, b1=0.9, b2=0.98))


def train(
    stacked: Stacked, pools: Pools, corpus: Corpus, recipe: Recipe, report: Callable[[int, float], None]
) -> Pools:
    """The indexers after all steps; `report` is told the step and the divergence, a mean over layers and queries."""
    batches = Batches(corpus, length=recipe.T, batch=1, synthetic_share=0.5, seed=recipe.seed)
    step_of = optimizer(recipe)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(layers: Any, moments: Any, stacked: Stacked, tokens: Array, rows: Array) -> tuple[Any, Any, Array]:
        losses, gradient = gradients(stacked, Pools(pools.graph, layers), tokens, rows)
        change, moments = step_of.update(gradient, moments)
        return optax.apply_updates(layers, change), moments, jnp.mean(losses)

    layers = jax.tree.map(jnp.copy, pools.layers)
    moments = step_of.init(layers)
    for i, batch in enumerate(prefetched(batches, 0, recipe.steps)):
        tokens = jnp.asarray(batch.tokens[:, : recipe.T], jnp.int32)
        rng = np.random.default_rng([recipe.seed, i])
        rows = np.sort(rng.choice(np.arange(_EARLIEST, recipe.T), recipe.queries, replace=False)).astype(np.int32)
        layers, moments, loss = step(layers, moments, stacked, tokens, jnp.asarray(rows))
        if (i + 1) % max(recipe.steps // 10, 1) == 0:
            report(i + 1, float(loss))
    return Pools(pools.graph, layers)


def gradients(stacked: Stacked, pools: Pools, tokens: Array, rows: Array) -> tuple[Array, Any]:
    """The loss of each layer [L] and the gradient of their sum, at some rows [n] of one window [1, T]."""
    config = stacked.config
    table = rope_table(config, jnp.arange(tokens.shape[1], dtype=jnp.int32)[None, :])

    def attend(own: Any, attention: Attention, x: Array, table: Table, made: Projections) -> tuple[Array, Any]:
        out, _ = forward.dense(attention, x, table, made)
        target = attention_mass(*kl_target(attention, made), rows, config.softmax_scale)
        found = jax.value_and_grad(lambda own: divergence(pools.graph, own, x, made, table, rows, target))(own)
        return out, found

    def layer(x: Array, each: tuple[Any, Any]) -> tuple[Array, Any]:
        state, own = each
        return forward.layer_forward(nnx.merge(stacked.graph, state), x, table, functools.partial(attend, own))

    x = stacked.embed[tokens]
    return lax.scan(layer, x, (stacked.layers, pools.layers))[1]


def attention_mass(q: Array, kv: Array, rows: Array, scale: float) -> Array:
    """How much the heads look at each token: [1, T, N, C], [1, T, C], [n] -> [n, T] float32, their mean."""
    logits = scale * jnp.einsum("tnc,sc->tns", q[0, rows], kv[0], preferred_element_type=jnp.float32)
    seen = jnp.arange(kv.shape[1])[None, :] <= rows[:, None]
    return jnp.mean(jax.nn.softmax(jnp.where(seen[:, None, :], logits, -jnp.inf), axis=-1), axis=1)


def divergence(
    graph: Any, own: Any, x: Array, made: Projections, table: Table, rows: Array, target: Array
) -> Array:  # fmt: skip
    """KL(target || softmax of scores) over whole entries, a mean over the rows [n]; `target` [n, T] is of tokens."""
    q, w, k = of_pools(graph, own, x, made, table)
    r = x.shape[1] // k.shape[1]
    products = jnp.einsum("thd,sd->ths", q[0, rows], k[0], preferred_element_type=jnp.float32)
    scores = jnp.einsum("ths,th->ts", jnp.maximum(products, 0), w[0, rows])
    whole = jnp.arange(k.shape[1])[None, :] < (rows[:, None] + 1) // r
    wanted = jnp.where(whole, jnp.sum(target.reshape(*scores.shape, r), axis=-1), 0)
    wanted = wanted / jnp.sum(wanted, axis=-1, keepdims=True)
    logs = jax.nn.log_softmax(jnp.where(whole, scores, -jnp.inf), axis=-1)
    # Outside of the mask the logarithm is -inf, which times 0 is NaN: it is replaced.
    parts = jax.scipy.special.xlogy(wanted, wanted) - wanted * jnp.where(whole, logs, 0)
    return jnp.mean(jnp.sum(parts, axis=-1))
