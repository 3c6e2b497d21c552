"""Device code of `scores` and what `refine` shares with it."""

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from hisa_jax.kernels_pallas.sort_key import FORCED, INVISIBLE, sort_key_of
from hisa_jax.kernels_pallas.types import Ref


class Inputs(NamedTuple):
    """Arrays in device memory, whole."""

    q: Ref  # [T, H, D]
    w: Ref  # [T, H]
    limit: Ref  # [T]
    tiles: Ref  # [n_tiles, 4]
    first_column: Ref  # [1]
    k: Ref  # [S, parts, D]
    table: Ref | None  # [n], for keys in pages
    k_scale: Ref | None  # [S]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """The static numbers of a launch."""

    tile_s: int
    n_parts: int
    page_size: int | None  # None: one sequence after the other
    keep_first: int
    keep_last: int


def scores_body(refs: Inputs, o_ref: Ref, *, plan: Plan) -> None:
    # One program:   keys [tile_s, D] in registers   x   query after query of a tile   ->   o[t, columns]
    #
    # The keys and their scales are loaded once, a query's heads [H, D] for each query. All warps of a program share one
    # product [tile_s, H]; its sum over heads is a row of sort keys. No program waits for another.
    tile = pl.program_id(0)
    column = pl.program_id(1) * plan.tile_s
    first_query, n_queries, first_row, most = (refs.tiles[tile, field] for field in range(4))
    first = refs.first_column[0] + column
    candidate = first + jnp.arange(plan.tile_s, dtype=jnp.int32)
    row, there = _rows_of(refs, first_row + candidate, plan.page_size)
    parts = [load_keys(refs.k, part, row, there) for part in range(plan.n_parts)]
    scale = None if refs.k_scale is None else plt.load(refs.k_scale.at[row], mask=there, other=0.0)

    def one_query(i, _):
        t = first_query + i
        limit = refs.limit[t]

        # Queries of a tile see different numbers of keys: one that sees none of these leaves its row as it is.
        @pl.when(first < limit)
        def _score():
            sort_key = sort_key_of(score(parts, refs.q[t], refs.w[t], scale))
            if plan.keep_first or plan.keep_last:
                sort_key = jnp.where(candidate < plan.keep_first, FORCED, sort_key)
                sort_key = jnp.where(candidate >= limit - plan.keep_last, FORCED, sort_key)
            o_ref[t, pl.ds(column, plan.tile_s)] = jnp.where(candidate < limit, sort_key, INVISIBLE)

        return _

    # No query of the tile sees these keys: nothing to do, since a grid is as wide as the longest sequence.
    lax.fori_loop(0, jnp.where(first < most, n_queries, 0), one_query, None)


def _rows_of(refs: Inputs, row: Array, page_size: int | None) -> tuple[Array, Array]:
    """Rows of all sequences -> where they are in k, 0 for one that is not there; and whether it is."""
    there = row < refs.k.shape[0]
    if page_size is not None:
        assert refs.table is not None
        page_index = jnp.minimum(lax.div(row, jnp.int32(page_size)), refs.table.shape[0] - 1)
        row = plt.load(refs.table.at[page_index]) * page_size + lax.rem(row, jnp.int32(page_size))
        # A table may name any page: one that does not exist has no keys.
        there = (row >= 0) & (row < refs.k.shape[0])
    return jnp.where(there, row, 0), there


def load_keys(k_ref: Ref, part: int, rows: Array, there: Array) -> Array:
    """Rows of one part of [S, parts, D], zeros where they are not `there`."""
    columns = jnp.arange(k_ref.shape[2], dtype=jnp.int32)
    mask = jnp.broadcast_to(there[:, None], (rows.shape[0], columns.shape[0]))
    return plt.load(k_ref.at[rows[:, None], part, columns[None, :]], mask=mask, other=0.0)


def score(parts: list[Array], q: Array, w: Array, scale: Array | None) -> Array:
    """[s, D] parts, [H, D], [H], [s] -> [s] float32."""
    contract_last = (((1,), (1,)), ((), ()))
    products = sum(lax.dot_general(k, q, contract_last, preferred_element_type=jnp.float32) for k in parts)
    # A select, not a maximum, which Triton lowers to one that drops NaN. The scale once a key, after the sum.
    total = jnp.sum(jnp.where(products < 0.0, 0.0, products) * w[None, :], axis=1)
    return total if scale is None else total * scale
