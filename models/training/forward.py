"""Whole sequences through a model, differentiable, with the attention of a stage of DSA's training.

Generation runs through pages (`Model.run`); here nothing is kept, so a layer is a function of its hidden states. The
layers of a model are stacked and scanned.
"""

import functools
import itertools
from collections.abc import Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax
from jax.sharding import Mesh

import hisa_jax as hj
from hisa_jax.models.dsa import Attention, Projections, Table
from hisa_jax.models.layers import rms_norm
from hisa_jax.models.modeling import HIDDEN, Layer
from hisa_jax.models.moe import Moe
from hisa_jax.models.replay.choices import Choices
from hisa_jax.models.replay.record import Rollout
from hisa_jax.models.rope import rope_table
from hisa_jax.models.sharding import constrain
from hisa_jax.models.training.attention import causal_attention
from hisa_jax.models.training.sparse import Layout, Sparse, alike, index_inputs, kl_target
from hisa_jax.models.training.weights import Stacked


class Attend(Protocol):
    """How a stage attends: heads' values [B, T, N, V] and whatever else it wants to know of a layer."""

    def __call__(self, attention: Attention, x: Array, table: Table, made: Projections, /) -> tuple[Array, Any]:
        """x [B, T, E] is normed; `made` is made of it."""


def dense(attention: Attention, x: Array, table: Table, made: Projections) -> tuple[Array, None]:
    """Every query attends to all tokens up to its own; the indexer takes no part."""
    return causal_attention(*heads_of(attention, made), attention.config.softmax_scale), None


def heads_of(attention: Attention, made: Projections) -> tuple[Array, Array, Array]:
    """Every head's queries and keys [B, T, N, P + R] and values [B, T, N, V] in full, of the expanded form."""
    k_b = attention.k_b[...]
    latent, k_rope = jnp.split(made.kv, [k_b.shape[0]], axis=-1)
    k_nope = jnp.einsum("bsl,lnd->bsnd", latent, k_b)
    k_rope = jnp.broadcast_to(k_rope[:, :, None, :], (*k_nope.shape[:3], k_rope.shape[-1]))
    q, k = (jnp.concatenate(parts, axis=-1) for parts in ((made.q_nope, made.q_rope), (k_nope, k_rope)))
    return q, k, jnp.einsum("bsl,lnd->bsnd", latent, attention.v_b[...])


def warm_up(attention: Attention, x: Array, table: Table, made: Projections) -> tuple[Array, Array]:
    """As `dense`; also the KL of the indexer's distribution from the heads' over all visible tokens, [B, T]."""
    out, _ = dense(attention, x, table, made)
    inputs = index_inputs(attention, x, table, made)
    return out, hj.indexer_kl(*inputs, *kl_target(attention, made), scale=attention.config.softmax_scale)


def sparse(
    attention: Attention, x: Array, table: Table, made: Projections, *, method: hj.Method, layout: Layout | None = None,
    recorded: Array | None = None, start: int = 0,
) -> tuple[Array, Array | None]:  # fmt: skip
    """Every query attends to the tokens that `method` selects; also the KL over these, [B, T].

    Args:
        attention, x, table, made: of the layer.
        method: how it selects.
        layout, recorded, start: what a rollout selected, which is taken instead; see `Sparse`.
    """
    attend = Sparse(method=method, layout=layout, recorded=recorded, start=start)
    out, seen = attend(attention, x, table, made)
    return out, seen.kl


def forward(
    stacked: Stacked, tokens: Array, attend: Attend | Sequence[Attend], selections: Rollout | None = None
) -> tuple[Array, Any]:
    """Logits of whole sequences.

    Args:
        stacked: the model.
        tokens: [B, T] int32.
        attend: of the stage: `dense`, `warm_up`, `sparse` or `lighthouse` with a method; one for all layers or one a
            layer.
        selections: what a rollout of these tokens selected, and the experts it took, to run exactly these; for `sparse`
            alone. Rows may be packed.

    Returns: [B, T, V] float32, and what `attend` returned beside its values, stacked by layer: by those that returned
        anything.
    Raises: TypeError, ValueError: a record that does not fit the tokens or the model, another stage than `sparse`.
    """
    call, config = "forward", stacked.config
    stage: Any = attend
    if selections is None:
        positions, recorded, experts = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None, :], None, None
    else:
        if not isinstance(attend, functools.partial) or attend.func is not sparse:
            raise ValueError(f"{call}: attend is {attend}, wanted `sparse` with a method, which alone takes selections")
        choices = Choices.of(call, config, tokens, selections)
        stage = functools.partial(attend, layout=choices.layout, start=choices.start)
        positions, recorded = choices.layout.positions, jnp.stack(alike(*choices.recorded))
        experts = jnp.stack(choices.experts) if choices.experts else None
    table = rope_table(config, positions)

    n = config.num_hidden_layers
    stages = [stage] * n if callable(stage) else list(stage)
    if len(stages) != n:
        raise ValueError(f"{call}: attend is of {len(stages)} layers, wanted the model's {n}")

    def layer(stage: Any, x: Array, each: tuple[nnx.State, Array | None, Array | None]) -> tuple[Array, Any]:
        state, recorded, experts = each
        how = stage if recorded is None else functools.partial(stage, recorded=recorded)
        return run_layer(nnx.merge(stacked.graph, state), x, table, how, experts)[:2]

    x, every = stacked.embed[tokens], (stacked.layers, recorded, experts)
    extras: list[Any] = []
    first = 0
    for same, run in itertools.groupby(stages):
        own = slice(first, first + len(list(run)))
        x, extra = lax.scan(functools.partial(layer, same), x, _layers(every, own, n))
        extras += [] if extra is None else [extra]
        first = own.stop
    extra = jax.tree.map(lambda *parts: jnp.concatenate(parts), *extras) if extras else None
    x = rms_norm(x, stacked.norm, config.rms_norm_eps)
    head = stacked.embed.T if stacked.head is None else stacked.head
    return jnp.einsum("bte,ev->btv", x, head, preferred_element_type=jnp.float32), extra


def _layers[Tree](every: Tree, own: slice, n: int) -> Tree:
    """What a run of the n layers has. All of them are scanned as they are, without a copy."""
    return every if own.stop - own.start == n else jax.tree.map(lambda x: x[own], every)


def layer_forward(layer: Layer, x: Array, table: Table, attend: Attend) -> tuple[Array, Any]:
    """One layer on hidden states [B, T, E], and what `attend` returned beside its values."""
    return run_layer(layer, x, table, attend)[:2]


def run_layer(
    layer: Layer, x: Array, table: Table, attend: Attend, experts: Array | None = None, mesh: Mesh | None = None
) -> tuple[Array, Any, Array | None]:
    """One layer.

    Args:
        layer: of a model on `mesh`.
        x: [B, T, E] hidden states.
        table: cos and sin of the tokens' positions.
        attend: of the stage.
        experts: [B, T, K] int32, to be taken in place of the router's.
        mesh: what the model is split over, or None.

    Returns: [B, T, E]; what `attend` returned beside its values; the experts that the router chooses, None in layers
        without.
    """
    eps = layer.config.rms_norm_eps
    normed = rms_norm(x, layer.attention_norm[...], eps)
    out, extra = attend(layer.attention, normed, table, layer.attention.project(normed, table))
    x = constrain(x + layer.attention.merge_heads(out), mesh, HIDDEN)
    normed, own = rms_norm(x, layer.mlp_norm[...], eps), None
    if isinstance(layer.mlp, Moe):
        own, _ = layer.mlp.choose(normed)
        out, *_ = layer.mlp(normed, mesh, experts)
    else:
        out = layer.mlp(normed)
    return constrain(x + out, mesh, HIDDEN), extra, own
