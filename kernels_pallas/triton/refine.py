"""Sort keys of the token scores in the kept blocks of each query; `topk` follows.
    x[t, j * block_size + i] = sort_key(k_scale[s] * sum_h w[t, h] * relu(q[t, h] . k[s])), s token i of block_ids[t, j]

Floor, 4096 queries of dsv32, m = 64, in bfloat16 on an H200: 550 GFLOP / 990 TFLOP/s = 0.56 ms, and 134 MB of sort keys
written. A program takes `tile_m` blocks of one query, so its heads are loaded once for them.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jax.typing import DTypeLike

from hisa_jax.kernels_pallas.pages import Pages
from hisa_jax.kernels_pallas.triton.pool import check_addressable
from hisa_jax.kernels_pallas.triton.refine_body import refine_body


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Tile sizes: they change the speed, never the result."""

    tile_s: int = 64  # keys at a time, at most a block: 1.45 ms with 128, 1.37 with 64
    tile_m: int = 64  # blocks a program: 1.50 ms with 16
    num_warps: int = 4
    num_stages: int = 3


def why_not(H: int, D: int, block_size: int, dtype: DTypeLike) -> str | None:
    """None, or why this kernel cannot run a shape."""
    dtype = jnp.dtype(dtype)
    if dtype not in (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float8_e4m3fn)):
        return f"needs bfloat16 or float8_e4m3fn keys and queries, not {dtype.name}"
    if H not in (16, 32, 64, 128) or D not in (64, 128):
        return f"needs 16, 32, 64 or 128 heads of size 64 or 128, not {H} of {D}"
    if block_size not in (32, 64, 128, 256):
        return f"needs blocks of 32, 64, 128 or 256 tokens, not {block_size}"
    return None


def heuristic(H: int, block_size: int) -> Config:
    """More heads take more registers a key."""
    return Config(tile_s=min(64 if H <= 64 else 32, block_size))


@functools.partial(jax.jit, static_argnames=("block_size", "config", "interpret"))
def refine_scores(
    q: Array,
    w: Array,
    k: Array,
    k_scale: Array | None,
    block_ids: Array,
    visible: Array,
    first_block: Array,
    pages: Pages | None = None,
    *,
    block_size: int,
    config: Config,
    interpret: bool = False,
) -> Array:
    """[T, H, D], [T, H], [S, D], [S], [T, m], [T], [T] -> [T, m * block_size] int32 sort keys, as in mosaic_gpu.

    Args:
        pages: where the rows of all sequences are in k; tiles are at most a page.
    """
    (T, H, D), m = q.shape, block_ids.shape[1]
    check_addressable(k)
    tile_m = min(config.tile_m, m)
    places, page_size = first_block[:, None], None
    if pages is not None:
        places, page_size = pages.of_blocks(places + jnp.maximum(block_ids, 0), block_size), pages.size
    row = lambda *shape: pl.BlockSpec((None, *shape), lambda t, j: (t,) + (0,) * len(shape))  # noqa: E731
    whole = lambda x: pl.BlockSpec(x.shape, lambda t, j: (0,) * x.ndim)  # noqa: E731
    one = pl.BlockSpec((1,), lambda t, j: (t,))
    in_specs = [row(H, D), row(H), row(m), one, row(places.shape[1]), whole(k)]
    operands = [q, w, block_ids, visible, places, k]
    if k_scale is not None:
        in_specs.append(whole(k_scale))
        operands.append(k_scale)
    return pl.pallas_call(
        functools.partial(refine_body, block_size=block_size, page_size=page_size, tile_s=config.tile_s, tile_m=tile_m),
        grid=(T, -(-m // tile_m)),
        in_specs=in_specs,
        out_specs=row(m * block_size),
        out_shape=jax.ShapeDtypeStruct((T, m * block_size), jnp.int32),
        compiler_params=plt.CompilerParams(num_warps=config.num_warps, num_stages=config.num_stages),
        name="hisa_refine",
        interpret=interpret,
    )(*operands)
