"""Device code of `sparse_attention`: some heads of one group of one query, and a part of its list, a program."""

import dataclasses
import math
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from hisa_jax.kernels_pallas.types import Ref

_LOG2_E = math.log2(math.e)
_CONTRACT_LAST = (((1,), (1,)), ((), ()))
_LEAST = -1e30  # a finite stand-in for -inf, so that differences of maxima stay numbers


class Inputs(NamedTuple):
    """Some heads of a query, a part of its list, and all keys and values of their group."""

    q: Ref  # [tile_n, D]
    k: Ref  # [B * S, D]
    v: Ref  # [B * S, V]
    ids: Ref  # [K / splits]
    last: Ref  # [2], the block that is open, and how many of its tokens count


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """The static numbers of a launch."""

    queries: int  # of a sequence
    keys: int  # of a sequence
    scale: float
    tile_s: int
    block_size: int


def sparse_attention_body(refs: Inputs, o_ref: Ref, lse_ref: Ref, *, plan: Plan) -> None:
    # One program:   a tile of the list -> rows of k and v -> logits [tile_n, tile_s] -> o, highest, total
    #
    # The softmax is online: `highest` and `total` are a head's maximum and sum so far, and `o` shrinks by `decay` when
    # the maximum moves. Logits are to base two, which is what the hardware's exponential takes. `num_stages` of the
    # launch lets Triton load the next tile meanwhile. out: [tile_n, V], [tile_n].
    tile_n, V = refs.q.shape[0], o_ref.shape[1]
    first_row = pl.program_id(0) // plan.queries * plan.keys
    q, last, count = refs.q[...], refs.last[0], refs.last[1]
    tiles_a_block = max(plan.block_size // plan.tile_s, 1)

    def tokens_of(i: Array) -> tuple[Array, Array]:
        """Tile i: its tokens, and which of them count."""
        offset = jnp.arange(plan.tile_s, dtype=jnp.int32)
        if plan.block_size == 1:
            token = refs.ids[pl.ds(i * plan.tile_s, plan.tile_s)]
            return token, token >= 0
        block = refs.ids[lax.div(i, jnp.int32(tiles_a_block))]
        offset += lax.rem(i, jnp.int32(tiles_a_block)) * plan.tile_s
        return block * plan.block_size + offset, (block >= 0) & (offset < jnp.where(block == last, count, plan.keys))

    def load(ref: Ref, rows: Array, there: Array) -> Array:
        """Zeros and not some row for what does not count: a probability of 0 would not hide a NaN there."""
        columns = jnp.arange(ref.shape[1], dtype=jnp.int32)
        at: Any = ref.at[rows[:, None], columns[None, :]]
        return plt.load(at, mask=there[:, None], other=0)

    def one_tile(i: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        o, highest, total = carry
        tokens, there = tokens_of(i)
        rows = first_row + tokens
        keys, values = load(refs.k, rows, there), load(refs.v, rows, there)
        logits = lax.dot_general(q, keys, _CONTRACT_LAST, preferred_element_type=jnp.float32)
        logits = jnp.where(there[None, :], logits * (plan.scale * _LOG2_E), _LEAST)
        new_highest = jnp.maximum(highest, jnp.max(logits, axis=1))
        p = jnp.where(there[None, :], jnp.exp2(logits - new_highest[:, None]), 0.0)
        decay = jnp.exp2(highest - new_highest)
        o = o * decay[:, None] + lax.dot(p.astype(values.dtype), values, preferred_element_type=jnp.float32)
        return o, new_highest, total * decay + jnp.sum(p, axis=1)

    n_tiles = refs.ids.shape[0] * tiles_a_block if plan.block_size > 1 else refs.ids.shape[0] // plan.tile_s
    start = (
        jnp.zeros((tile_n, V), jnp.float32),
        jnp.full((tile_n,), _LEAST, jnp.float32),
        jnp.zeros((tile_n,), jnp.float32),
    )
    o, highest, total = lax.fori_loop(0, n_tiles, one_tile, start)
    some = jnp.where(total == 0.0, 1.0, total)  # NaN, of a listed token, stays
    o_ref[...] = (o / some[:, None]).astype(o_ref.dtype)
    lse_ref[...] = jnp.where(total == 0.0, -jnp.inf, (highest + jnp.log2(some)) / _LOG2_E)
