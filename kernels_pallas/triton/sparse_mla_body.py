"""Device code of `sparse_mla`: some heads of one query and a part of its tokens a program."""

import dataclasses
import math
from typing import Any, NamedTuple, cast

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from hisa_jax.kernels_pallas.types import Ref
from hisa_jax.latents import QuantizedLatents

_LOG2_E = math.log2(math.e)
_CONTRACT_LAST = (((1,), (1,)), ((), ()))
_LEAST = -1e30  # a finite stand-in for -inf, so that differences of maxima stay numbers


class Inputs(NamedTuple):
    """Some heads of a query, a part of its list, and all keys."""

    q: Ref  # [tile_n, E]
    kv: Ref | QuantizedLatents  # [B * S, E], or refs of its parts
    indices: Ref  # [K / splits]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """The static numbers of a launch."""

    queries: int  # of a sequence
    keys: int  # of a sequence
    scale: float
    tile_s: int
    value_dim: int


def sparse_mla_body(refs: Inputs, o_ref: Ref, lse_ref: Ref, *, plan: Plan) -> None:
    # One program:   indices [tile_s] -> rows of kv by pointer -> logits [tile_n, tile_s] -> o, highest, total
    #
    # The softmax is online: `highest` and `total` are a head's maximum and sum so far, and what is in `o` shrinks by
    # `decay` when the maximum moves. Logits are to base two, which is what the hardware's exponential takes. Keys come
    # in pieces, since Triton's sizes are powers of two: values, in 8 bits the groups of those that share a scale, and
    # the rest. `num_stages` of the launch lets Triton load the next tile meanwhile. out: [tile_n, V], [tile_n].
    tile_s, value_dim = plan.tile_s, plan.value_dim
    rest_dim = refs.q.shape[1] - value_dim
    first_row = pl.program_id(0) // plan.queries * plan.keys
    n_pieces = refs.kv.scales.shape[1] if isinstance(refs.kv, QuantizedLatents) else 1
    width = value_dim // n_pieces
    columns = [pl.ds(piece * width, width) for piece in range(n_pieces)]
    q_values, q_rest = [refs.q[:, at] for at in columns], refs.q[:, pl.ds(value_dim, rest_dim)]

    def one_tile(i, carry):
        o, highest, total = carry
        position = refs.indices[pl.ds(i * tile_s, tile_s)]
        there = (position >= 0) & (position < plan.keys)
        rows = first_row + jnp.where(there, position, 0)
        values, rest = load_rows(refs.kv, rows, there, (width, rest_dim), n_pieces)
        logits = jnp.zeros((tile_n, tile_s), jnp.float32)
        for q, key in zip((*q_values, q_rest), (*values, rest), strict=True):
            logits += lax.dot_general(q, key, _CONTRACT_LAST, preferred_element_type=jnp.float32)
        logits = jnp.where(there[None, :], logits * (plan.scale * _LOG2_E), _LEAST)
        new_highest = jnp.maximum(highest, jnp.max(logits, axis=1))
        p = jnp.where(there[None, :], jnp.exp2(logits - new_highest[:, None]), 0.0)
        decay = jnp.exp2(highest - new_highest)
        o = tuple(
            part * decay[:, None] + lax.dot(p.astype(value.dtype), value, preferred_element_type=jnp.float32)
            for part, value in zip(o, values, strict=True)
        )
        return o, new_highest, total * decay + jnp.sum(p, axis=1)

    tile_n = refs.q.shape[0]
    start = (
        tuple(jnp.zeros((tile_n, width), jnp.float32) for _ in columns),
        jnp.full((tile_n,), _LEAST, jnp.float32),
        jnp.zeros((tile_n,), jnp.float32),
    )
    o, highest, total = lax.fori_loop(0, refs.indices.shape[0] // tile_s, one_tile, start)
    some = jnp.where(total == 0.0, 1.0, total)  # NaN, of a chosen token, stays
    for at, part in zip(columns, o, strict=True):
        o_ref[:, at] = (part / some[:, None]).astype(o_ref.dtype)
    lse_ref[...] = jnp.where(total == 0.0, -jnp.inf, (highest + jnp.log2(some)) / _LOG2_E)


def load_rows(
    kv: Ref | QuantizedLatents, rows: Array, there: Array, dims: tuple[int, int], n_pieces: int
) -> tuple[list[Array], Array]:
    """Rows [tile_s] of the keys: values in pieces, and the rest. In 8 bits values times their scales, in bfloat16.

    Zeros and not some row for an entry that is none: a probability of 0 would not hide a NaN there.
    """

    def load(ref: Ref, n: int, first: int = 0, other: float | None = 0) -> Array:
        columns = first + jnp.arange(n, dtype=jnp.int32)
        return plt.load(ref.at[rows[:, None], columns[None, :]], mask=there[:, None], other=other)

    width, rest_dim = dims
    if not isinstance(kv, QuantizedLatents):
        return [load(kv, width)], load(kv, rest_dim, width)

    def piece(i: int) -> Array:
        scale = plt.load(cast(Any, kv.scales).at[rows, i], mask=there, other=0)
        value = load(kv.values, width, i * width, other=None).astype(jnp.float32) * scale[:, None]
        return jnp.where(there[:, None], value, 0).astype(kv.rope.dtype)

    return [piece(i) for i in range(n_pieces)], load(kv.rope, rest_dim)
