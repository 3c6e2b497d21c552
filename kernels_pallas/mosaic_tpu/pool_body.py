"""Device code of pooling: the float32 mean of each of `GROUP` blocks, and the copies that bring the blocks."""

from collections.abc import Callable, Sequence

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.mosaic_tpu.config import GROUP
from kernels_pallas.mosaic_tpu.tiles import column
from kernels_pallas.types import Ref


def pool_body(n_tokens_smem: Ref, k_hbm: Ref, *refs: Ref, keys_vmem: Ref, sems: Ref, scale_vmem: Ref = None) -> None:
    *scale_hbm, o_ref = refs  # in: [B], [B, n, block_size, D], maybe [B, n, block_size]; out: [n, D] of sequence b
    b = pl.program_id(1)

    def store(first: Array, means: Array) -> None:
        o_ref[pl.ds(first, GROUP)] = means

    pool_sequence(b, n_tokens_smem[b], k_hbm, scale_hbm, store, keys_vmem=keys_vmem, scale_vmem=scale_vmem, sems=sems)


def pool_sequence(
    b: Array,
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
        k_hbm: [B, n, block_size, D]; scale_hbm: one of [B, n, block_size] or none; b: the sequence.
        keys_vmem: [2, GROUP, block_size, D]; scale_vmem: [2, GROUP, block_size]; sems: [2, 2], by slot and operand.
    """
    block_size = k_hbm.shape[2]
    n_groups = pl.cdiv(n_tokens, GROUP * block_size)
    pairs = [(k_hbm, keys_vmem), *((scale, scale_vmem) for scale in scale_hbm)]

    def copies(i: Array, slot: Array) -> list:
        blocks = pl.ds(pl.multiple_of(i * GROUP, GROUP), GROUP)
        return [
            pltpu.make_async_copy(hbm.at[b, blocks], vmem.at[slot], sems.at[slot, j])
            for j, (hbm, vmem) in enumerate(pairs)
        ]

    def start(i: Array, slot: Array) -> None:
        for copy in copies(i, slot):
            copy.start()

    pl.when(n_groups > 0)(lambda: start(jnp.int32(0), jnp.int32(0)))

    def one_group(i: Array, _: None) -> None:
        slot = lax.rem(i, 2)
        pl.when(i + 1 < n_groups)(lambda: start(i + 1, 1 - slot))
        for copy in copies(i, slot):
            copy.wait()
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

    lax.fori_loop(0, n_groups, one_group, None)


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
