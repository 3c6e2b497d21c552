"""The tokens that a scan samples for its slopes, where several devices share the keys: all devices get all of them.

A query that sees so many tokens has samples 2^j apart. So sequences have a set of 256 for each j, 33 KB of keys in 8
bits, or queries one each, if that is less: each device puts in what it has, and the sum is what is sampled.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

from hisa_jax.kernels_pallas.communicator import Communicator
from hisa_jax.kernels_pallas.flat_call import FlatCall

N_SAMPLES, N_BEST = 256, 32


class Samples(NamedTuple):
    """Sampled keys, set by set.

    Attributes:
        k: [sets * 256, D]; `k_scale`: [sets * 256] float32, or None where every scale is 1.
        first: [T] int32, the row of the first sample of each query.
    """

    k: Array
    k_scale: Array | None
    first: Array


def shift_of_samples(visible: Array) -> Array:
    """int32 -> j of the least power of two 2^j that leaves at most 256: the bit length of (visible - 1) / 256."""
    return 32 - lax.clz(lax.shift_right_logical(jnp.maximum(visible - 1, 0), jnp.int32(8)))


def of_all_devices(call: FlatCall, visible: Array, devices: Communicator) -> Samples:
    """What `visible` [T] int32 samples: tokens that each query sees on all devices; the call has this device's keys."""
    T, R, sequences = call.q.shape[0], len(call.sequences.lengths), call.sequences
    n_shifts = ((devices.n * sequences.max_keys - 1) >> 8).bit_length() + 1
    shift = shift_of_samples(visible)
    if R * n_shifts >= T:
        shifts, starts, sets = shift, sequences.key_start_of_queries(T), jnp.arange(T, dtype=jnp.int32)
    else:
        shifts = jnp.tile(jnp.arange(n_shifts, dtype=jnp.int32), R)
        starts = jnp.repeat(jnp.asarray(sequences.key_starts), n_shifts)
        sequence = jnp.minimum(sequences.of_queries(T), R - 1)  # padding counts as of the last
        sets = sequence * n_shifts + jnp.minimum(shift, n_shifts - 1)
    positions = jnp.arange(N_SAMPLES, dtype=jnp.int32)[None, :] << shifts[:, None]
    # Of places beyond a sequence's end any key will do: no query sees them.
    place = jnp.minimum(devices.own(positions), sequences.max_keys - 1)
    rows = (starts[:, None] + place).reshape(-1)
    rows = jnp.clip(rows, 0, call.k.shape[0] - 1) if call.pages is None else call.pages.rows(rows)
    k, k_scale = call.k[rows], call.k_scale
    words = [_words(k), *([] if k_scale is None else [_words(k_scale[rows][:, None])])]
    mine = jnp.where(devices.owns(positions).reshape(-1, 1), jnp.concatenate(words, axis=1), 0)
    n = words[0].shape[1]
    mine = devices.total(mine)
    return Samples(
        k=_of_words(mine[:, :n], k.dtype),
        k_scale=None if k_scale is None else _of_words(mine[:, n:], k_scale.dtype)[:, 0],
        first=sets * N_SAMPLES,
    )


def _words(x: Array) -> Array:
    """[n, D] -> [n, bytes / 4] int32, the same bits: a sum with zeros keeps them, whatever number they are."""
    each = 4 // x.dtype.itemsize
    x = x if each == 1 else x.reshape(len(x), -1, each)
    return lax.bitcast_convert_type(x, jnp.int32)


def _of_words(words: Array, dtype: DTypeLike) -> Array:
    """Inverts `_words`."""
    return lax.bitcast_convert_type(words, dtype).reshape(len(words), -1)
