"""Latents of the sparse attention in 8 bits: 656 bytes a token of DeepSeek-V3.2 in place of 1152.

The values, which are also most of the key, are e4m3 with a scale for each 128 of them. The rope part stays bfloat16:
its rounding would reach every logit. Scales are powers of two, so that values are exact in bfloat16, in which the
kernels multiply.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array, lax

from hisa_jax import checks
from hisa_jax.quantize import ScaleFormat, quantize_groups
from hisa_jax.xla.rounding import widened

GROUP = 128  # values that share a scale


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantizedLatents:
    """Latents of `sparse_mla` in 8 bits; the gradient does not go through them.

    Attributes:
        values: [..., S, V] float8_e4m3fn, the first V features, V a multiple of 128 or below 128.
        scales: [..., S, ceil(V / 128)] float32, of each 128 of them.
        rope: [..., S, R] bfloat16, the other features.
    """

    values: Array
    scales: Array
    rope: Array

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the latents, [..., S, V + R]."""
        return (*self.values.shape[:-1], self.values.shape[-1] + self.rope.shape[-1])

    @property
    def value_dim(self) -> int:
        """V."""
        return self.values.shape[-1]

    def dequantize(self) -> Array:
        """Float32 latents, [..., S, V + R]."""
        grouped = widened(self.values).reshape(*self.scales.shape, self.value_dim // self.scales.shape[-1])
        values = (grouped * self.scales[..., None]).reshape(self.values.shape)
        return jnp.concatenate([values, widened(self.rope)], axis=-1)

    def to_bytes(self) -> Array:
        """[..., S, V + 4 ceil(V / 128) + 2 R] uint8: a token's values, scales and rope part in a row, as FlashMLA has
        them."""
        return jnp.concatenate([_bytes_of(x) for x in (self.values, self.scales, self.rope)], axis=-1)

    @classmethod
    def from_bytes(cls, rows: Array, value_dim: int = 512) -> "QuantizedLatents":
        """The reverse of `to_bytes`.

        Args:
            rows: [..., S, bytes] uint8.
            value_dim: V.

        Raises: TypeError: another dtype. ValueError: rows that are too short or no such rows.
        """
        call = "QuantizedLatents.from_bytes"
        checks.dtype(call, "rows", rows, ("uint8",))
        groups, end = n_groups(call, value_dim), value_dim + 4 * n_groups(call, value_dim)
        if not rows.ndim or rows.shape[-1] < end or (rows.shape[-1] - end) % 2:
            raise ValueError(f"{call}: rows is {checks.axes_of(rows)}, wanted rows of {end} bytes and 2 a rope feature")
        cast = lax.bitcast_convert_type
        return cls(
            values=cast(rows[..., :value_dim], jnp.float8_e4m3fn),
            scales=cast(rows[..., value_dim:end].reshape(*rows.shape[:-1], groups, 4), jnp.float32),
            rope=cast(rows[..., end:].reshape(*rows.shape[:-1], (rows.shape[-1] - end) // 2, 2), jnp.bfloat16),
        )


def quantize_latents(latents: Array, value_dim: int = 512, scale: ScaleFormat = "ue8m0") -> QuantizedLatents:
    """Quantises the latents of `sparse_mla` token by token, 128 values at a time; the rest becomes bfloat16.

    Args:
        latents: [..., S, Dk] float32 or bfloat16, latent then rope part.
        value_dim: the first so many features are the values, a multiple of 128 or less than 128.
        scale: "ue8m0" rounds scales up to powers of two, with which values are exact in bfloat16; "float32" does not.

    Returns: `QuantizedLatents`.
    Raises: TypeError: a dtype not listed above. ValueError: sizes that do not fit, a scale format not listed above.
    Source: the cache of FlashMLA's sparse decoding: 512 e4m3, 4 float32 scales, 64 bfloat16.
    Example:
        >>> quantized = hj.quantize_latents(jnp.ones((2, 8, 576)))
        >>> quantized.shape, quantized.to_bytes().shape
        ((2, 8, 576), (2, 8, 656))
    """
    call = "quantize_latents"
    checks.dtype(call, "latents", latents, ("bfloat16", "float32"))
    checks.integer(call, "value_dim", value_dim, 1)
    if not latents.ndim:
        raise ValueError(f"{call}: latents is {checks.axes_of(latents)}, wanted [..., Dk]")
    if latents.shape[-1] < value_dim:
        raise ValueError(f"{call}: value_dim={value_dim}, wanted at most {latents.shape[-1]}, latents' last axis")
    groups = n_groups(call, value_dim)
    grouped = latents[..., :value_dim].reshape(*latents.shape[:-1], groups, value_dim // groups)
    values, scales = quantize_groups(call, "latents", grouped, jnp.float8_e4m3fn, scale)
    rope = latents[..., value_dim:].astype(jnp.bfloat16)
    return QuantizedLatents(values.reshape(*latents.shape[:-1], value_dim), scales, rope)


def n_groups(call: str, value_dim: int, name: str = "value_dim") -> int:
    """How many scales a token has; raises ValueError unless groups are whole."""
    if value_dim > GROUP and value_dim % GROUP:
        raise ValueError(f"{call}: {name}={value_dim}, wanted a multiple of {GROUP}, or less")
    return -(-value_dim // GROUP)


def check_latents(call: str, name: str, x: "Array | QuantizedLatents", lead: tuple[int | str, ...], why: str) -> None:
    """Raises unless these are latents with the axes `lead` before the last one."""
    if not isinstance(x, QuantizedLatents):
        checks.dtype(call, name, x, ("bfloat16", "float32"))
        checks.shape(call, name, x, (*lead, "Dk"), why)
        return
    parts: dict[str, tuple[str, int | str]] = {
        "values": ("float8_e4m3fn", "V"),
        "scales": ("float32", n_groups(call, x.values.shape[-1] if x.values.ndim else 1)),
        "rope": ("bfloat16", "R"),
    }
    for part, (dtype, last) in parts.items():
        checks.dtype(call, f"{name}.{part}", getattr(x, part), (dtype,))
        checks.shape(call, f"{name}.{part}", getattr(x, part), (*lead, last), why)
        lead = x.values.shape[:-1]  # the others as the first


def _bytes_of(x: Array) -> Array:
    """[..., n] -> [..., n * itemsize] uint8."""
    found = lax.bitcast_convert_type(x, jnp.uint8)
    return found if x.dtype.itemsize == 1 else found.reshape(*x.shape[:-1], x.shape[-1] * x.dtype.itemsize)
