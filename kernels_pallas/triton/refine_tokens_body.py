"""Device code of `refine_tokens`: some listed tokens of one query a program."""

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from hisa_jax.kernels_pallas.sort_key import sort_key_of
from hisa_jax.kernels_pallas.triton.scan_body import rows_of
from hisa_jax.kernels_pallas.triton.scores_body import score
from hisa_jax.kernels_pallas.types import Ref


class Inputs(NamedTuple):
    """A query's rows of most arrays; keys, table and scales whole."""

    q: Ref  # [H, D]
    w: Ref  # [H]
    tokens: Ref  # [capacity]
    count: Ref  # [1]
    first: Ref  # [1], row of its sequence's first key
    k: Ref  # [S, D]
    table: Ref | None  # [n], for keys in pages
    k_scale: Ref | None  # [S]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """The static numbers of a launch."""

    tile_s: int  # tokens at a time
    n_tiles: int  # tiles a program
    page_size: int | None


def refine_tokens_body(refs: Inputs, o_ref: Ref, *, plan: Plan) -> None:
    # One program:   heads [H, D] in registers   x   tile after tile of listed tokens, row by row   ->   o[columns]
    #
    # Three loads wait for each other (token, page, key); `num_stages` of the launch lets Triton have those of later
    # tiles in flight while one is multiplied. out: [capacity].
    q, w, count, first_row = refs.q[...], refs.w[...], refs.count[0], refs.first[0]
    first = pl.program_id(1) * (plan.n_tiles * plan.tile_s)
    columns = jnp.arange(refs.k.shape[1], dtype=jnp.int32)

    def one_tile(i: Array, _: None) -> None:
        at = first + i * plan.tile_s + jnp.arange(plan.tile_s, dtype=jnp.int32)
        token = jnp.maximum(plt.load(refs.tokens.at[at]), 0)
        rows = rows_of(refs.k, refs.table, first_row + token, plan.page_size)
        k = plt.load(refs.k.at[rows[:, None], columns[None, :]])
        scale = None if refs.k_scale is None else plt.load(refs.k_scale.at[rows])
        plt.store(o_ref.at[at], sort_key_of(score([k], q, w, scale)))

    n = lax.div(jnp.minimum(count, o_ref.shape[0]) - first + (plan.tile_s - 1), jnp.int32(plan.tile_s))
    lax.fori_loop(0, jnp.clip(n, 0, plan.n_tiles), one_tile, None)
