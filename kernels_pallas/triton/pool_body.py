"""Device code of `pool`: one block a program; and how a mean becomes numbers that the tensor core takes."""

import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

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
    parts, scale = split(total / jnp.maximum(count, 1).astype(jnp.float32), n_parts, o_ref.dtype)
    if scale is not None:
        scale_ref[0] = scale
    for part, rounded in enumerate(parts):
        o_ref[part, :] = rounded


def split(mean: Array, n_parts: int, dtype: DTypeLike) -> tuple[list[Array], Array | None]:
    """[..., D] float32 -> numbers of a dtype, each holding what those before left, and their scale [...] if several."""
    rest, scale = mean, None
    if n_parts > 1:
        scale = jnp.maximum(jnp.max(jnp.abs(rest), axis=-1), 1e-30) / _E4M3_MAX
        whole = scale if mean.ndim == 1 else scale[..., None]
        rest = jnp.minimum(jnp.maximum(rest / whole, -_E4M3_MAX), _E4M3_MAX)
    parts = []
    for _ in range(n_parts):
        parts.append(rest.astype(dtype))
        rest = rest - parts[-1].astype(jnp.float32)
    return parts, scale
