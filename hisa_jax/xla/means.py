"""Mean keys of pages and blocks: sums whose order is fixed, so that pages, blocks and chunks agree bit for bit.

The GPU kernels take `mean` and `split` from here, and sum rows in the order of `tree_sum` (triton/tree.py).
"""

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

from hisa_jax.xla.rounding import E4M3_MAX, to_e4m3


def tree_sum(values: Array) -> Array:
    """[..., n, D] -> [..., D]: sums by pairs of neighbours, of pairs, and so on.

    Sums of aligned runs of 2**j neighbours, added up the same way, have the same bits: pages and blocks agree.
    """
    n = values.shape[-2]
    size = 1 << max(n - 1, 0).bit_length()
    values = jnp.pad(values, ((0, 0),) * (values.ndim - 2) + ((0, size - n), (0, 0)))
    while values.shape[-2] > 1:
        # Additions, not reductions: XLA makes one of reductions of reductions, in its own order.
        values = values[..., 0::2, :] + values[..., 1::2, :]
    return values[..., 0, :]


def mean(total: Array, counts: Array) -> Array:
    """[..., D] float32, [...] int32 -> [..., D]; zeros for no token."""
    divisor = jnp.maximum(counts, 1).astype(jnp.float32)
    return total / (divisor if total.ndim == 1 else divisor[..., None])


def n_parts_of(dtype: DTypeLike) -> int | None:
    """How many numbers of the keys' dtype make up a mean for the kernels' block filter; None: they take none."""
    return {"bfloat16": 1, "float8_e4m3fn": 2}.get(jnp.dtype(dtype).name)


def mean_parts(means: Array, dtype: DTypeLike) -> tuple[Array, Array | None] | None:
    """[..., D] float32 means in the numbers that the kernels' block filter multiplies for keys of a dtype, or None.

    Returns: [..., parts, D], and of two e4m3 parts the scale [...] float32, as `split` gives them.
    """
    n_parts = n_parts_of(dtype)
    if n_parts is None:
        return None
    parts, scale = split(means, n_parts, dtype)
    return jnp.stack(parts, axis=-2), scale


def split(means: Array, n_parts: int, dtype: DTypeLike, step: float = 1.0) -> tuple[list[Array], Array | None]:
    """[..., D] float32 -> numbers of a dtype, each holding what those before left, and their scale [...] if several.

    The n-th of them, from 0 on, is to be divided by step**n, a power of two: what is left then fits the dtype better.

    The scale is a power of two and every step exact but the roundings to e4m3, which are spelled out: XLA and kernels
    get the same bits, however their divisions and conversions round.
    """
    if n_parts == 1:
        return [means.astype(dtype)], None
    magnitude = jnp.where(means == means, jnp.abs(means), 0.0)
    largest = jnp.maximum(jnp.max(magnitude, axis=-1), 1e-30)
    # The least power of two that brings 1.75 * 2**e, of whose form 448 is, into range.
    exponent = ((lax.bitcast_convert_type(largest, jnp.int32) + 0x1FFFFF) >> 23) - 8
    scale, inverse = (lax.bitcast_convert_type(x << 23, jnp.float32) for x in (exponent, 254 - exponent))
    rest = means * (inverse if means.ndim == 1 else inverse[..., None])
    # Selects keep NaN, which Triton's minimum and maximum drop.
    rest = jnp.where(rest > E4M3_MAX, E4M3_MAX, jnp.where(rest < -E4M3_MAX, -E4M3_MAX, rest))
    parts = []
    for _ in range(n_parts):
        rounded = to_e4m3(rest)
        parts.append(rounded.astype(dtype))
        rest = (rest - rounded) * step
    return parts, scale
