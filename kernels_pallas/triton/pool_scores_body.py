"""Device code of `pool_scores`: a few blocks a program."""

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from hisa_jax.kernels_pallas.sort_key import FORCED, INVISIBLE, sort_key_of
from hisa_jax.kernels_pallas.triton.pool_body import mean_of_block
from hisa_jax.kernels_pallas.types import Ref
from hisa_jax.xla.means import split

_COLUMNS = 16  # the fewest of a product


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
    n_blocks: int  # a program, a power of two up to 16
    step: int  # a reader of the result takes so many columns at a time
    n_parts: int
    keep_first: int
    keep_last: int


def pool_scores_body(refs: Inputs, o_ref: Ref, *, plan: Plan) -> None:
    # One program, `n_blocks` blocks:   tiles of rows -> mean -> its parts, a row of [16, D] each -> the next block
    #                                   query after query: product with the heads [H, 16] -> their sum -> o[t, blocks]
    #
    # Keys are read once for all queries of a tile, and means are never in device memory. They have the bits of those of
    # `pool`. Programs with fewer blocks than the 16 columns of a product fill up with the last one.
    tile, column = pl.program_id(0), pl.program_id(1) * plan.n_blocks
    first_query, n_queries, first_block, most = (refs.tiles[tile, field] for field in range(4))
    step, lane = jnp.int32(plan.step), jnp.arange(_COLUMNS, dtype=jnp.int32)
    candidate = column + jnp.minimum(lane, plan.n_blocks - 1)

    @pl.when(column < most)
    def _score():
        def one_block(i: Array, means: tuple[Array, ...]) -> tuple[Array, ...]:
            block = first_block + jnp.minimum(column + i, most - 1)
            mean = mean_of_block(refs.k, refs.k_scale, refs.counts[block], block * plan.block_size, plan.block_size)
            parts, scale = split(mean, plan.n_parts, refs.q.dtype)
            *rows, scales = means
            rows = [jnp.where((lane >= i)[:, None], _wide(x)[None, :], y) for x, y in zip(parts, rows, strict=True)]
            return *rows, jnp.where(lane >= i, 1.0 if scale is None else scale, scales)

        D = refs.q.shape[2]
        nothing = [_wide(jnp.zeros((_COLUMNS, D), refs.q.dtype)) for _ in range(plan.n_parts)]
        *parts, scales = lax.fori_loop(0, plan.n_blocks, one_block, (*nothing, jnp.ones((_COLUMNS,), jnp.float32)))

        def one_query(i: Array, _: None) -> None:
            t = first_query + i
            limit = refs.limit[t]
            sort_key = sort_key_of(_score_of(parts, _wide(refs.q[t]), refs.w[t]) * scales)
            is_forced = (candidate < plan.keep_first) | (candidate >= limit - plan.keep_last)
            sort_key = jnp.where(candidate < limit, jnp.where(is_forced, FORCED, sort_key), INVISIBLE)
            plt.store(o_ref.at[t, candidate], sort_key)

        lax.fori_loop(0, n_queries, one_query, None)

    # The selection reads whole steps of columns: up to the end of the last one they must say that nothing is there.
    @pl.when((column >= most) & (column < lax.div(most + (step - 1), step) * step))
    def _fill():
        def one_query(i: Array, _: None) -> None:
            plt.store(o_ref.at[first_query + i, candidate], jnp.full((_COLUMNS,), INVISIBLE, jnp.int32))

        lax.fori_loop(0, n_queries, one_query, None)


def _wide(x: Array) -> Array:
    """e4m3 numbers as float16, which Triton has products for on Hopper's tensor cores."""
    return x if x.dtype == jnp.bfloat16 else x.astype(jnp.float16)


def _score_of(parts: list[Array], heads: Array, w: Array) -> Array:
    """[n, D] parts, [H, D], [H] -> [n] float32."""
    contract_last = (((1,), (1,)), ((), ()))
    products = sum(lax.dot_general(heads, part, contract_last, preferred_element_type=jnp.float32) for part in parts)
    # A select, not a maximum, which Triton lowers to one that drops NaN.
    return jnp.sum(jnp.where(products < 0.0, 0.0, products) * w[:, None], axis=0)
