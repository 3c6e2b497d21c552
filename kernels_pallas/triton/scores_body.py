"""Device code of `scores` and what `refine` shares with it."""

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from hisa_jax.kernels_pallas.sort_key import FORCED, INVISIBLE, sort_key_of
from hisa_jax.kernels_pallas.types import Ref


def scores_body(
    q_ref: Ref,
    w_ref: Ref,
    limit_ref: Ref,
    tiles_ref: Ref,
    first_column_ref: Ref,
    k_ref: Ref,
    *refs: Ref,
    tile_s: int,
    n_parts: int,
    page_size: int | None,
    keep_first: int,
    keep_last: int,
) -> None:
    # in: [T, H, D], [T, H], [T], [n_tiles, 4], [1], [S, parts, D], maybe a page table, maybe [S]; out: [T, width]
    *scale_ref, o_ref = refs
    table_ref: Ref = scale_ref.pop(0) if page_size else None
    tile = pl.program_id(0)
    column = pl.program_id(1) * tile_s
    first_query, n_queries, first_row, most = (tiles_ref[tile, field] for field in range(4))
    first = first_column_ref[0] + column
    candidate = first + jnp.arange(tile_s, dtype=jnp.int32)
    row = first_row + candidate
    there = row < k_ref.shape[0]
    if page_size:
        place = jnp.minimum(lax.div(row, jnp.int32(page_size)), table_ref.shape[0] - 1)
        row = plt.load(table_ref.at[place]) * page_size + lax.rem(row, jnp.int32(page_size))
        there = (row >= 0) & (row < k_ref.shape[0])
    row = jnp.where(there, row, 0)
    parts = [load_keys(k_ref, part, row, there) for part in range(n_parts)]
    scale = plt.load(scale_ref[0].at[row], mask=there, other=0.0) if scale_ref else None

    def one_query(i, _):
        t = first_query + i
        limit = limit_ref[t]

        @pl.when(first < limit)
        def _score():
            sort_key = sort_key_of(score(parts, q_ref[t], w_ref[t], scale))
            if keep_first or keep_last:
                sort_key = jnp.where(candidate < keep_first, FORCED, sort_key)
                sort_key = jnp.where(candidate >= limit - keep_last, FORCED, sort_key)
            o_ref[t, pl.ds(column, tile_s)] = jnp.where(candidate < limit, sort_key, INVISIBLE)

        return _

    lax.fori_loop(0, jnp.where(first < most, n_queries, 0), one_query, None)


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
