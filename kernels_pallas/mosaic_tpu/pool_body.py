"""Device code of pooling: the float32 mean of each of `GROUP` blocks, and the copies that bring the blocks.

A group of blocks at a time, all in one core: while the means of a group are worked out from one slot of a ring, the
copies of the next group fill the other (`fetch.in_turn`). `store` takes the means: to an output, or to a place in VMEM
where the block filter scores them.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from hisa_jax.kernels_pallas.mosaic_tpu import fetch
from hisa_jax.kernels_pallas.mosaic_tpu.config import GROUP
from hisa_jax.kernels_pallas.mosaic_tpu.fetch import CopyGroup
from hisa_jax.kernels_pallas.mosaic_tpu.launch import Tile
from hisa_jax.kernels_pallas.mosaic_tpu.score_body import column
from hisa_jax.kernels_pallas.types import Ref
from hisa_jax.xla.rounding import widened

Store = Callable[[Array, Array], None]  # (first block, [GROUP, D] float32 means)


class PoolRefs(NamedTuple):
    """Buffers of `pool_body`: one sequence a grid step."""

    n_tokens_smem: Ref  # [B]
    k_hbm: Ref  # [B * n, block_size, D]
    means: Ref  # out: [n, D] float32
    keys_vmem: Ref  # [2, GROUP, block_size, D], the ring
    sems: Ref  # [2, 2], by slot and operand
    scale_hbm: Ref = None  # [B * n, block_size] float32
    scale_vmem: Ref = None  # [2, GROUP, block_size], the ring


def pool_body(n: int, refs: PoolRefs) -> None:
    """The means of the n blocks of one sequence."""
    b = pl.program_id(1)

    def store(first: Array, means: Array) -> None:
        refs.means[pl.ds(first, GROUP)] = means

    pool_sequence(fetch.in_a_row(pl.multiple_of(b * n, GROUP), GROUP), refs.n_tokens_smem[b], refs, store)


def pool_sequence(copy_group: CopyGroup, n_tokens: Array, refs: Any, store: Store) -> None:
    """Calls `store` for every group of blocks that holds a token; `refs` has the buffers that `PoolRefs` says."""
    block_size = refs.k_hbm.shape[1]
    n_groups = pl.cdiv(n_tokens, GROUP * block_size)
    has_scale = refs.scale_hbm is not None
    pairs = [(refs.k_hbm, refs.keys_vmem), *([(refs.scale_hbm, refs.scale_vmem)] if has_scale else [])]

    def one_group(i: Array, slot: Array) -> None:
        first = pl.multiple_of(i * GROUP, GROUP)
        means = [
            mean_of_block(
                refs.keys_vmem[slot, g],
                refs.scale_vmem[slot, pl.ds(g, 1)] if has_scale else None,
                n_tokens - (first + g) * block_size,
            )
            for g in range(GROUP)
        ]
        store(first, jnp.concatenate(means, axis=0))

    fetch.in_turn(copy_group, n_groups, pairs, refs.sems, one_group)


class PagesRefs(NamedTuple):
    """Buffers of `pool_pages_body`: one sequence a grid step."""

    n_tokens_smem: Ref  # [R]
    sums_hbm: Ref  # [N, D] float32
    means_hbm: Ref  # out: [R, n, mean_parts * D] bfloat16
    sums_vmem: Ref  # [2, GROUP * per_block, D] float32, the ring of what comes
    sems: Ref  # [2, 2], by slot
    means_vmem: Ref  # [2, GROUP, mean_parts * D], the ring of what goes
    out_sems: Ref  # [2], by slot


def pool_pages_body(block_size: int, mean_parts: int, tile: Tile, refs: PagesRefs) -> None:
    """The means of a sequence's blocks from the sums of its pages.

    Two rings: sums come in, means go out. A slot of the second is filled once the copy of two groups ago has left it.
    """
    n_tokens = refs.n_tokens_smem[tile.sequence]

    def copy(i: Array) -> Ref:
        slot, blocks = lax.rem(i, 2), pl.ds(pl.multiple_of(i * GROUP, GROUP), GROUP)
        target = refs.means_hbm.at[tile.sequence, blocks]
        return pltpu.make_async_copy(refs.means_vmem.at[slot], target, refs.out_sems.at[slot])

    def store(first: Array, means: Array) -> None:
        i = lax.div(first, GROUP)
        pl.when(i >= 2)(lambda: copy(i - 2).wait())
        refs.means_vmem[lax.rem(i, 2)] = parts_of(means, mean_parts)
        copy(i).start()

    add_pages(tile.copy_group, n_tokens, block_size, refs, store)
    n_groups = pl.cdiv(n_tokens, GROUP * block_size)
    # The copies of the last two groups are still under way.
    pl.when(n_groups > 1)(lambda: copy(n_groups - 2).wait())
    pl.when(n_groups > 0)(lambda: copy(n_groups - 1).wait())


def add_pages(copy_group: CopyGroup, n_tokens: Array, block_size: int, refs: Any, store: Store) -> None:
    """As `pool_sequence`, from the sums that pages keep; right for the blocks that are full.

    The others may hold anything: a query that sees a part of a block sees no block after it, and keeps it unscored.
    """
    per_block = refs.sums_vmem.shape[1] // GROUP

    def one_group(i: Array, slot: Array) -> None:
        # Page p of each block is every per_block-th row: one strided load.
        total = refs.sums_vmem[slot, pl.ds(0, GROUP, stride=per_block)]
        for page in range(1, per_block):
            total = total + refs.sums_vmem[slot, pl.ds(page, GROUP, stride=per_block)]
        store(pl.multiple_of(i * GROUP, GROUP), total * (1.0 / block_size))

    n_groups = pl.cdiv(n_tokens, GROUP * block_size)
    fetch.in_turn(copy_group, n_groups, [(refs.sums_hbm, refs.sums_vmem)], refs.sems, one_group)


def mean_of_block(keys: Array, scale: Array | None, n_present: Array) -> Array:
    """[block_size, D], [1, block_size] or None -> [1, D] float32, over the first `n_present` tokens."""
    block_size, D = keys.shape
    x = keys.astype(jnp.float32)
    if scale is not None:
        x = x * column(scale, D)
    # A select, not a product with 0: absent rows may hold NaN.
    x = jnp.where(lax.broadcasted_iota(jnp.int32, x.shape, 0) < n_present, x, 0.0)
    count = jnp.full((1, D), jnp.clip(n_present, 1, block_size)).astype(jnp.float32)
    return jnp.sum(x, axis=0, keepdims=True) / count


def parts_of(means: Array, n_parts: int) -> Array:
    """[n, D] float32 -> [n, n_parts * D] bfloat16: each part rounds what those before it left."""
    parts = []
    for _ in range(n_parts):
        parts.append(means.astype(jnp.bfloat16))
        means = means - widened(parts[-1])  # outside of a kernel, too
    return jnp.concatenate(parts, axis=-1)
