"""Sketches: keys in fewer bits, which the scan reads in place of the keys themselves.

A sketch is a function of a key alone, so that what a cache keeps of it is only a copy.
"""

import jax.numpy as jnp
from jax import Array, lax

from hisa_jax.layout import Keys
from hisa_jax.methods import Sketch

GROUP = 32  # numbers with one scale
_LARGEST = 7  # of the whole numbers in 4 bits that have a negative
_DROPPED = (1 << 19) - 1  # of the 23 bits of a float32's fraction: 4 stay
# Compilers divide as they like, by a reciprocal for example: what is decided lies this far from where keys can be.
_MARGIN_ULPS = 16
_MARGIN = 2.0**-20


def sketched(keys: Keys, sketch: Sketch | None) -> Keys:
    """What the scan multiplies: the keys, or what is left of them in a sketch, by the same scales of tokens."""
    if sketch is None:
        return keys
    return keys._replace(values=int4(keys.values))


def int4(values: Array) -> Array:
    """[..., D] -> [..., D]: each number as one of -7 to 7 times the scale of its 32 neighbours, in float32 or bfloat16.

    A scale is a seventh of the group's largest magnitude, rounded up to 5 significant bits: a whole number of 3 bits
    times it is a bfloat16 exactly. A tie goes to the smaller magnitude. A token of 128 numbers takes 72 bytes: 4 bits a
    number, a bfloat16 a group.
    """
    D = values.shape[-1]
    wide = jnp.pad(values.astype(jnp.float32), ((0, 0),) * (values.ndim - 1) + ((0, -D % GROUP),))
    groups = wide.reshape(*values.shape[:-1], -1, GROUP)
    seventh = jnp.max(jnp.abs(groups), axis=-1, keepdims=True) / _LARGEST
    bits = lax.bitcast_convert_type(seventh, jnp.int32)
    scale = lax.bitcast_convert_type((bits + (_DROPPED - _MARGIN_ULPS)) & ~_DROPPED, jnp.float32)
    # A compiled maximum may lose a NaN.
    scale = jnp.where(jnp.all(jnp.isfinite(groups), axis=-1, keepdims=True), scale, jnp.nan)
    codes = jnp.where(scale > 0, jnp.round(groups / scale * (1 - _MARGIN)), 0.0)
    approximate = (codes * scale).reshape(wide.shape)[..., :D]
    return approximate.astype(values.dtype if values.dtype == jnp.float32 else jnp.bfloat16)
