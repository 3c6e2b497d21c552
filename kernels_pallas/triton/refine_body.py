"""Device code of `refine`: some blocks of one query a program."""

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from kernels_pallas.image import INVISIBLE, image_of
from kernels_pallas.triton.scores_body import score
from kernels_pallas.types import Ref


def refine_body(
    q_ref: Ref,
    w_ref: Ref,
    block_ids_ref: Ref,
    visible_ref: Ref,
    first_block_ref: Ref,
    k_ref: Ref,
    *refs: Ref,
    block_size: int,
    tile_s: int,
    tile_m: int,
) -> None:
    *scale_ref, o_ref = refs  # in: [H, D], [H], [m], [1], [1], [S, D], maybe [S]; out: [m * block_size]
    m, per_block = block_ids_ref.shape[0], block_size // tile_s
    q, w, visible, first_block = q_ref[...], w_ref[...], visible_ref[0], first_block_ref[0]
    first = pl.program_id(1) * tile_m
    inside = jnp.arange(tile_s, dtype=jnp.int32)

    def one_tile(i, _):
        j = first + lax.div(i, jnp.int32(per_block))
        offset = lax.rem(i, jnp.int32(per_block)) * tile_s
        block_id = block_ids_ref[j]
        # Without a block the first keys are read and nothing of them is visible.
        rows = pl.ds((first_block + jnp.maximum(block_id, 0)) * block_size + offset, tile_s)
        x = score([k_ref[rows, :]], q, w, scale_ref[0][rows] if scale_ref else None)
        position = jnp.where(block_id < 0, visible, block_id * block_size) + offset + inside
        o_ref[pl.ds(j * block_size + offset, tile_s)] = jnp.where(position < visible, image_of(x), INVISIBLE)
        return _

    lax.fori_loop(0, jnp.minimum(tile_m, m - first) * per_block, one_tile, None)
