"""Whole sequences through a model, differentiable, with the attention of a stage of DSA's training.

Generation runs through pages (`Model.run`); here nothing is kept, so a layer is a function of its hidden states. The
layers of a model are stacked and scanned.
"""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax

import hisa_jax as hj
from hisa_jax.lighthouse import dense as dense_attention
from hisa_jax.lighthouse import forward as entries
from hisa_jax.models.config import Config
from hisa_jax.models.dsa import Attention, Projections, Table, absorb
from hisa_jax.models.layers import rms_norm
from hisa_jax.models.modeling import Layer
from hisa_jax.models.moe import Moe
from hisa_jax.models.rope import rope_table, rotate
from hisa_jax.models.training.attention import causal_attention
from hisa_jax.models.training.weights import Stacked


class Attend(Protocol):
    """How a stage attends: heads' values [B, T, N, V] and whatever else it wants to know of a layer."""

    def __call__(self, attention: Attention, x: Array, table: Table, made: Projections) -> tuple[Array, Any]:
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
    q, k, w = _index_inputs(attention, x, table, made)
    kl = hj.indexer_kl(q, k, w, *_target(attention, made), scale=attention.config.softmax_scale)
    return out, kl


def sparse(
    attention: Attention, x: Array, table: Table, made: Projections, *, method: hj.Method
) -> tuple[Array, Array]:
    """Every query attends to the tokens that `method` selects; also the KL over these, [B, T]."""
    q, k, w = _index_inputs(attention, x, table, made)
    indices = hj.select(*lax.stop_gradient((q, k, w)), method).indices
    scale, L = attention.config.softmax_scale, attention.config.kv_lora_rank
    absorbed = absorb(made.q_nope, made.q_rope, attention.k_b[...])
    out = hj.sparse_mla(absorbed, made.kv, indices, scale=scale, value_dim=L)
    assert isinstance(out, Array)  # no logsumexp was asked for
    kl = hj.indexer_kl(q, k, w, *_target(attention, made), scale=scale, indices=indices)
    return jnp.einsum("btnl,lnd->btnd", out, attention.v_b[...]), kl


@dataclasses.dataclass(frozen=True)
class _EntryRotation:
    """Turns the rope part of heads, their last features, each entry by its own position."""

    config: Config

    def __call__(self, x: Array, positions: Array) -> Array:
        """x [B, S, N, 1, P + R], positions [B, S, N]."""
        B, S, N = positions.shape
        nope, rope = jnp.split(x, [self.config.qk_nope_head_dim], axis=-1)
        table = rope_table(self.config, positions.reshape(B, S * N))
        turned = rotate(rope.reshape(B, S * N, -1), table, self.config.rope_interleave)
        return jnp.concatenate([nope, turned.reshape(rope.shape)], axis=-1)


def lighthouse(
    attention: Attention, x: Array, table: Table, made: Projections, *, method: hj.Lighthouse
) -> tuple[Array, None]:
    """Attention over the entries of a pyramid that `method` selects a head; the indexer takes no part."""
    turn = None
    if method.rope == "last":
        # Entries are turned when they are pooled, so what is pooled is not: a table of no angle leaves it as it is.
        made = attention.project(x, (jnp.ones_like(table[0]), jnp.zeros_like(table[1])))
        turn = _EntryRotation(attention.config)
    q, k, v = heads_of(attention, made)
    B, T = x.shape[:2]
    name = dense_attention.choose("train", "auto", q, v)
    options = entries.Options(name=name, scale=attention.config.softmax_scale, rotate=turn)
    positions = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32)[None, :], (B, T))
    return entries.attend(q, k, v, hj.lighthouse_select(q, k, method, v=v), positions, method, options), None


def _index_inputs(attention: Attention, x: Array, table: Table, made: Projections) -> tuple[Array, Array, Array]:
    """The indexer learns from its own loss alone: what it reads of the model is detached."""
    assert attention.indexer is not None  # training wants one in each layer
    q, w = attention.indexer.queries(lax.stop_gradient(made.q_latent), lax.stop_gradient(x), table)
    k = attention.indexer.keys(lax.stop_gradient(x), table)
    assert isinstance(k, Array)  # training wants keys that are not quantised
    return q, k, w


def _target(attention: Attention, made: Projections) -> tuple[Array, Array]:
    return lax.stop_gradient((absorb(made.q_nope, made.q_rope, attention.k_b[...]), made.kv))


def forward(stacked: Stacked, tokens: Array, attend: Attend | Sequence[Attend]) -> tuple[Array, Any]:
    """Logits of whole sequences.

    Args:
        stacked: the model, its index keys not quantised.
        tokens: [B, T] int32.
        attend: of the stage: `dense`, `warm_up`, `sparse` or `lighthouse` with a method; one for all layers or one a
            layer.

    Returns: [B, T, V] float32, and what `attend` returned beside its values, stacked by layer: by those that returned
        anything.
    """
    table = rope_table(stacked.config, jnp.arange(tokens.shape[1], dtype=jnp.int32)[None, :])

    x, n = stacked.embed[tokens], stacked.config.num_hidden_layers
    each = [attend] * n if callable(attend) else list(attend)
    if len(each) != n:
        raise ValueError(f"forward: attend is of {len(each)} layers, wanted the model's {n}")
    extras: list[Any] = []
    first = 0
    for same, run in itertools.groupby(each):
        own = slice(first, first + len(list(run)))
        x, extra = lax.scan(_layer(stacked, table, same), x, _layers(stacked, own))
        extras += [] if extra is None else [extra]
        first = own.stop
    extra = jax.tree.map(lambda *parts: jnp.concatenate(parts), *extras) if extras else None
    x = rms_norm(x, stacked.norm, stacked.config.rms_norm_eps)
    head = stacked.embed.T if stacked.head is None else stacked.head
    return jnp.einsum("bte,ev->btv", x, head, preferred_element_type=jnp.float32), extra


def _layers(stacked: Stacked, own: slice) -> nnx.State:
    """Those of a run. All of a model are scanned as they are, without a copy."""
    is_all = own.stop - own.start == stacked.config.num_hidden_layers
    return stacked.layers if is_all else jax.tree.map(lambda x: x[own], stacked.layers)


def _layer(stacked: Stacked, table: Table, attend: Attend) -> Callable[[Array, nnx.State], tuple[Array, Any]]:
    return lambda x, state: layer_forward(nnx.merge(stacked.graph, state), x, table, attend)


def layer_forward(layer: Layer, x: Array, table: Table, attend: Attend) -> tuple[Array, Any]:
    """One layer on hidden states [B, T, E], and what `attend` returned beside its values."""
    eps = layer.config.rms_norm_eps
    normed = rms_norm(x, layer.attention_norm[...], eps)
    out, extra = attend(layer.attention, normed, table, layer.attention.project(normed, table))
    x = x + layer.attention.merge_heads(out)
    normed = rms_norm(x, layer.mlp_norm[...], eps)
    return x + (layer.mlp(normed)[0] if isinstance(layer.mlp, Moe) else layer.mlp(normed)), extra
