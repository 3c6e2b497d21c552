"""Device code of `sparse_mla`: some heads of one query and a part of its tokens a program."""

import math

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from hisa_jax.kernels_pallas.types import Ref

_LOG2_E = math.log2(math.e)
_CONTRACT_LAST = (((1,), (1,)), ((), ()))
_LEAST = -1e30  # a finite stand-in for -inf, so that differences of maxima stay numbers


def sparse_mla_body(
    q_ref: Ref,
    kv_ref: Ref,
    indices_ref: Ref,
    o_ref: Ref,
    lse_ref: Ref,
    *,
    queries: int,
    keys: int,
    scale: float,
    tile_s: int,
    value_dim: int,
) -> None:
    # in: [tile_n, E], [B * S, E], [K / splits]; out: [tile_n, V], [tile_n]
    rest_dim = q_ref.shape[1] - value_dim
    first_row = pl.program_id(0) // queries * keys
    q_value, q_rest = q_ref[:, pl.ds(0, value_dim)], q_ref[:, pl.ds(value_dim, rest_dim)]
    value_columns = jnp.arange(value_dim, dtype=jnp.int32)
    rest_columns = value_dim + jnp.arange(rest_dim, dtype=jnp.int32)

    def one_tile(i, carry):
        o, highest, total = carry
        position = indices_ref[pl.ds(i * tile_s, tile_s)]
        there = (position >= 0) & (position < keys)
        rows = (first_row + jnp.where(there, position, 0))[:, None]
        # Zeros and not some row for an entry that is none: a probability of 0 would not hide a NaN there.
        value, rest = (
            plt.load(kv_ref.at[rows, columns[None, :]], mask=there[:, None], other=0)
            for columns in (value_columns, rest_columns)
        )
        logits = lax.dot_general(q_value, value, _CONTRACT_LAST, preferred_element_type=jnp.float32)
        logits += lax.dot_general(q_rest, rest, _CONTRACT_LAST, preferred_element_type=jnp.float32)
        logits = jnp.where(there[None, :], logits * (scale * _LOG2_E), _LEAST)
        new_highest = jnp.maximum(highest, jnp.max(logits, axis=1))
        p = jnp.where(there[None, :], jnp.exp2(logits - new_highest[:, None]), 0.0)
        decay = jnp.exp2(highest - new_highest)
        o = o * decay[:, None] + lax.dot(p.astype(value.dtype), value, preferred_element_type=jnp.float32)
        return o, new_highest, total * decay + jnp.sum(p, axis=1)

    tile_n = q_ref.shape[0]
    start = (
        jnp.zeros((tile_n, value_dim), jnp.float32),
        jnp.full((tile_n,), _LEAST, jnp.float32),
        jnp.zeros((tile_n,), jnp.float32),
    )
    o, highest, total = lax.fori_loop(0, indices_ref.shape[0] // tile_s, one_tile, start)
    some = jnp.where(total == 0.0, 1.0, total)  # NaN, of a chosen token, stays
    o_ref[...] = (o / some[:, None]).astype(o_ref.dtype)
    lse_ref[...] = jnp.where(total == 0.0, -jnp.inf, (highest + jnp.log2(some)) / _LOG2_E)
