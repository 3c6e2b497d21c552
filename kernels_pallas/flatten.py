"""Batches to the flat arrays that the kernels take, the same for every backend."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array


def whole_blocks(k: Array, k_scale: Array | None, block_size: int) -> tuple[Array, Array | None]:
    """Pads [B, S, D] and [B, S] with zeros to a multiple of `block_size` tokens."""
    missing = -k.shape[1] % block_size
    if missing:
        k = jnp.pad(k, ((0, 0), (0, missing), (0, 0)))
        k_scale = None if k_scale is None else jnp.pad(k_scale, ((0, 0), (0, missing)))
    return k, k_scale


def over_batch(
    f: Callable, q: Array, k: Array, k_scale: Array | None, w: Array, visible: Array, **options: object
) -> Any:
    """f(q, w, k, k_scale, visible, n_sequences=B, ...) on [B * T, ...] and [B * S, ...]; and back to [B, T, ...]."""
    B, T, H, D = q.shape
    out = f(
        q.reshape(B * T, H, D),
        w.reshape(B * T, H),
        k.reshape(-1, D),
        None if k_scale is None else k_scale.reshape(-1),
        visible.reshape(-1),
        n_sequences=B,
        **options,
    )
    return tuple(x.reshape(B, T, *x.shape[1:]) for x in out)


def tokens_present(lengths: Array | None, B: int, S: int, block_size: int) -> Array | np.ndarray:
    """[B] or None (all S) -> [B * S // block_size] int32: tokens present in each block."""
    if lengths is None:
        return np.full((B * S // block_size,), block_size, np.int32)  # a constant: no kernel to work it out
    starts = jnp.arange(S // block_size, dtype=jnp.int32) * block_size
    return jnp.clip(lengths[:, None] - starts, 0, block_size).reshape(-1)
