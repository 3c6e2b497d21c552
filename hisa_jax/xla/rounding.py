"""Roundings that no compiler drops.

A number that a program rounds to fewer bits and reads again in the same program, XLA may read as it was before
(`xla_allow_excess_precision`): on GPUs bfloat16 and e4m3, on TPUs bfloat16. What pages say of their keys would then not
be of the keys that they hold. So what is to be e4m3 is rounded before its conversion, which then changes nothing, and
what is read in float32 is rounded once more after it.
"""

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

E4M3_MAX = 448.0
_E4M3_TIE = 464.0  # up to here a conversion gives 448, beyond it NaN
_LEAST_NORMAL, _STEP = 2.0**-6, 2.0**-9  # below the first, e4m3 are multiples of the second
# A float32 so large that its last bit stands for such a step, and its bits.
_BESIDE = 1.5 * 2**23 * _STEP
_BESIDE_BITS = int(np.float32(_BESIDE).view(np.int32))
_SIGN = -(1 << 31)


def to_e4m3(x: Array) -> Array:
    """Float32 of magnitude 448 at most -> the nearest numbers that e4m3 has, in float32; ties to even, NaN stay.

    Compilers that convert by way of float16 round twice, and ties come out wrong. For kernels, too.
    """
    bits = lax.bitcast_convert_type(x, jnp.int32)
    normal = lax.bitcast_convert_type((bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000, jnp.float32)
    # The sum is rounded to whole steps, ties to even, and its bits less those of _BESIDE are how many. They are taken
    # apart as integers: of floats a compiler might simplify (x + a) - a to x.
    steps = lax.bitcast_convert_type(jnp.abs(x) + _BESIDE, jnp.int32) - _BESIDE_BITS
    small = lax.bitcast_convert_type(steps.astype(jnp.float32) * _STEP, jnp.int32) | (bits & _SIGN)
    rounded = jnp.where(jnp.abs(x) < _LEAST_NORMAL, lax.bitcast_convert_type(small, jnp.float32), normal)
    return jnp.where(x == x, rounded, x)


def widened(x: Array) -> Array:
    """Numbers in float32, as they are stored, whatever made them in the same program."""
    wide = x.astype(jnp.float32)
    if x.dtype == jnp.bfloat16:
        return lax.reduce_precision(wide, 8, 7)
    if x.dtype == jnp.float8_e4m3fn:
        return jnp.where(jnp.abs(wide) <= _E4M3_TIE, to_e4m3(wide), jnp.nan)
    return wide
