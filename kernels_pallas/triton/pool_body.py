"""Device code of `pool`: one block a program."""

import jax.numpy as jnp

from kernels_pallas.types import Ref

_E4M3_MAX = 448.0


def pool_body(k_ref: Ref, count_ref: Ref, *refs: Ref, n_parts: int) -> None:
    *k_scale_ref, o_ref, scale_ref = refs  # in: [block_size, D], [1], maybe [block_size]; out: [parts, D], [1]
    count = count_ref[0]
    values = k_ref[...].astype(jnp.float32)
    if k_scale_ref:
        values = values * k_scale_ref[0][...][:, None]
    present = jnp.arange(values.shape[0], dtype=jnp.int32)[:, None] < count
    # A select, not a product with 0: absent rows may hold NaN.
    total = jnp.sum(jnp.where(present, values, 0.0), axis=0)
    rest = total / jnp.maximum(count, 1).astype(jnp.float32)
    if n_parts > 1:
        scale = jnp.maximum(jnp.max(jnp.abs(rest)), 1e-30) / _E4M3_MAX
        scale_ref[0] = scale
        rest = jnp.minimum(jnp.maximum(rest / scale, -_E4M3_MAX), _E4M3_MAX)
    for part in range(n_parts):
        rounded = rest.astype(o_ref.dtype)
        o_ref[part, :] = rounded
        rest = rest - rounded.astype(jnp.float32)
