"""Device code of `refine`: some blocks of one query a program."""

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from hisa_jax.kernels_pallas.sort_key import INVISIBLE, sort_key_of
from hisa_jax.kernels_pallas.triton.scores_body import score
from hisa_jax.kernels_pallas.types import Ref


def refine_body(
    q_ref: Ref,
    w_ref: Ref,
    block_ids_ref: Ref,
    visible_ref: Ref,
    places_ref: Ref,
    k_ref: Ref,
    *refs: Ref,
    block_size: int,
    page_size: int | None,
    tile_s: int,
    tile_m: int,
) -> None:
    # in: [H, D], [H], [m], [1], [1] first block or [m * block_size / page_size] pages, [S, D], maybe [S]
    *scale_ref, o_ref = refs  # out: [m * block_size]
    m, per_block = block_ids_ref.shape[0], block_size // tile_s
    q, w, visible = q_ref[...], w_ref[...], visible_ref[0]
    first = pl.program_id(1) * tile_m
    inside = jnp.arange(tile_s, dtype=jnp.int32)

    def one_tile(i, _):
        j = first + lax.div(i, jnp.int32(per_block))
        offset = lax.rem(i, jnp.int32(per_block)) * tile_s
        block_id = block_ids_ref[j]
        # Without a block the first keys are read and nothing of them is visible.
        if page_size is None:
            start = (places_ref[0] + jnp.maximum(block_id, 0)) * block_size + offset
        else:
            column = j * block_size + offset
            start = places_ref[lax.div(column, jnp.int32(page_size))] * page_size
            start = start + lax.rem(column, jnp.int32(page_size))
        rows = pl.ds(start, tile_s)
        x = score([k_ref[rows, :]], q, w, scale_ref[0][rows] if scale_ref else None)
        position = jnp.where(block_id < 0, visible, block_id * block_size) + offset + inside
        o_ref[pl.ds(j * block_size + offset, tile_s)] = jnp.where(position < visible, sort_key_of(x), INVISIBLE)
        return _

    lax.fori_loop(0, jnp.minimum(tile_m, m - first) * per_block, one_tile, None)
