"""Device code of `refine`: some blocks of one query a program."""

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from hisa_jax.kernels_pallas.sort_key import INVISIBLE, sort_key_of
from hisa_jax.kernels_pallas.triton.scores_body import score
from hisa_jax.kernels_pallas.types import Ref


class Inputs(NamedTuple):
    """A query's rows of most arrays; keys and scales whole."""

    q: Ref  # [H, D]
    w: Ref  # [H]
    block_ids: Ref  # [m]
    visible: Ref  # [1]
    first_block: Ref | None  # [1], for keys that are not in pages
    pages: Ref | None  # [m * block_size / page_size], the pages of the kept blocks
    k: Ref  # [S, D]
    k_scale: Ref | None  # [S]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """The static numbers of a launch."""

    block_size: int
    page_size: int | None
    tile_s: int  # keys at a time: a whole fraction of a block, and of a page
    tile_m: int  # blocks a program


def refine_body(refs: Inputs, o_ref: Ref, *, plan: Plan) -> None:
    # One program:   heads [H, D] in registers   x   tile after tile of its `tile_m` blocks   ->   o[columns]
    #
    # The heads stay, keys stream. `num_stages` of the launch lets Triton load later tiles while one is multiplied.
    # Every column of the result is written once, by this program alone.
    m, tile_s, page_size = refs.block_ids.shape[0], plan.tile_s, plan.page_size
    per_block = plan.block_size // tile_s
    q, w, visible = refs.q[...], refs.w[...], refs.visible[0]
    first = pl.program_id(1) * plan.tile_m
    inside = jnp.arange(tile_s, dtype=jnp.int32)

    def one_tile(i, _):
        j = first + lax.div(i, jnp.int32(per_block))
        offset = lax.rem(i, jnp.int32(per_block)) * tile_s
        block_id = refs.block_ids[j]
        # Without a block the first keys are read and nothing of them is visible.
        if page_size is None:
            assert refs.first_block is not None
            start = (refs.first_block[0] + jnp.maximum(block_id, 0)) * plan.block_size + offset
        else:
            assert refs.pages is not None
            column = j * plan.block_size + offset
            start = refs.pages[lax.div(column, jnp.int32(page_size))] * page_size
            start = start + lax.rem(column, jnp.int32(page_size))
        rows = pl.ds(start, tile_s)
        x = score([refs.k[rows, :]], q, w, None if refs.k_scale is None else refs.k_scale[rows])
        # From `visible` on a position is beyond what the query sees, so a missing block needs no case of its own.
        position = jnp.where(block_id < 0, visible, block_id * plan.block_size) + offset + inside
        o_ref[pl.ds(j * plan.block_size + offset, tile_s)] = jnp.where(position < visible, sort_key_of(x), INVISIBLE)
        return _

    lax.fori_loop(0, jnp.minimum(plan.tile_m, m - first) * per_block, one_tile, None)
