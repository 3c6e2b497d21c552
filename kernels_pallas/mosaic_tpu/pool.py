"""Mean key of each block, for caches that keep them.
    o[b, n] = mean over the tokens present in block n of k_scale[s] * k[s]         float32

Floor, 128K keys of dsv32 in bfloat16, v5e: 34 MB / 819 GB/s = 41 us. Bound by memory: the additions, 12 cycles a block,
hide under the copy of the next group, 60 cycles a block. Reads the blocks that hold a token and no others.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from hisa_jax.kernels_pallas.mosaic_tpu import launch, query_tiles
from hisa_jax.kernels_pallas.mosaic_tpu.config import GROUP, LANES
from hisa_jax.kernels_pallas.mosaic_tpu.launch import HBM, Launch
from hisa_jax.kernels_pallas.mosaic_tpu.pool_body import PagesRefs, PoolRefs, pool_body, pool_pages_body
from hisa_jax.kernels_pallas.mosaic_tpu.ragged import Ragged
from hisa_jax.kernels_pallas.types import Interpret, Ref
from hisa_jax.layout import Keys


def scratch(keys: Keys) -> dict[str, Ref]:
    """What `pool_sequence` needs."""
    _, block_size, D = keys.values.shape
    buffers: dict[str, Ref] = {
        "keys_vmem": pltpu.VMEM((2, GROUP, block_size, D), keys.values.dtype),
        "sems": pltpu.SemaphoreType.DMA((2, 2)),
    }
    if keys.scales is not None:
        buffers["scale_vmem"] = pltpu.VMEM((2, GROUP, block_size), jnp.float32)
    return buffers


def vmem_bytes(block_size: int, D: int, itemsize: int) -> int:
    """Of that scratch, at most."""
    return 2 * GROUP * block_size * (max(D, LANES) * itemsize + 4)


def sums_scratch(per_block: int, D: int) -> dict[str, Ref]:
    """What `add_pages` needs."""
    return {
        "sums_vmem": pltpu.VMEM((2, GROUP * per_block, D), jnp.float32),
        "sems": pltpu.SemaphoreType.DMA((2, 2)),
    }


def sums_vmem_bytes(per_block: int, D: int) -> int:
    """Of that scratch."""
    return 2 * GROUP * per_block * max(D, LANES) * 4


def pool(keys: Keys, n_tokens: Array, interpret: Interpret = False) -> Array:
    """Keys of [B * n, block_size, D], [B] int32 tokens present -> [B, n, D] float32; n a multiple of GROUP.

    Means of blocks without a token are not written.
    """
    N, block_size, D = keys.values.shape
    B, n = n_tokens.shape[0], N // n_tokens.shape[0]
    (means,) = Launch(
        body=functools.partial(pool_body, n),
        refs=PoolRefs,
        name="hisa_pool",
        grid=(1, B, 1),
        scalars={"n_tokens_smem": n_tokens},
        operands={"k_hbm": (keys.values, HBM), "scale_hbm": (keys.scales, HBM)},
        outs={
            "means": (
                jax.ShapeDtypeStruct((B, n, D), jnp.float32),
                pl.BlockSpec((None, n, D), lambda core, b, t, _: (b, 0, 0)),
            )
        },
        scratch=scratch(keys),
        vmem_bytes=vmem_bytes(block_size, D, keys.values.dtype.itemsize) + 2 * 4 * n * max(D, LANES),
        interpret=interpret,
    )()
    return means


def pool_pages(ragged: Ragged, n_tokens: Array, mean_parts: int, interpret: Interpret) -> Array:
    """Means of full blocks from their pages' sums -> [R, n, mean_parts * D] bfloat16, n a multiple of 128.

    Those of blocks without a token are not written; `n_tokens`: [R] int32 of each sequence, 0 where none are wanted.
    """
    assert ragged.page_sums is not None
    tiles, D = query_tiles.of_sequences(ragged, n_tokens), ragged.page_sums.shape[1]
    n = -(-ragged.max_blocks // LANES) * LANES
    pages = Launch(
        body=functools.partial(pool_pages_body, ragged.block_size, mean_parts),
        refs=PagesRefs,
        name="hisa_pool",
        grid=(1, 1, ragged.R),
        scalars={"n_tokens_smem": n_tokens},
        operands={"sums_hbm": (ragged.page_sums, HBM)},
        outs={"means_hbm": (jax.ShapeDtypeStruct((ragged.R, n, mean_parts * D), jnp.bfloat16), HBM)},
        scratch={
            **sums_scratch(tiles.per_block, D),
            "means_vmem": pltpu.VMEM((2, GROUP, mean_parts * D), jnp.bfloat16),
            "out_sems": pltpu.SemaphoreType.DMA((2,)),
        },
        vmem_bytes=sums_vmem_bytes(tiles.per_block, D) + 4 * GROUP * mean_parts * max(D, LANES) * 2,
        interpret=interpret,
    )
    (means,) = launch.by_sequence(pages, tiles)()
    return means
