"""Sketches: keys in fewer bits, which the scan reads in place of the keys themselves.

A sketch is a function of a key alone, so that what a cache keeps of it is only a copy. Nothing depends on how a
compiler divides or rounds: products are exact, but one whose result is mended. So the GPU kernel that appends, which
takes `packed_halves` from here, writes the bits that XLA does.
"""

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

from hisa_jax.xla.rounding import widened

GROUP = 32  # numbers with one scale
HALF = GROUP // 2  # numbers in the low 4 bits of a group's bytes, and in the high ones
_LARGEST = 7  # of the whole numbers in 4 bits that have a negative
ZERO = 8  # what stands for 0, so that no code is negative
_STEP = 1 << 19  # between the bits of neighbouring float32 of 5 significant bits
_SEVENTH = (1 + 2**-20) / 7  # of which a product is no less than the seventh itself
_LEAST = 2.0**-120  # below it a group is all zeros: products would leave the normal numbers, which some hardware drops


def int4(values: Array) -> Array:
    """[..., D] -> [..., D]: each number as one of -7 to 7 times the scale of its 32 neighbours, in float32 or bfloat16.

    A scale is a seventh of the group's largest magnitude, rounded up to 5 significant bits: a whole number of 3 bits
    times it is a bfloat16 exactly. A tie goes to the smaller magnitude. A group with a number that is not finite is
    NaN. A token of 128 numbers takes 72 bytes: 4 bits a number, a bfloat16 a group.
    """
    groups = _groups(values)
    scales = _scale_of(groups)
    return _numbers(_code_of(groups, scales), scales, values.shape[-1], values.dtype)


def pack(values: Array) -> tuple[Array, Array]:
    """[..., D] -> the sketch as it is kept: [..., bytes] uint8, 16 a group, and scales [..., groups] bfloat16.

    Byte i of a group holds its number i in the low 4 bits and number i + 16 in the high ones, each plus 8. So the 16
    bytes that a GPU loads at once have one scale, and masks and shifts of whole registers give two runs of numbers.
    """
    groups = _groups(values)
    codes, scales = packed_halves(groups[..., :HALF], groups[..., HALF:])
    return codes.astype(jnp.uint8).reshape(*values.shape[:-1], -1), scales


def packed_halves(low: Array, high: Array) -> tuple[Array, Array]:
    """First and last 16 numbers of groups, [..., 16] float32 each -> bytes [..., 16] int32, scales [...] bfloat16."""
    scales = _scale_of(low, high)
    codes = (_code_of(low, scales) + ZERO) | ((_code_of(high, scales) + ZERO) << 4)
    # What is cut off is 0. The bits of a NaN stay, too.
    bits = (lax.bitcast_convert_type(scales, jnp.int32) >> 16).astype(jnp.int16)
    return codes, lax.bitcast_convert_type(bits, jnp.bfloat16)


def unpack(codes: Array, scales: Array, D: int, dtype: DTypeLike) -> Array:
    """What `int4` gives of keys of a dtype, [..., D], from what `pack` does."""
    by_group = codes.reshape(*scales.shape, 1, HALF)
    shifts = (jnp.arange(2, dtype=jnp.uint8) * 4).reshape((1,) * scales.ndim + (2, 1))
    numbers = ((by_group >> shifts) & 15).astype(jnp.int32) - ZERO
    return _numbers(numbers.reshape(*scales.shape, GROUP), scales.astype(jnp.float32), D, dtype)


def sizes(D: int) -> tuple[int, int]:
    """How many bytes and scales the sketch of a key of D numbers has; the last group may be filled up with zeros."""
    n_groups = -(-D // GROUP)
    return n_groups * HALF, n_groups


def _groups(values: Array) -> Array:
    """[..., D] -> [..., groups, 32] float32."""
    missing = ((0, 0),) * (values.ndim - 1) + ((0, -values.shape[-1] % GROUP),)
    return jnp.pad(widened(values), missing).reshape(*values.shape[:-1], -1, GROUP)


def _scale_of(*parts: Array) -> Array:
    """[..., n] float32, parts of groups -> [...] float32, the scales of the groups."""
    # Compilers' maxima may lose a NaN, so infinity stands for it.
    magnitudes = (jnp.abs(part) for part in parts)
    each = [jnp.max(jnp.where(magnitude < jnp.inf, magnitude, jnp.inf), axis=-1) for magnitude in magnitudes]
    largest = each[0] if len(each) == 1 else jnp.maximum(*each)
    # With its last bits cut off, a product that is a little too large is what is wanted or the number below it.
    bits = lax.bitcast_convert_type(largest * _SEVENTH, jnp.int32) & -_STEP
    is_less = lax.bitcast_convert_type(bits, jnp.float32) * _LARGEST < largest
    scale = lax.bitcast_convert_type(jnp.where(is_less, bits + _STEP, bits), jnp.float32)
    scale = jnp.where(largest < _LEAST, 0.0, scale)
    return jnp.where(largest < jnp.inf, scale, jnp.nan)


def _code_of(numbers: Array, scales: Array) -> Array:
    """[..., n] float32, [...] -> [..., n] int32 from -7 to 7."""
    magnitudes, scales = jnp.abs(numbers), scales[..., None]
    above = [(magnitudes > (i + 0.5) * scales).astype(jnp.int32) for i in range(_LARGEST)]
    codes = jnp.where(scales > 0, sum(above[1:], above[0]), 0)
    return jnp.where(numbers < 0, -codes, codes)


def _numbers(codes: Array, scales: Array, D: int, dtype: DTypeLike) -> Array:
    """[..., groups, 32] int32, [..., groups] float32 -> [..., D]."""
    numbers = codes.astype(jnp.float32) * scales[..., None]
    numbers = numbers.reshape(*scales.shape[:-1], -1)[..., :D]
    return numbers if dtype == jnp.float32 else numbers.astype(jnp.bfloat16)
