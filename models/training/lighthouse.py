"""Lighthouse in a training forward: the attention of a layer in place of `forward.dense`."""

import dataclasses

import jax.numpy as jnp
from jax import Array

import hisa_jax as hj
from hisa_jax.lighthouse import dense
from hisa_jax.lighthouse import forward as entries
from hisa_jax.models.config import Config
from hisa_jax.models.dsa import Attention, Projections, Table
from hisa_jax.models.rope import rope_table, rotate
from hisa_jax.models.training.forward import heads_of


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
    name = dense.choose("train", "auto", q, v)
    options = entries.Options(name=name, scale=attention.config.softmax_scale, rotate=turn)
    positions = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32)[None, :], (B, T))
    return entries.attend(q, k, v, hj.lighthouse_select(q, k, method, v=v), positions, method, options), None
