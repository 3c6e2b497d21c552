"""Device code of `refine`: eight queries side by side, each with the keys of its own blocks.

A step scores `columns` candidates of each of the eight: one product a query and 256 candidates, all unrolled, so that
the matrix units load the keys of one product while the rows of another pass.
"""

import dataclasses

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.mosaic_tpu.config import GROUP, LANES, ROWS
from kernels_pallas.mosaic_tpu.tiles import images_of_rows, products, spread_weights, sum_to_sublanes
from kernels_pallas.types import Ref

_PRODUCT = 256  # candidates a product: a side of the larger matrix unit


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """The static numbers of a launch."""

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
    plan: Plan, n_steps_smem: Ref, n_tokens_smem: Ref, blocks_smem: Ref, q_ref: Ref, w_ref: Ref, k_hbm: Ref, *refs: Ref,
    w_vmem: Ref, partial_vmem: Ref, keys_vmem: Ref, sems: Ref, scale_vmem: Ref = None
) -> None:  # fmt: skip
    """Keys of the whole sequence in VMEM, [n, block_size, D], from its first tile on."""
    *scale_hbm, o_ref = refs
    core, b, t = (pl.program_id(axis) for axis in range(3))
    tile = (b * pl.num_programs(0) + core) * pl.num_programs(2) + t

    @pl.when(t == 0)
    def _load():
        pairs = [(k_hbm, keys_vmem), *((scale, scale_vmem) for scale in scale_hbm)]
        n_groups = pl.cdiv(n_tokens_smem[b], GROUP * plan.block_size)

        def copies(i: Array) -> list:
            blocks = pl.ds(pl.multiple_of(i * GROUP, GROUP), GROUP)
            return [
                pltpu.make_async_copy(hbm.at[b, blocks], vmem.at[blocks], sems.at[j])
                for j, (hbm, vmem) in enumerate(pairs)
            ]

        def start(i: Array, _: None) -> None:
            for copy in copies(i):
                copy.start()

        def wait(i: Array, _: None) -> None:
            for copy in copies(i):
                copy.wait()

        lax.fori_loop(0, n_groups, start, None)
        lax.fori_loop(0, n_groups, wait, None)

    spread_weights(w_ref, w_vmem)

    def one_step(i: Array, _: None) -> None:
        def keys(r: int, s: int) -> Array:
            return keys_vmem[blocks_smem[r, i * plan.slots + s]]

        def scale(r: int, s: int) -> Array:
            return scale_vmem[pl.ds(blocks_smem[r, i * plan.slots + s], 1)]

        score_step(plan, i, keys, scale if scale_hbm else None, q_ref, w_vmem, partial_vmem, o_ref)

    lax.fori_loop(0, n_steps_smem[tile], one_step, None)


def score_step(
    plan: Plan, i: Array, keys: Ref, scale: Ref, q_ref: Ref, w_vmem: Ref, partial_vmem: Ref, o_ref: Ref
) -> None:
    """Images of candidates i * columns ... of the eight queries.

    Args:
        keys: (query, block of this step) -> [block_size, D]; scale: the same -> [1, block_size], or None.
        q_ref: [8, H, D]; w_vmem: [8, H, LANES]; o_ref: [8, m * block_size].
        partial_vmem: [columns / LANES * 64, LANES].
    """
    W = plan.blocks_per_product
    for s in range(0, plan.slots, W):
        for r in range(ROWS):
            x = products(q_ref[r], jnp.concatenate([keys(r, s + j) for j in range(W)], axis=0))
            if scale is not None:
                row = jnp.concatenate([scale(r, s + j) for j in range(W)], axis=1)
            for c in range(0, plan.lanes, LANES):
                rows = sum_to_sublanes(x[:, c : c + LANES], w_vmem[r])
                if scale is not None:
                    rows = rows * row[:, c : c + LANES]
                at = (s * plan.block_size + c) // LANES * ROWS * ROWS + r * ROWS
                partial_vmem[pl.ds(at, ROWS)] = rows
    for c in range(0, plan.columns, LANES):
        image = images_of_rows(partial_vmem, c // LANES * ROWS * ROWS)
        o_ref[:, pl.ds(pl.multiple_of(i * plan.columns + c, LANES), LANES)] = image
