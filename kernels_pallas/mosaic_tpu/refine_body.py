"""Device code of `refine`: eight queries side by side, each with the keys of its own blocks.

A step scores `columns` candidates of each of the eight: one product a query and 256 candidates, all unrolled, so that
the matrix units load the keys of one product while the rows of another pass. The images of a tile of queries stay in
VMEM, where their top-k is found at the end.
"""

import dataclasses

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.image import INVISIBLE
from kernels_pallas.mosaic_tpu import topk_body
from kernels_pallas.mosaic_tpu.config import GROUP, LANES, ROWS
from kernels_pallas.mosaic_tpu.tiles import fill, images_of_rows, products, splat, spread_weights, sum_to_sublanes
from kernels_pallas.types import Ref

_PRODUCT = 256  # candidates a product: a side of the larger matrix unit


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """The static numbers of a launch."""

    tiles: int  # of a sequence, on one core
    topk: int
    block_size: int
    columns: int  # candidates of a query a step

    @property
    def slots(self) -> int:
        """Blocks of a query a step."""
        return self.columns // self.block_size

    @property
    def blocks_per_product(self) -> int:
        return max(1, _PRODUCT // self.block_size)

    @property
    def lanes(self) -> int:
        """Candidates a product."""
        return self.blocks_per_product * self.block_size


def resident_body(
    plan: Plan, n_steps_smem: Ref, n_tokens_smem: Ref, blocks_smem: Ref, blocks_ref: Ref, n_visible_ref: Ref,
    q_ref: Ref, w_ref: Ref, k_hbm: Ref, *refs: Ref, keys_vmem: Ref, sems: Ref, scale_vmem: Ref = None, **scratch: Ref
) -> None:  # fmt: skip
    """Keys of the whole sequence in VMEM, [n, block_size, D], from its first tile on."""
    *scale_hbm, o_ref = refs
    core, b, t = (pl.program_id(axis) for axis in range(3))

    @pl.when(t == 0)
    def _load():
        load_sequence(plan, b, n_tokens_smem[b], k_hbm, scale_hbm, keys_vmem, scale_vmem, sems)

    def keys(row: Array, slot: Array) -> Array:
        return keys_vmem[blocks_smem[row, slot]]

    def scale(row: Array, slot: Array) -> Array:
        return scale_vmem[pl.ds(blocks_smem[row, slot], 1)]

    first = ((b * pl.num_programs(0) + core) * plan.tiles + t) * (q_ref.shape[0] // ROWS)
    sources = keys, scale if scale_hbm else None
    refine_tile(plan, sources, n_steps_smem, first, blocks_ref, n_visible_ref, q_ref, w_ref, o_ref, **scratch)


def load_sequence(
    plan: Plan,
    b: Array,
    n_tokens: Array,
    k_hbm: Ref,
    scale_hbm: list[Ref],
    keys_vmem: Ref,
    scale_vmem: Ref,
    sems: Ref,
) -> None:
    """Brings the blocks of sequence b that hold a token."""
    pairs = [(k_hbm, keys_vmem), *((scale, scale_vmem) for scale in scale_hbm)]
    n_groups = pl.cdiv(n_tokens, GROUP * plan.block_size)

    def copies(i: Array) -> list:
        blocks = pl.ds(pl.multiple_of(i * GROUP, GROUP), GROUP)
        return [
            pltpu.make_async_copy(hbm.at[b, blocks], vmem.at[blocks], sems.at[j]) for j, (hbm, vmem) in enumerate(pairs)
        ]

    def start(i: Array, _: None) -> None:
        for copy in copies(i):
            copy.start()

    def wait(i: Array, _: None) -> None:
        for copy in copies(i):
            copy.wait()

    lax.fori_loop(0, n_groups, start, None)
    lax.fori_loop(0, n_groups, wait, None)


def refine_tile(
    plan: Plan,
    sources: tuple,
    n_steps_smem: Ref,
    first: Array,
    blocks_ref: Ref,
    n_visible_ref: Ref,
    q_ref: Ref,
    w_ref: Ref,
    o_ref: Ref,
    *,
    w_vmem: Ref,
    partial_vmem: Ref,
    images_vmem: Ref,
    cuts_vmem: Ref,
    table_vmem: Ref,
    chosen_vmem: Ref,
) -> None:
    """The best tokens of a tile of queries.

    Args:
        sources: (query of the tile, slot of its list) -> keys [block_size, D], and -> scale [1, block_size] or None.
        n_steps_smem: steps that eights of queries need, this tile's from `first` on.
        blocks_ref: [tile_t // 8, 8, m] int32; n_visible_ref: [tile_t // 8, 8, 1] int32, candidates of each query.
        q_ref: [tile_t, H, D]; w_ref: [tile_t, H]; o_ref: [tile_t // 8, 8, topk padded] int32, ascending, then -1.
        w_vmem: [8, H, LANES]; partial_vmem: [columns / LANES * 64, LANES]; the others as in `topk_body.select`.
    """

    def one_eight(e: Array, _: None) -> None:
        spread_weights(w_ref.at[pl.ds(pl.multiple_of(e * ROWS, ROWS), ROWS)], w_vmem)
        n_visible = splat(n_visible_ref.at[pl.ds(e, 1)])
        n_steps = n_steps_smem[first + e]

        def one_step(i: Array, _: None) -> None:
            score_step(plan, i, sources, e * ROWS, n_visible[0], q_ref, w_vmem, partial_vmem, images_vmem.at[e])

        lax.fori_loop(0, n_steps, one_step, None)
        fill(images_vmem.at[pl.ds(e, 1)], n_steps * (plan.columns // LANES), n_visible)

    lax.fori_loop(0, images_vmem.shape[0], one_eight, None)
    topk_body.select(images_vmem, splat(n_visible_ref), plan.topk, cuts_vmem, table_vmem, chosen_vmem)
    write_positions(plan, blocks_ref, chosen_vmem, o_ref)


def score_step(
    plan: Plan,
    i: Array,
    sources: tuple,
    first_row: Array,
    n_visible: Array,
    q_ref: Ref,
    w_vmem: Ref,
    partial_vmem: Ref,
    images_vmem: Ref,
) -> None:
    """Images of candidates i * columns ... of eight queries, from row `first_row` of the tile on."""
    keys, scale = sources
    W = plan.blocks_per_product
    for s in range(0, plan.slots, W):
        slots = [i * plan.slots + s + j for j in range(W)]
        for r in range(ROWS):
            x = products(q_ref[first_row + r], jnp.concatenate([keys(first_row + r, slot) for slot in slots], axis=0))
            if scale is not None:
                row = jnp.concatenate([scale(first_row + r, slot) for slot in slots], axis=1)
            for c in range(0, plan.lanes, LANES):
                rows = sum_to_sublanes(x[:, c : c + LANES], w_vmem[r])
                if scale is not None:
                    rows = rows * row[:, c : c + LANES]
                at = (s * plan.block_size + c) // LANES * ROWS * ROWS + r * ROWS
                partial_vmem[pl.ds(at, ROWS)] = rows
    lane = lax.broadcasted_iota(jnp.int32, (ROWS, LANES), 1)
    for group in range(plan.columns // LANES):
        image = images_of_rows(partial_vmem, group * ROWS * ROWS)
        column = i * plan.columns + group * LANES + lane
        at = (i * (plan.columns // LANES) + group) * ROWS
        images_vmem[pl.ds(pl.multiple_of(at, ROWS), ROWS)] = jnp.where(column < n_visible, image, INVISIBLE)


def write_positions(plan: Plan, blocks_ref: Ref, chosen_vmem: Ref, o_ref: Ref) -> None:
    """Columns of the candidates to positions in the sequence."""

    def one_tile(tile: Array, _: None) -> None:
        for first in range(0, o_ref.shape[2], LANES):
            columns = chosen_vmem[tile, pl.ds(first // LANES * ROWS, ROWS)]
            slot = jnp.maximum(columns, 0) // plan.block_size
            block = jnp.zeros_like(slot)
            for part in range(0, blocks_ref.shape[2], LANES):
                found = jnp.take_along_axis(
                    blocks_ref[tile, :, part : part + LANES], slot % LANES, axis=1, mode="promise_in_bounds"
                )
                block = jnp.where(slot // LANES == part // LANES, found, block)
            positions = block * plan.block_size + columns % plan.block_size
            o_ref[tile, :, first : first + LANES] = jnp.where(columns < 0, -1, positions)

    lax.fori_loop(0, o_ref.shape[0], one_tile, None)
