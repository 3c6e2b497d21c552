"""The block filter where each sequence has few queries, as in decoding: from kept means, by the kernel of `refine`.

To it a mean is a key: every query's list names all the blocks of 128 means of its own sequence, the candidates are
blocks, and the first and last are chosen whatever they score. Eight queries of eight sequences share a step, or one
query takes all eight lists, and the reads are the means of the blocks that are present: 512 KiB a query at 128K.
"""

from typing import Any

import jax.numpy as jnp
from jax import Array

from hisa_jax.kernels_pallas.mosaic_tpu import launch, refine
from hisa_jax.kernels_pallas.mosaic_tpu.config import LANES, Chip
from hisa_jax.kernels_pallas.mosaic_tpu.pool_body import parts_of
from hisa_jax.kernels_pallas.types import Interpret


def block_filter_listed(
    q: Array,
    w: Array,
    means: Array,
    sequence: Array,
    eligible: Array,
    *,
    block_topk: int,
    keep_first: int,
    keep_last: int,
    chip: Chip,
    has_sort_keys: bool = False,
    interpret: Interpret = False,
) -> tuple[Array, ...]:
    """[T, H, D], [T, H], ..., [T] -> [T, block_topk] int32, ascending, then -1; maybe their sort keys.

    Args:
        means: [R, n, parts * D] bfloat16, n a multiple of 128, of `pool_body.parts_of`; anything behind the last block.
        sequence: [T] int32, which of the R each query is of; eligible: [T] int32.
    """
    (T, H, D), lists, width = q.shape, means.shape[1] // LANES, means.shape[2]
    q = jnp.concatenate([q.astype(jnp.bfloat16)] * (width // D), axis=-1)
    every = jnp.arange(lists, dtype=jnp.int32)
    return refine.refine_listed(
        q,
        w,
        means.reshape(-1, LANES, width),
        None,
        jnp.where(every < -(-eligible // LANES)[:, None], every, -1),
        sequence[:, None] * lists + every,
        eligible,
        block_size=LANES,
        topk=block_topk,
        keep_first=keep_first,
        keep_last=keep_last,
        has_sort_keys=has_sort_keys,
        name="hisa_block_filter",
        config=refine.gathered(chip, T, H, lists, LANES),
        interpret=interpret,
    )


def block_filter(
    q: Array, w: Array, means: Array, eligible: Array, *, mean_parts: int, **options: Any
) -> tuple[Array, ...]:
    """The same for a batch: [B, T, H, D], [B, T, H], [B, n, D] float32, [B, T] -> [B, T, block_topk] int32."""
    (B, T, *_), means = q.shape, launch.pad_axis(parts_of(means, mean_parts), 1, LANES)
    q, w, eligible = (x.reshape(B * T, *x.shape[2:]) for x in (q, w, eligible))
    outs = block_filter_listed(q, w, means, jnp.arange(B * T, dtype=jnp.int32) // T, eligible, **options)
    return tuple(out.reshape(B, T, -1) for out in outs)
