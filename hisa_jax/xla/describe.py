"""What all pages of a cache say of themselves, worked out from the tables that name them.

`append` does it for the few pages that it writes (append.py); here others have written the keys.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from hisa_jax.xla import block_means
from hisa_jax.xla.means import mean, mean_parts, tree_sum
from hisa_jax.xla.rounding import widened

_NUMBERS = 1 << 24  # of keys at a time, which are float32 then


class Description(NamedTuple):
    """`sums`, `counts`, `places`, `means`, `mean_scales` and `marks` of an IndexCache."""

    sums: Array
    counts: Array
    places: Array
    means: Array | None
    mean_scales: Array | None
    marks: Array | None


def describe(
    values: Array, scales: Array | None, block_tables: Array, lengths: Array, block_size: int | None = None
) -> Description:
    """[n_pages, page_size, D], [n_pages, page_size], [R, P], [R] -> what they say.

    A page that requests share holds as many tokens as the one with the most in it. Named for two places, it has the
    later of them. Pages that no request needs are empty.
    """
    (n_pages, size, D), P = values.shape, block_tables.shape[1]
    index = jnp.arange(P, dtype=jnp.int32)
    held = jnp.clip(lengths[:, None] - index[None, :] * size, 0, size)
    is_needed = (held > 0) & (block_tables >= 0) & (block_tables < n_pages)
    page = jnp.where(is_needed, block_tables, n_pages)
    counts = jnp.zeros((n_pages,), jnp.int32).at[page].max(held, mode="drop")
    places = jnp.full((n_pages,), -1, jnp.int32).at[page].max(jnp.broadcast_to(index, page.shape), mode="drop")

    def total(page: tuple[Array, Array | None, Array]) -> Array:
        values, scales, count = page
        keys = widened(values)
        if scales is not None:
            keys = keys * scales[:, None]
        # A select, not a product with 0: rows without a token may hold NaN.
        return tree_sum(jnp.where(jnp.arange(size, dtype=jnp.int32)[:, None] < count, keys, 0))

    sums = lax.map(total, (values, scales, counts), batch_size=max(_NUMBERS // max(size * D, 1), 1))
    marks, own_means = None, mean(sums, counts)
    if block_size is not None:
        n_before = block_size // size - 1
        # Whatever pages are named before one by several tables: the marks say which.
        earlier = index[:, None] + jnp.arange(-n_before, 0, dtype=jnp.int32)[None, :]
        named = jnp.where(earlier >= 0, block_tables[:, jnp.maximum(earlier, 0)], -1)
        before = jnp.full((n_pages, n_before), -1, jnp.int32).at[page].max(named, mode="drop")
        ends_block = (places >= 0) & (places % (n_before + 1) == n_before)
        own_means, marks = block_means.kept(
            sums, counts, ends_block, block_means.before(before, sums, counts, block_means.mark_of(sums, counts)), size
        )
    means, mean_scales = mean_parts(own_means, values.dtype) or (None, None)
    return Description(sums, counts, places, means, mean_scales, marks)
