"""The block filter where each sequence has few queries, as in decoding: from kept means, by the kernel of `refine`.

To it a mean is a key: every query's list names all the blocks of 128 means of its own sequence, the candidates are
blocks, and the first and last are chosen whatever they score. Eight queries of eight sequences share a step, or one
query takes all eight lists, and the reads are the means of the blocks that are present: 512 KiB a query at 128K.
"""

import jax.numpy as jnp
from jax import Array

from hisa_jax.kernels_pallas.mosaic_tpu import refine
from hisa_jax.kernels_pallas.mosaic_tpu.config import LANES, Chip, Choice
from hisa_jax.kernels_pallas.mosaic_tpu.refine import Lists, Task
from hisa_jax.kernels_pallas.sequences import Rows
from hisa_jax.layout import Keys, Queries


def as_refinement(
    queries: Queries, means: Array, sequence: Rows, eligible: Array, *, choice: Choice, chip: Chip
) -> tuple[Queries, Keys, Lists, Task]:
    """The block filter of some queries in terms of `refine.refine`, which then chooses blocks.

    Args:
        means: [R, n, parts * D] bfloat16, n a multiple of 128, of `pool_body.parts_of`; anything after the last block.
        sequence: [T] int32, which of the R each query is of; eligible: [T] int32, blocks that it may keep.
    """
    (T, H, D), n_lists, width = queries.q.shape, means.shape[1] // LANES, means.shape[2]
    every = jnp.arange(n_lists, dtype=jnp.int32)
    lists = Lists(
        block_ids=jnp.where(every < -(-eligible // LANES)[:, None], every, -1),
        page_index=jnp.asarray(sequence, jnp.int32)[:, None] * n_lists + every,
    )
    queries = Queries(jnp.concatenate([queries.q.astype(jnp.bfloat16)] * (width // D), axis=-1), queries.w, eligible)
    config = refine.gathered(chip, T, H, n_lists, LANES)
    task = Task(choice=choice, config=config, block_size=LANES, name="hisa_block_filter")
    return queries, Keys(means.reshape(-1, LANES, width), None), lists, task
