"""Device code of `flat`: keys stream past a tile of queries, whose images stay in VMEM until all are there."""

import dataclasses
import math

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

from kernels_pallas.image import INVISIBLE
from kernels_pallas.mosaic_tpu import topk_body
from kernels_pallas.mosaic_tpu.config import LANES, ROWS
from kernels_pallas.mosaic_tpu.look_up_body import split_outputs, write_images
from kernels_pallas.mosaic_tpu.tiles import images_of_rows, products, spread_weights, sum_to_sublanes
from kernels_pallas.types import Ref

COLUMNS = 256  # keys a product: a side of the larger matrix unit


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """The static numbers of a launch."""

    topk: int
    tiles: int  # of queries in a sequence
    rows: int  # of eight queries side by side, those that there are: fewer than 8 in decoding
    span: int  # groups of images that the selection looks at in one go
    has_images: bool  # whether those of the chosen are a second output


def flat_body(plan: Plan, furthest_smem: Ref, q_ref: Ref, w_ref: Ref, visible_ref: Ref, k_ref: Ref, *refs: Ref) -> None:
    """On a grid of (sequences, tiles of queries, tiles of keys); the shapes are those of the launch."""
    *rest, images_vmem, w_vmem, partial_vmem, cuts_vmem, table_vmem = refs
    scale_ref, (o_ref, *images_refs) = split_outputs(tuple(rest), plan.has_images)
    b, t, s = (pl.program_id(axis) for axis in range(3))
    tile_s = k_ref.shape[0]
    furthest = furthest_smem[b * plan.tiles + t]  # of the tile's queries
    n_steps = pl.cdiv(furthest, tile_s)

    @pl.when(s == 0)
    def _start():
        spread_weights(w_ref, w_vmem)

    @pl.when(s < n_steps)
    def _score():
        score_keys(plan.rows, s, q_ref, k_ref, scale_ref, visible_ref, images_vmem, w_vmem, partial_vmem)

    @pl.when(s == jnp.maximum(n_steps - 1, 0))
    def _select():
        groups = pl.cdiv(n_steps * tile_s, plan.span * LANES) * plan.span
        empty = jnp.full((images_vmem.shape[0], ROWS, LANES), INVISIBLE, jnp.int32)

        def fill(group: Array, _: None) -> None:
            images_vmem[:, pl.ds(pl.multiple_of(group * ROWS, ROWS), ROWS)] = empty

        lax.fori_loop(n_steps * tile_s // LANES, groups, fill, None)
        n = jnp.broadcast_to(visible_ref[...].reshape(-1, ROWS, 1), cuts_vmem.shape)
        topk_body.select(images_vmem, n, plan.topk, cuts_vmem, table_vmem, o_ref, groups)
        for images_ref in images_refs:
            write_images(images_vmem, o_ref, images_ref, groups)


def products_a_step(tile_t: int, tile_s: int) -> int:
    """Products of a step of the scoring loop; each takes [tile_t * 16, 128] of the partial sums' scratch."""
    return math.gcd(max(1, 32 // tile_t), tile_s // COLUMNS)


def score_keys(
    n_rows: int,
    s: Array,
    q_ref: Ref,
    k_ref: Ref,
    scale_ref: tuple[Ref, ...],
    visible_ref: Ref,
    images_vmem: Ref,
    w_vmem: Ref,
    partial_vmem: Ref,
) -> None:
    """Images of all queries of the tile for the keys of step s.

    Args:
        q_ref: [tile_t, H, D]; k_ref: [tile_s, D]; scale_ref: none or one, [1, tile_s]; visible_ref: [tile_t, 1].
        images_vmem: [tile_t // 8, G * 8, 128]; w_vmem: [tile_t, H, 128]; partial_vmem: see `products_a_step`.
    """
    tile_t, H, D = q_ref.shape
    tile_s = k_ref.shape[0]
    per_step = products_a_step(tile_t, tile_s)
    lane = lax.broadcasted_iota(jnp.int32, (ROWS, LANES), 1)
    visible = [jnp.broadcast_to(visible_ref[pl.ds(t, ROWS)], (ROWS, LANES)) for t in range(0, tile_t, ROWS)]

    def one_step(i: Array, _: None) -> None:
        # Few queries are few rows a product: then more products a step, so that one's keys are loaded under another.
        for product in range(per_step):
            first = pl.multiple_of((i * per_step + product) * COLUMNS, COLUMNS)
            at = product * COLUMNS // LANES
            keys = k_ref[pl.ds(first, COLUMNS)]
            scales = [ref[:, pl.ds(first, COLUMNS)] for ref in scale_ref]
            # Eight queries a product: the keys stay in the matrix unit while their rows pass.
            for t in range(0, tile_t, ROWS):
                x = products(q_ref[pl.ds(t, n_rows)].reshape(n_rows * H, D), keys)
                for r in range(n_rows):
                    for c in range(COLUMNS // LANES):
                        some = slice(c * LANES, (c + 1) * LANES)
                        rows = sum_to_sublanes(x[r * H : (r + 1) * H, some], w_vmem[t + r])
                        for scale in scales:
                            rows = rows * scale[:, some]
                        partial_vmem[pl.ds(((at + c) * tile_t + t + r) * ROWS, ROWS)] = rows
        for t in range(0, tile_t, ROWS):
            for c in range(per_step * COLUMNS // LANES):
                image = images_of_rows(partial_vmem, (c * tile_t + t) * ROWS)
                first = s * tile_s + i * per_step * COLUMNS + c * LANES
                image = jnp.where(first + lane < visible[t // ROWS], image, INVISIBLE)
                images_vmem[t // ROWS, pl.ds(pl.multiple_of(first // LANES * ROWS, ROWS), ROWS)] = image

    lax.fori_loop(0, tile_s // (per_step * COLUMNS), one_step, None)
