"""Mean keys of pages and blocks: sums whose order is fixed, so that pages, blocks and chunks agree bit for bit."""

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

_E4M3_MAX = 448.0


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
    return total / jnp.maximum(counts, 1).astype(jnp.float32)[..., None]


def mean_parts(means: Array, dtype: DTypeLike) -> tuple[Array, Array | None] | None:
    """[..., D] float32 means in the numbers that the kernels' block filter multiplies for keys of a dtype, or None.

    Returns: [..., parts, D], each part holding what those before left, and of two e4m3 parts the scale [...] float32.
        The same bits as the `pool` stage of the GPU kernels (triton/pool_body.py) makes: the scale is a power of two,
        and the rounding to e4m3 is spelled out, so that nothing is left to a compiler.
    """
    if jnp.dtype(dtype) == jnp.bfloat16:
        return means[..., None, :].astype(dtype), None
    if jnp.dtype(dtype) != jnp.float8_e4m3fn:
        return None
    magnitude = jnp.where(jnp.isnan(means), 0.0, jnp.abs(means))
    largest = jnp.maximum(jnp.max(magnitude, axis=-1, initial=0.0), 1e-30)
    # The least power of two that brings 1.75 * 2**e, of whose form 448 is, into range.
    exponent = ((lax.bitcast_convert_type(largest, jnp.int32) + 0x1FFFFF) >> 23) - 8
    scale, inverse = (lax.bitcast_convert_type(x << 23, jnp.float32) for x in (exponent, 254 - exponent))
    rest = jnp.clip(means * inverse[..., None], -_E4M3_MAX, _E4M3_MAX)
    parts = []
    for _ in range(2):
        bits = lax.bitcast_convert_type(rest, jnp.int32)
        rounded = lax.bitcast_convert_type((bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000, jnp.float32)
        parts.append(jnp.where(jnp.isnan(rest), rest, rounded).astype(dtype))
        rest = rest - parts[-1].astype(jnp.float32)
    return jnp.stack(parts, axis=-2), scale
