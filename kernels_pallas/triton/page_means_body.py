"""Device code of `pool_pages` and `page_scores`: the means of a run of blocks, in registers."""

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from hisa_jax.kernels_pallas.sort_key import FORCED, INVISIBLE, sort_key_of
from hisa_jax.kernels_pallas.triton.scores_body import score
from hisa_jax.kernels_pallas.types import Ref
from hisa_jax.xla.means import mean, split


class Sums(NamedTuple):
    """What pages keep, whole."""

    table: Ref  # [n_blocks * per_block], pages of all requests
    sums: Ref  # [n_pages, D]
    counts: Ref  # [n_pages]


class Queries(NamedTuple):
    """Of one query; in a launch, of all."""

    q: Ref  # [H, D]
    w: Ref  # [H]
    limit: Ref  # [1]
    first_block: Ref  # [1]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """The static numbers of a launch."""

    per_block: int  # pages of a block, a power of two
    n_pages: int
    n_parts: int


def pool_pages_body(refs: Sums, o_ref: Ref, scale_ref: Ref, *, plan: Plan) -> None:
    # One program:   table -> pages of `tile_s` blocks -> their sums [tile_s, D], added page by page -> parts and scale
    #
    # The loads of a page's sums depend on the table alone, so those of all pages of a block can be in flight together.
    # out: [tile_s, parts, D], [tile_s].
    blocks = pl.program_id(0) * o_ref.shape[0] + jnp.arange(o_ref.shape[0], dtype=jnp.int32)
    parts, scale = split(means_of_blocks(refs, blocks, plan.per_block, plan.n_pages), plan.n_parts, o_ref.dtype)
    if scale is not None:
        scale_ref[...] = scale
    for part, rounded in enumerate(parts):
        o_ref[:, part] = rounded


def page_scores_body(
    query: Queries, refs: Sums, o_ref: Ref, *, plan: Plan, tile_s: int, step: int, forced: tuple[int, int]
) -> None:
    # One program, one query:   sums of `tile_s` blocks -> means in registers -> product with the heads -> o[columns]
    #
    # Means are never in device memory. They go through `split` as those that `pool_pages` writes, so both ways give a
    # query the same bits. out: [width].
    column, limit = pl.program_id(0) * tile_s, query.limit[0]
    keep_first, keep_last = forced
    candidate = column + jnp.arange(tile_s, dtype=jnp.int32)

    @pl.when(column < limit)
    def _score():
        means = means_of_blocks(refs, query.first_block[0] + candidate, plan.per_block, plan.n_pages)
        parts, scale = split(means, plan.n_parts, query.q.dtype)
        sort_key = sort_key_of(score(parts, query.q[...], query.w[...], scale))
        sort_key = jnp.where(candidate < keep_first, FORCED, sort_key)
        sort_key = jnp.where(candidate >= limit - keep_last, FORCED, sort_key)
        o_ref[pl.ds(column, tile_s)] = jnp.where(candidate < limit, sort_key, INVISIBLE)

    # The selection reads whole steps of columns: up to the end of the last one they must say that nothing is there.
    @pl.when((column >= limit) & (column < lax.div(limit + (step - 1), jnp.int32(step)) * step))
    def _fill():
        o_ref[pl.ds(column, tile_s)] = jnp.full((tile_s,), INVISIBLE, jnp.int32)


def means_of_blocks(refs: Sums, blocks: Array, per_block: int, n_pages: int) -> Array:
    """[s] blocks -> [s, D] float32; blocks after the table's end get the mean of any pages."""
    columns = jnp.arange(refs.sums.shape[1], dtype=jnp.int32)

    def of_pages(first: int, n: int) -> tuple[Array, Array]:
        """Sum and count of n pages of each block: by pairs, as pages themselves are summed."""
        if n > 1:
            pair = of_pages(first, n // 2), of_pages(first + n // 2, n // 2)
            return pair[0][0] + pair[1][0], pair[0][1] + pair[1][1]
        page_index = jnp.minimum(blocks * per_block + first, refs.table.shape[0] - 1)
        page = jnp.clip(plt.load(refs.table.at[page_index]), 0, n_pages - 1)
        return plt.load(refs.sums.at[page[:, None], columns[None, :]]), plt.load(refs.counts.at[page])

    return mean(*of_pages(0, per_block))
