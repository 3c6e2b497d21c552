"""Device code of pooling: the float32 mean of each of `GROUP` blocks, and the copies that bring the blocks."""

from collections.abc import Callable, Sequence

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from hisa_jax.kernels_pallas.mosaic_tpu import fetch
from hisa_jax.kernels_pallas.mosaic_tpu.config import GROUP
from hisa_jax.kernels_pallas.mosaic_tpu.fetch import CopyGroup
from hisa_jax.kernels_pallas.mosaic_tpu.launch import Tile
from hisa_jax.kernels_pallas.mosaic_tpu.tiles import column
from hisa_jax.kernels_pallas.types import Ref


def pool_body(n_tokens_smem: Ref, k_hbm: Ref, *refs: Ref, keys_vmem: Ref, sems: Ref, scale_vmem: Ref = None) -> None:
    *scale_hbm, o_ref = refs  # in: [B], [B, n, block_size, D], maybe [B, n, block_size]; out: [n, D] of sequence b
    b = pl.program_id(1)

    def store(first: Array, means: Array) -> None:
        o_ref[pl.ds(first, GROUP)] = means

    ring = {"keys_vmem": keys_vmem, "scale_vmem": scale_vmem, "sems": sems}
    pool_sequence(fetch.in_a_row(b), n_tokens_smem[b], k_hbm, scale_hbm, store, **ring)


def pool_sequence(
    copy_group: CopyGroup,
    n_tokens: Array,
    k_hbm: Ref,
    scale_hbm: Sequence[Ref],
    store: Callable[[Array, Array], None],
    *,
    keys_vmem: Ref,
    sems: Ref,
    scale_vmem: Ref = None,
) -> None:
    """Calls store(first block, means [GROUP, D]) for every group of blocks that holds a token.

    Args:
        copy_group: of the sequence.
        k_hbm: [B, n, block_size, D]; scale_hbm: one of [B, n, block_size] or none.
        keys_vmem: [2, GROUP, block_size, D]; scale_vmem: [2, GROUP, block_size]; sems: [2, 2], by slot and operand.
    """
    block_size = k_hbm.shape[2]
    n_groups = pl.cdiv(n_tokens, GROUP * block_size)
    pairs = [(k_hbm, keys_vmem), *((scale, scale_vmem) for scale in scale_hbm)]

    def one_group(i: Array, slot: Array) -> None:
        first = pl.multiple_of(i * GROUP, GROUP)
        means = [
            mean_of_block(
                keys_vmem[slot, g],
                scale_vmem[slot, pl.ds(g, 1)] if scale_hbm else None,
                n_tokens - (first + g) * block_size,
            )
            for g in range(GROUP)
        ]
        store(first, jnp.concatenate(means, axis=0))

    fetch.in_turn(copy_group, n_groups, pairs, sems, one_group)


def add_pages(
    copy_group: CopyGroup,
    n_tokens: Array,
    block_size: int,
    sums_hbm: Ref,
    store: Callable[[Array, Array], None],
    *,
    sums_vmem: Ref,
    sems: Ref,
) -> None:
    """As `pool_sequence`, from the sums that pages keep; right for the blocks that are full.

    The others may hold anything: whoever sees a part of a block sees no block behind it, and keeps it unscored.

    Args:
        sums_hbm: [N, D] float32; sums_vmem: [2, GROUP * per_block, D] float32; sems: [2, 2].
    """
    per_block = sums_vmem.shape[1] // GROUP

    def one_group(i: Array, slot: Array) -> None:
        total = sums_vmem[slot, pl.ds(0, GROUP, stride=per_block)]
        for page in range(1, per_block):
            total = total + sums_vmem[slot, pl.ds(page, GROUP, stride=per_block)]
        store(pl.multiple_of(i * GROUP, GROUP), total * (1.0 / block_size))

    fetch.in_turn(copy_group, pl.cdiv(n_tokens, GROUP * block_size), [(sums_hbm, sums_vmem)], sems, one_group)


def pool_pages_body(
    block_size: int, mean_parts: int, tile: Tile, n_tokens_smem: Ref, sums_hbm: Ref, o_hbm: Ref, *, sums_vmem: Ref,
    means_vmem: Ref, sems: Ref, out_sems: Ref
) -> None:  # fmt: skip
    """Out: [R, n, mean_parts * D]; means_vmem: [2, GROUP, mean_parts * D]; out_sems: [2]."""
    n_tokens = n_tokens_smem[tile.sequence]

    def copy(i: Array) -> Ref:
        slot, blocks = lax.rem(i, 2), pl.ds(pl.multiple_of(i * GROUP, GROUP), GROUP)
        return pltpu.make_async_copy(means_vmem.at[slot], o_hbm.at[tile.sequence, blocks], out_sems.at[slot])

    def store(first: Array, means: Array) -> None:
        i = lax.div(first, GROUP)
        pl.when(i >= 2)(lambda: copy(i - 2).wait())
        means_vmem[lax.rem(i, 2)] = parts_of(means, mean_parts)
        copy(i).start()

    add_pages(tile.copy_group, n_tokens, block_size, sums_hbm, store, sums_vmem=sums_vmem, sems=sems)
    n_groups = pl.cdiv(n_tokens, GROUP * block_size)
    pl.when(n_groups > 1)(lambda: copy(n_groups - 2).wait())
    pl.when(n_groups > 0)(lambda: copy(n_groups - 1).wait())


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
        means = means - parts[-1].astype(jnp.float32)
    return jnp.concatenate(parts, axis=-1)
