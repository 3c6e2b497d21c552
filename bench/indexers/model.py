"""The byte model with a rule in place of its selection: by its own indexers, or by indexers over pools beside them."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

import hisa_jax as hj
from bench.indexers.rules import READS, Asked, Published, Role, Rule, choose
from bench.quality.model import attended, logits_from
from bench.smollm2.programs import Programs
from hisa_jax.models import indexers
from hisa_jax.models.config import Config
from hisa_jax.models.dsa import Attention, Projections, Table
from hisa_jax.models.modeling import Layer
from hisa_jax.models.rope import rope_table
from hisa_jax.models.training.forward import layer_forward
from hisa_jax.models.training.weights import Stacked


class Pools(NamedTuple):
    """Indexers over pools, one a layer: `graph` makes one of the leaves of `layers` without their first axis."""

    graph: Any
    layers: Any


class Seen(NamedTuple):
    """What the queries and keys of a layer are: q [1, T, H, D], w [1, T, H], k [1, S, D]; S counts entries."""

    q: Array
    w: Array
    k: Array


# Sizes of the indexers over pools: heads, their dims, tokens of a pool.
SIZES = {"qwen4_exp": (4, 64, 4), "glm5_next": (16, 64, 4)}


def random_pools(model_type: str, config: Config, seed: int) -> Pools:
    """New indexers of a row of the table (models/indexers) for every layer of a model, with heads of SIZES."""
    (H, D, r), E, Q = SIZES[model_type], config.hidden_size, config.q_lora_rank
    rng = np.random.default_rng(seed)

    def drawn(rows: int, width: int) -> np.ndarray:
        return rng.normal(scale=width**-0.5, size=(rows, width)).astype(np.float32)

    def weights() -> Mapping[str, np.ndarray]:
        zeros, ones = np.zeros(D, np.float32), np.ones(D, np.float32)
        if model_type == "qwen4_exp":
            return {
                "index_qk_proj.weight": drawn((H + 1) * D, E), "q_layernorm.weight": zeros, "k_layernorm.weight": zeros,
            }  # fmt: skip
        return {
            "wq_b.weight": drawn(H * D, Q), "wk.weight": drawn(D, E), "k_norm.weight": ones, "k_norm.bias": zeros,
            "weights_proj.weight": drawn(H, E), "index_kpool_compress_ape": np.zeros((r, D), np.float32),
            "index_kpool_compress_gate": drawn(D, E),
        }  # fmt: skip

    sizes = dict(topk=config.index_topk, budget=config.index_topk, pool=r, head_dim=D, rope_dim=config.qk_rope_head_dim)
    made = [nnx.split(indexers.from_weights(model_type, sizes, weights())) for _ in range(config.num_hidden_layers)]
    return Pools(made[0][0], jax.tree.map(lambda *leaves: jnp.stack(leaves), *(state for _, state in made)))


def of_pools(graph: Any, state: Any, x: Array, made: Projections, table: Table) -> Seen:
    """What an indexer over pools makes of a layer's input, with the factor of its scores in w."""
    indexer = nnx.merge(graph, state)
    found = indexer(x, made.q_latent, *table, implementation="xla")
    w = jnp.ones(found.q.shape[:3], jnp.float32) if found.w is None else found.w
    return Seen(found.q, w * indexer.scale, found.k)


class Runner:
    """Runs a model by any rule.

    Attributes:
        stacked: the model.
        pools: what its layers choose by; None: their own indexers.
    """

    def __init__(self, stacked: Stacked, pools: Pools | None = None):
        self.stacked, self.pools, self.programs = stacked, pools, Programs()
        self._layers: dict[tuple[Rule, Role], Any] = {}

    def logits(self, tokens: np.ndarray, rule: Rule) -> Array:
        """uint8 [1, T] -> float32 [1, T, V]."""
        *_, (last, _) = self.layers(tokens, rule)
        return logits_from(self.stacked, last)

    def layers(self, tokens: np.ndarray, rule: Rule) -> Iterator[tuple[Array, Seen | None]]:
        """What each layer makes, and what it chose by; None where it takes over what another one chose."""
        x = self.stacked.embed[jnp.asarray(tokens, jnp.int32)]
        before: Published | None = None
        for at in range(self.stacked.config.num_hidden_layers):
            role = rule.role(at)
            args = self._args(at, x, before if role in READS else None)
            x, before, seen = self._program(rule, role, args).result()(*args)
            yield x, seen

    def prepare(self, T: int, rules: tuple[Rule, ...]) -> None:
        """Begins to compile what the rules need for sequences of T tokens."""
        config, dtype = self.stacked.config, self.stacked.embed.dtype
        x = jax.ShapeDtypeStruct((1, T, config.hidden_size), dtype)
        for rule in rules:
            before = None
            for at in range(config.num_hidden_layers):
                if (role := rule.role(at)) not in [rule.role(earlier) for earlier in range(at)]:
                    args = self._args(at, x, before if role in READS else None)
                    self._program(rule, role, args)
                    before = jax.eval_shape(self._layer(rule, role), *args)[1]

    def sees(self, T: int, rule: Rule) -> Seen:
        """The shapes of what the first layer chooses by."""
        x = jax.ShapeDtypeStruct((1, T, self.stacked.config.hidden_size), self.stacked.embed.dtype)
        seen: Seen = jax.eval_shape(self._layer(rule, rule.role(0)), *self._args(0, x, None))[2]
        return seen

    def _args(self, at: int, x: Any, before: Any) -> tuple[Any, ...]:
        own = None if self.pools is None else jax.tree.map(lambda leaf: leaf[at], self.pools.layers)
        return jax.tree.map(lambda leaf: leaf[at], self.stacked.layers), own, x, before

    def _program(self, rule: Rule, role: Role, args: tuple[Any, ...]) -> Any:
        layer = self._layer(rule, role)
        return self.programs.start(layer, layer, *args)

    def _layer(self, rule: Rule, role: Role) -> Any:
        # Who takes over does not choose, so that all rules share that program.
        how = Rule(name="", method=hj.Dsa()) if role == "take over" else rule.unnamed()
        if (how, role) not in self._layers:
            graph = None if self.pools is None else self.pools.graph
            self._layers[how, role] = _layer_of(self.stacked.config, self.stacked.graph, graph, how, role)
        return self._layers[how, role]


def _layer_of(config: Config, graph: nnx.GraphDef[Layer], pools: Any, rule: Rule, role: Role) -> Any:
    """(weights of a layer, of its indexer over pools or None, x, what a layer before handed on) -> the same, seen."""

    @jax.jit
    def layer(
        state: nnx.State, own: Any, x: Array, before: Published | None
    ) -> tuple[Array, Published, Seen | None]:  # fmt: skip
        positions = jnp.arange(x.shape[1], dtype=jnp.int32)[None, :]
        table = rope_table(config, positions)

        def attend(attention: Attention, x: Array, table: Table, made: Projections) -> tuple[Array, Any]:
            seen = None
            if role != "take over":
                seen = of_own(attention, x, table, made) if pools is None else of_pools(pools, own, x, made, table)
            if seen is None:
                assert before is not None
                chosen = before
            else:
                chosen = choose(rule, role, Asked(seen.q, seen.w, positions), seen.k, before)
            return attended(attention, made, chosen.indices), (chosen, seen)

        x, (chosen, seen) = layer_forward(nnx.merge(graph, state), x, table, attend)
        return x, chosen, seen

    return layer


def of_own(attention: Attention, x: Array, table: Table, made: Projections) -> Seen:
    """What a layer's own indexer makes of its input."""
    assert attention.indexer is not None  # `Skeleton` has checked that every layer has one
    q, w = attention.indexer.queries(made.q_latent, x, table)
    k = attention.indexer.keys(x, table)
    assert isinstance(k, Array)
    return Seen(q, w, k)
