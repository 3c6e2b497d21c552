"""What all pages of a cache say of themselves, worked out from the tables that name them.

`append` does it for the few pages that it writes (append.py); here others have written the keys.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from hisa_jax.xla.means import mean, mean_parts, tree_sum

_NUMBERS = 1 << 24  # of keys at a time, which are float32 then


class Description(NamedTuple):
    """`sums`, `counts`, `places`, `means` and `mean_scales` of an IndexCache."""

    sums: Array
    counts: Array
    places: Array
    means: Array | None
    mean_scales: Array | None


def describe(values: Array, scales: Array | None, block_tables: Array, lengths: Array) -> Description:
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
        keys = values.astype(jnp.float32)
        if scales is not None:
            keys = keys * scales[:, None]
        # A select, not a product with 0: rows without a token may hold NaN.
        return tree_sum(jnp.where(jnp.arange(size, dtype=jnp.int32)[:, None] < count, keys, 0))

    sums = lax.map(total, (values, scales, counts), batch_size=max(_NUMBERS // max(size * D, 1), 1))
    means, mean_scales = mean_parts(mean(sums, counts), values.dtype) or (None, None)
    return Description(sums, counts, places, means, mean_scales)
