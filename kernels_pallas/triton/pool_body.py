"""Device code of `pool`: one block a program; and how a mean becomes numbers that the tensor core takes."""

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental.pallas import triton as plt
from jax.typing import DTypeLike

from hisa_jax.kernels_pallas.triton.tree import sum_rows
from hisa_jax.kernels_pallas.types import Ref

_E4M3_MAX = 448.0


def pool_body(k_ref: Ref, count_ref: Ref, *refs: Ref, n_parts: int) -> None:
    # One program, one block:   8 tiles of rows -> added pair by pair in registers -> mean -> parts and their scale
    #
    # Rows are loaded in the order that makes every addition one of neighbours (see `sum_rows`), so a block's sum has
    # the bits of its pages' sums added up.
    *k_scale_ref, o_ref, scale_ref = refs  # in: [block_size, D], [1], maybe [block_size]; out: [parts, D], [1]
    count, columns = count_ref[0], jnp.arange(k_ref.shape[1], dtype=jnp.int32)

    def load(rows: Array) -> Array:
        values = plt.load(k_ref.at[rows[:, None], columns[None, :]]).astype(jnp.float32)
        if k_scale_ref:
            values = values * plt.load(k_scale_ref[0].at[rows])[:, None]
        # A select, not a product with 0: absent rows may hold NaN.
        return jnp.where(rows[:, None] < count, values, 0.0)

    parts, scale = split(mean(sum_rows(load, k_ref.shape[0]), count), n_parts, o_ref.dtype)
    if scale is not None:
        scale_ref[0] = scale
    for part, rounded in enumerate(parts):
        o_ref[part, :] = rounded


def mean(total: Array, count: Array) -> Array:
    """[..., D] float32 by [...] int32; zeros for no token."""
    divisor = jnp.maximum(count, 1).astype(jnp.float32)
    return total / (divisor if total.ndim == 1 else divisor[..., None])


def split(mean: Array, n_parts: int, dtype: DTypeLike) -> tuple[list[Array], Array | None]:
    """[..., D] float32 -> numbers of a dtype, each holding what those before left, and their scale [...] if several.

    The scale is a power of two and every step exact but the roundings to e4m3, which are spelled out: whoever does this
    (XLA for a cache's pages, too) gets the same bits, however its divisions and conversions round.
    """
    if n_parts == 1:
        return [mean.astype(dtype)], None
    magnitude = jnp.where(mean == mean, jnp.abs(mean), 0.0)
    largest = jnp.maximum(jnp.max(magnitude, axis=-1), 1e-30)
    # The least power of two that brings 1.75 * 2**e, of whose form 448 is, into range.
    exponent = ((lax.bitcast_convert_type(largest, jnp.int32) + 0x1FFFFF) >> 23) - 8
    scale, inverse = (lax.bitcast_convert_type(x << 23, jnp.float32) for x in (exponent, 254 - exponent))
    rest = mean * (inverse if mean.ndim == 1 else inverse[..., None])
    # Selects keep NaN, which Triton's minimum and maximum drop.
    rest = jnp.where(rest > _E4M3_MAX, _E4M3_MAX, jnp.where(rest < -_E4M3_MAX, -_E4M3_MAX, rest))
    parts = []
    for _ in range(n_parts):
        parts.append(_four_bits(rest).astype(dtype))
        rest = rest - parts[-1].astype(jnp.float32)
    return parts, scale


def _four_bits(x: Array) -> Array:
    """Rounds to what e4m3 holds of a number, to even: by way of float16, as some compilers go, ties come out wrong."""
    bits = lax.bitcast_convert_type(x, jnp.int32)
    rounded = lax.bitcast_convert_type((bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000, jnp.float32)
    return jnp.where(x == x, rounded, x)
