"""Device code of `pool_scores`: one block a program."""

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

from hisa_jax.kernels_pallas.sort_key import FORCED, INVISIBLE, sort_key_of
from hisa_jax.kernels_pallas.triton.kept_means_body import wide
from hisa_jax.kernels_pallas.triton.pool_body import mean_of_block
from hisa_jax.kernels_pallas.types import Ref
from hisa_jax.xla.means import split

_COPIES = 16  # of a mean: the fewest columns of a product


class Inputs(NamedTuple):
    """Arrays in device memory, whole."""

    q: Ref  # [T, H, D]
    w: Ref  # [T, H]
    limit: Ref  # [T]
    tiles: Ref  # [n_tiles, 4]
    k: Ref  # [S, D]
    k_scale: Ref | None  # [S]
    counts: Ref  # [S // block_size]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """The static numbers of a launch."""

    block_size: int
    step: int  # a reader of the result takes so many columns at a time
    n_parts: int
    keep_first: int
    keep_last: int


def pool_scores_body(refs: Inputs, o_ref: Ref, *, plan: Plan) -> None:
    # One program, one block:   tiles of rows -> mean -> parts, each copied 16 times -> query after query: product with
    #                           the heads [H, 16] -> their sum -> o[t, block]
    #
    # Keys are read once for all queries of a tile, and means are never in device memory. They have the bits of those of
    # `pool`. Few queries leave the tensor core idle, so 16 columns for one cost nothing.
    tile, column = pl.program_id(0), pl.program_id(1)
    first_query, n_queries, first_block, most = (refs.tiles[tile, field] for field in range(4))
    step = jnp.int32(plan.step)

    @pl.when(column < most)
    def _score():
        block = first_block + column
        mean = mean_of_block(refs.k, refs.k_scale, refs.counts[block], block * plan.block_size, plan.block_size)
        parts, scale = split(mean, plan.n_parts, refs.q.dtype)
        parts = [jnp.broadcast_to(wide(part)[None, :], (_COPIES, part.shape[0])) for part in parts]

        def one_query(i: Array, _: None) -> None:
            t = first_query + i
            limit = refs.limit[t]
            score = _score_of(parts, wide(refs.q[t]), refs.w[t])
            # All copies have the same score.
            sort_key = jnp.max(sort_key_of(score if scale is None else score * scale))
            is_forced = (column < plan.keep_first) | (column >= limit - plan.keep_last)
            o_ref[t, column] = jnp.where(column < limit, jnp.where(is_forced, FORCED, sort_key), INVISIBLE)

        lax.fori_loop(0, n_queries, one_query, None)

    # The selection reads whole steps of columns: up to the end of the last one they must say that nothing is there.
    @pl.when((column >= most) & (column < lax.div(most + (step - 1), step) * step))
    def _fill():
        def one_query(i: Array, _: None) -> None:
            o_ref[first_query + i, column] = jnp.int32(INVISIBLE)

        lax.fori_loop(0, n_queries, one_query, None)


def _score_of(parts: list[Array], heads: Array, w: Array) -> Array:
    """[n, D] parts, [H, D], [H] -> [n] float32."""
    contract_last = (((1,), (1,)), ((), ()))
    products = sum(lax.dot_general(heads, part, contract_last, preferred_element_type=jnp.float32) for part in parts)
    # A select, not a maximum, which Triton lowers to one that drops NaN.
    return jnp.sum(jnp.where(products < 0.0, 0.0, products) * w[:, None], axis=0)
