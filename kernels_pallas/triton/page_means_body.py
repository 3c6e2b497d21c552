"""Device code of `pool_pages` and `page_scores`: the means of a run of blocks, in registers."""

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from hisa_jax.kernels_pallas.sort_key import FORCED, INVISIBLE, sort_key_of
from hisa_jax.kernels_pallas.triton.pool_body import mean, split
from hisa_jax.kernels_pallas.triton.scores_body import score
from hisa_jax.kernels_pallas.types import Ref


def pool_pages_body(
    table_ref: Ref,
    sums_ref: Ref,
    counts_ref: Ref,
    o_ref: Ref,
    scale_ref: Ref,
    *,
    per_block: int,
    n_pages: int,
    n_parts: int,
) -> None:
    # in: [n * per_block], [n_pages, D], [n_pages]; out: [tile_s, parts, D], [tile_s]
    blocks = pl.program_id(0) * o_ref.shape[0] + jnp.arange(o_ref.shape[0], dtype=jnp.int32)
    parts, scale = split(_means(table_ref, sums_ref, counts_ref, blocks, per_block, n_pages), n_parts, o_ref.dtype)
    if scale is not None:
        scale_ref[...] = scale
    for part, rounded in enumerate(parts):
        o_ref[:, part] = rounded


def page_scores_body(
    q_ref: Ref,
    w_ref: Ref,
    limit_ref: Ref,
    first_block_ref: Ref,
    table_ref: Ref,
    sums_ref: Ref,
    counts_ref: Ref,
    o_ref: Ref,
    *,
    per_block: int,
    n_pages: int,
    n_parts: int,
    tile_s: int,
    step: int,
    keep_first: int,
    keep_last: int,
) -> None:
    # in: [H, D], [H], [1], [1], [n * per_block], [n_pages, D], [n_pages]; out: [width]
    column, limit = pl.program_id(0) * tile_s, limit_ref[0]
    candidate = column + jnp.arange(tile_s, dtype=jnp.int32)

    @pl.when(column < limit)
    def _score():
        means = _means(table_ref, sums_ref, counts_ref, first_block_ref[0] + candidate, per_block, n_pages)
        parts, scale = split(means, n_parts, q_ref.dtype)
        sort_key = sort_key_of(score(parts, q_ref[...], w_ref[...], scale))
        sort_key = jnp.where(candidate < keep_first, FORCED, sort_key)
        sort_key = jnp.where(candidate >= limit - keep_last, FORCED, sort_key)
        o_ref[pl.ds(column, tile_s)] = jnp.where(candidate < limit, sort_key, INVISIBLE)

    @pl.when((column >= limit) & (column < lax.div(limit + (step - 1), jnp.int32(step)) * step))
    def _fill():
        o_ref[pl.ds(column, tile_s)] = jnp.full((tile_s,), INVISIBLE, jnp.int32)


def _means(table_ref: Ref, sums_ref: Ref, counts_ref: Ref, blocks: Array, per_block: int, n_pages: int) -> Array:
    """[s] blocks -> [s, D] float32; what lies behind the table is the mean of anything."""
    columns = jnp.arange(sums_ref.shape[1], dtype=jnp.int32)

    def of_pages(first: int, n: int) -> tuple[Array, Array]:
        """Sum and count of n pages of each block: by pairs, as pages themselves are summed."""
        if n > 1:
            pair = of_pages(first, n // 2), of_pages(first + n // 2, n // 2)
            return pair[0][0] + pair[1][0], pair[0][1] + pair[1][1]
        place = jnp.minimum(blocks * per_block + first, table_ref.shape[0] - 1)
        page = jnp.clip(plt.load(table_ref.at[place]), 0, n_pages - 1)
        return plt.load(sums_ref.at[page[:, None], columns[None, :]]), plt.load(counts_ref.at[page])

    return mean(*of_pages(0, per_block))
