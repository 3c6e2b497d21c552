"""8-bit index keys and queries, one scale a token, as DeepSeek's published activation quantisation makes them."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import DTypeLike

from hisa_jax import checks
from hisa_jax.xla.rounding import E4M3_MAX, to_e4m3, widened

ScaleFormat = Literal["float32", "ue8m0"]

# The amax below which a token's scale no longer shrinks: an all-zero token must not divide by zero.
_AMAX_FLOOR = 1e-4
_LARGEST = {"float8_e4m3fn": E4M3_MAX, "int8": 127.0}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantizedKeys:
    """Index keys in 8 bits; the key of token s is values[s] * scales[s].

    Attributes:
        values: [..., S, D] float8_e4m3fn or int8.
        scales: [..., S] float32, one a token. With the ue8m0 format they are powers of two.
    """

    values: Array
    scales: Array

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the keys, [..., S, D]."""
        return self.values.shape

    def dequantize(self) -> Array:
        """Float32 keys, [..., S, D]."""
        return widened(self.values) * self.scales[..., None]


def quantize_keys(k: Array, dtype: DTypeLike = jnp.float8_e4m3fn, scale: ScaleFormat = "float32") -> QuantizedKeys:
    """Quantises index keys token by token.

    Args:
        k: [..., S, D] float32 or bfloat16.
        dtype: float8_e4m3fn, or int8 (symmetric).
        scale: "float32", or "ue8m0", which rounds the scale up to a power of two.

    Returns: `QuantizedKeys`, values [..., S, D] and scales [..., S]. Gradients go through the scales alone.
    Raises: TypeError: a dtype not listed above. ValueError: a scale format not listed above.
    Source: `act_quant` of DeepSeek-V3.2's inference code: amax floored at 1e-4, scale amax / 448, values clipped.
    Example:
        >>> keys = hj.quantize_keys(jnp.ones((1, 64, 32)))
        >>> keys.values.dtype.name, keys.scales.shape
        ('float8_e4m3fn', (1, 64))
    """
    values, scales = quantize_groups("quantize_keys", "k", k, dtype, scale)
    return QuantizedKeys(values, scales)


def quantize_queries(
    q: Array, w: Array, dtype: DTypeLike = jnp.float8_e4m3fn, scale: ScaleFormat = "float32"
) -> tuple[Array, Array]:
    """Quantises index queries head by head and folds each scale into the head's weight.

    Args:
        q: [..., H, D] float32 or bfloat16.
        w: [..., H] float32.
        dtype, scale: as for `quantize_keys`.

    Returns: values [..., H, D] in `dtype`; w times the scales, [..., H] float32.
    Raises: as `quantize_keys`; ValueError: a `w` that does not fit `q`.
    Source: DeepSeek-V3.2's indexer, which multiplies q's scale into the head weights.
    Example:
        >>> values, w = hj.quantize_queries(jnp.ones((2, 4, 32)), jnp.ones((2, 4)), scale="ue8m0")
        >>> values.dtype.name, w[0].tolist()
        ('float8_e4m3fn', [0.00390625, 0.00390625, 0.00390625, 0.00390625])
    """
    call = "quantize_queries"
    checks.dtype(call, "w", w, ("float32",))
    values, scales = quantize_groups(call, "q", q, dtype, scale)
    checks.shape(call, "w", w, scales.shape, "q without its last axis")
    return values, w * scales


def quantize_groups(call: str, name: str, x: Array, dtype: DTypeLike, scale: str) -> tuple[Array, Array]:
    """[..., D] -> values [..., D] and scales [...], as `quantize_keys` has them."""
    checks.dtype(call, name, x, ("bfloat16", "float32"))
    if not x.ndim:
        raise ValueError(f"{call}: {name} is [], wanted [..., D]")
    kind = checks.one_dtype(call, "dtype", dtype, tuple(_LARGEST)).name
    if not isinstance(scale, str) or scale not in ("float32", "ue8m0"):
        raise ValueError(f"{call}: scale={scale!r}, wanted 'float32' or 'ue8m0'")
    largest = _LARGEST[kind]
    x = widened(jnp.asarray(x))
    amax = jnp.maximum(jnp.max(jnp.abs(x), axis=-1, initial=0.0), _AMAX_FLOOR)
    # The published kernel multiplies by the rounded reciprocal; dividing would differ in the last bit of the scale.
    scales = amax * np.float32(1.0 / largest)
    if scale == "ue8m0":
        scales = _next_power_of_two(scales)
    scaled = jnp.clip(_divided(x, jnp.broadcast_to(scales[..., None], x.shape)), -largest, largest)
    return (jnp.round(scaled) if kind == "int8" else to_e4m3(scaled)).astype(dtype), scales


def _divided(x: Array, divisor: Array) -> Array:
    # XLA's CPU compiler would multiply by the reciprocal of a broadcast divisor; past the barrier it cannot see one.
    # For GPUs it divides. There the barrier would have the divisor written to memory, 4 bytes for each number of x.
    plain, behind = lambda x, y: x / y, lambda x, y: x / lax.optimization_barrier(y)
    return lax.platform_dependent(x, divisor, cuda=plain, default=behind)


def _next_power_of_two(x: Array) -> Array:
    """The smallest power of two that is at least x, for normal positive float32; NaN and inf stay."""
    bits = lax.bitcast_convert_type(x, jnp.int32)
    has_fraction = ((bits & 0x7FFFFF) != 0).astype(jnp.int32)
    power = lax.bitcast_convert_type(((bits >> 23) + has_fraction) << 23, jnp.float32)
    return jnp.where(jnp.isfinite(x), power, x)
