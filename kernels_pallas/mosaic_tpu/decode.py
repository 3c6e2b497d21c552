"""The block filter where each sequence has few queries, as in decoding: from kept means, by the kernel of `refine`.

To it a mean is a key: every query's list names all the blocks of 128 means of its own sequence, the candidates are
blocks, and the first and last are chosen whatever they score. Eight queries of eight sequences share a step, or one
query takes all eight lists, and the reads are the means of the blocks that are present: 512 KiB a query at 128K.
"""

import jax.numpy as jnp
from jax import Array

from kernels_pallas.mosaic_tpu import launch, refine
from kernels_pallas.mosaic_tpu.config import LANES, Chip
from kernels_pallas.mosaic_tpu.pool_body import parts_of
from kernels_pallas.types import Interpret


def block_filter(
    q: Array,
    w: Array,
    means: Array,
    eligible: Array,
    *,
    block_topk: int,
    keep_first: int,
    keep_last: int,
    mean_parts: int,
    chip: Chip,
    has_images: bool = False,
    interpret: Interpret = False,
) -> tuple[Array, ...]:
    """[B, T, H, D], [B, T, H], [B, n, D] float32, [B, T] -> [B, T, block_topk] int32, ascending, then -1; T < 8.

    With `has_images` also the images of the kept.
    """
    (B, T, H, D), n = q.shape, means.shape[1]
    lists = -(-n // LANES)
    means = launch.pad_axis(parts_of(means, mean_parts), 1, LANES).reshape(B, lists, LANES, -1)
    q = jnp.concatenate([q.astype(jnp.bfloat16)] * mean_parts, axis=-1)
    needed = -(-eligible // LANES)[..., None]
    every = jnp.arange(lists, dtype=jnp.int32)
    config = refine.heuristic(chip, B, T, H, mean_parts * D, lists, lists, LANES, 2)
    return refine.refine(
        q,
        w,
        means,
        None,
        jnp.where(every < needed, every, -1),
        eligible,
        jnp.zeros((B,), jnp.int32),
        topk=block_topk,
        keep_first=keep_first,
        keep_last=keep_last,
        has_images=has_images,
        name="hisa_block_filter",
        config=config,
        interpret=interpret,
    )
