"""Device code of `pool`: one block a program."""

import jax.numpy as jnp
from jax import Array
from jax.experimental.pallas import triton as plt

from hisa_jax.kernels_pallas.triton.tree import sum_rows
from hisa_jax.kernels_pallas.types import Ref
from hisa_jax.xla.means import mean, split


def pool_body(k_ref: Ref, count_ref: Ref, *refs: Ref, n_parts: int) -> None:
    # One program, one block:   8 tiles of rows -> added pair by pair in registers -> mean -> parts and their scale
    #
    # Rows are loaded in the order that makes every addition one of neighbours (see `sum_rows`), so a block's sum has
    # the bits of its pages' sums added up.
    *k_scale_ref, o_ref, scale_ref = refs  # in: [block_size, D], [1], maybe [block_size]; out: [parts, D], [1]
    mean_key = mean_of_block(k_ref, k_scale_ref[0] if k_scale_ref else None, count_ref[0], 0, k_ref.shape[0])
    parts, scale = split(mean_key, n_parts, o_ref.dtype)
    if scale is not None:
        scale_ref[0] = scale
    for part, rounded in enumerate(parts):
        o_ref[part, :] = rounded


def mean_of_block(k_ref: Ref, k_scale_ref: Ref | None, count: Array, first: Array | int, block_size: int) -> Array:
    """[D] float32: the mean of the first `count` of the rows first : first + block_size of [S, D]."""
    columns = jnp.arange(k_ref.shape[1], dtype=jnp.int32)

    def load(rows: Array) -> Array:
        values = plt.load(k_ref.at[first + rows[:, None], columns[None, :]]).astype(jnp.float32)
        if k_scale_ref is not None:
            values = values * plt.load(k_scale_ref.at[first + rows])[:, None]
        # A select, not a product with 0: absent rows may hold NaN.
        return jnp.where(rows[:, None] < count, values, 0.0)

    return mean(sum_rows(load, block_size), count)
