"""Trains the indexers alone, by their divergence from where the frozen model's attention looks (DeepSeek's warm-up).

One pass over the layers does everything: a layer's indexer reads the layer's input and nothing reads the indexer, so
that its gradient is taken inside the layer and no activation is kept. Many steps run in one call of the device.
"""

import dataclasses
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax

from bench import UserError
from bench.records import whole_file
from bench.smollm2.indexers import Indexers, index_keys, index_queries, index_scores, random_indexers
from bench.smollm2.model import Config, Weights, attention_mass, dense, rope_table, run

_EARLIEST = 64  # queries that see fewer tokens choose all of them anyway


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """How indexers are trained.

    Attributes:
        T: tokens of a step, one window.
        n_queries: rows of it that the loss is taken at.
        steps: of the whole schedule: warm-up, then a line down to a twentieth.
        per_call: steps of one call.
    """

    T: int = 8192
    n_queries: int = 256
    steps: int = 870
    rate: float = 1e-3
    per_call: int = 30
    seed: int = 0


class State(NamedTuple):
    """What training goes on from."""

    indexers: Indexers
    moments: Any
    step: Array


def optimizer(recipe: Recipe) -> optax.GradientTransformation:
    def rate(step: Array) -> Array:
        return recipe.rate * jnp.minimum(1, (step + 1) / 30) * jnp.maximum(0.05, 1 - step / recipe.steps)

    return optax.chain(optax.clip_by_global_norm(5.0), optax.adam(rate, b1=0.9, b2=0.98))


def first_state(config: Config, H: int, recipe: Recipe) -> State:
    indexers = random_indexers(jax.random.key(recipe.seed), config, H)
    return State(indexers, optimizer(recipe).init(indexers), jnp.int32(0))


def divergence(target: Array, scores: Array, mask: Array) -> Array:
    """KL(target || softmax of scores) over the tokens in `mask`, a mean over queries: [t, S] each -> float32."""
    # Outside of the mask the logarithm is -inf, which times 0 is NaN: it is replaced.
    logs = jax.nn.log_softmax(jnp.where(mask, scores, -jnp.inf), axis=-1)
    parts = jax.scipy.special.xlogy(target, target) - target * jnp.where(mask, logs, 0)
    return jnp.mean(jnp.sum(jnp.where(mask, parts, 0), axis=-1))


def gradients(
    weights: Weights, config: Config, indexers: Indexers, tokens: Array, rows: Array
) -> tuple[Array, Indexers]:
    """The loss of each layer [L] and the gradient of their sum, at some rows [n] of one window [T]."""
    T = tokens.shape[0]
    table = rope_table(config, jnp.arange(T))
    of_rows = (table[0][rows], table[1][rows])
    seen = jnp.arange(T)[None, :] <= rows[:, None]

    def attend(h: Array, q: Array, k: Array, v: Array, one: Indexers) -> tuple[Array, tuple[Array, Indexers]]:
        # What the heads attend to is fixed: only the indexer is differentiated.
        target = attention_mass(q[rows], k, rows + 1)

        def loss(one: Indexers) -> Array:
            iq, iw = index_queries(one, h[rows], of_rows)
            return divergence(target, index_scores(iq, index_keys(one, h, table), iw, h.dtype), seen)

        return dense(h, q, k, v, None)[0], jax.value_and_grad(loss)(one)

    return run(weights, config, tokens, attend, own=indexers)[1]


@functools.cache
def make_steps(config: Config, recipe: Recipe) -> Callable[..., tuple[State, Array]]:
    """(state, weights, tokens of the whole text, offsets [n], rows [n, n_queries]) -> the state after n steps, losses.

    The state's memory is used again.
    """
    step_of = optimizer(recipe).update

    @functools.partial(jax.jit, donate_argnums=0)
    def steps(state: State, weights: Weights, text: Array, offsets: Array, rows: Array) -> tuple[State, Array]:
        def one(state: State, drawn: tuple[Array, Array]) -> tuple[State, Array]:
            offset, rows = drawn
            tokens = lax.dynamic_slice_in_dim(text, offset, recipe.T)
            losses, gradient = gradients(weights, config, state.indexers, tokens, rows)
            change, moments = step_of(gradient, state.moments)
            indexers = optax.apply_updates(state.indexers, change)
            return State(indexers, moments, state.step + 1), jnp.mean(losses)

        return lax.scan(one, state, (offsets, rows))

    return steps


def draw(recipe: Recipe, n_text: int, step: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Offsets and rows of n steps from one on: the same whatever the calls are cut into."""
    offsets, rows = [], []
    for i in range(step, step + n):
        # A generator a step, so that a run that goes on draws what it would have drawn.
        rng = np.random.default_rng([recipe.seed, i])
        offsets.append(rng.integers(0, n_text - recipe.T))
        rows.append(np.sort(rng.choice(np.arange(_EARLIEST, recipe.T), recipe.n_queries, replace=False)))
    return np.array(offsets, np.int32), np.array(rows, np.int32)


def train(
    state: State,
    weights: Weights,
    config: Config,
    recipe: Recipe,
    text: np.ndarray,
    until: float,
    report: Callable[[dict[str, Any]], None],
    stop: int | None = None,
) -> State:
    """Trains to the end of the schedule, to step `stop`, or until `time.monotonic()` passes `until`."""
    # The program does not depend on the seed: runs of several share it.
    steps = make_steps(config, dataclasses.replace(recipe, seed=0))
    on_device, stop = jnp.asarray(text, jnp.int32), min(recipe.steps, stop or recipe.steps)
    start, first = time.monotonic(), int(state.step)
    while (step := int(state.step)) < stop and time.monotonic() < until:
        n = min(recipe.per_call, stop - step)
        offsets, rows = draw(recipe, text.size, step, n)
        state, losses = steps(state, weights, on_device, jnp.asarray(offsets), jnp.asarray(rows))
        kl = float(jnp.mean(losses))
        seconds = time.monotonic() - start
        report({"kind": "train", "step": step + n, "kl": kl, "seconds": seconds, "each": seconds / (step + n - first)})
    return state


def save(path: Path, state: Any) -> None:
    """Writes a pytree's arrays to an .npz, in the order of its leaves."""
    leaves: dict[str, Any] = {f"{i:04}": np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(state))}
    with whole_file(path) as partial:
        np.savez(partial, **leaves)


def load(path: Path, like: Any) -> Any:
    """Reads what `save` wrote, into the structure of `like`.

    Raises: UserError: no such file, or arrays of other shapes.
    """
    try:
        with np.load(path) as file:
            leaves = [file[name] for name in sorted(file.files)]
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error
    wanted, structure = jax.tree.flatten(like)
    if [x.shape for x in leaves] != [x.shape for x in wanted]:
        raise UserError(f"{path}: holds arrays of other shapes than these settings ask for")
    return jax.tree.unflatten(structure, [jnp.asarray(x) for x in leaves])
