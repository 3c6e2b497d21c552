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

from hisa_jax.kernels_pallas.operands import KeptBlocks, Operands
from hisa_jax.kernels_pallas.triton.launch import whole
from hisa_jax.kernels_pallas.triton.pool import check_addressable
from hisa_jax.kernels_pallas.triton.refine_body import Inputs, Plan, refine_body


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Tile sizes: they change the speed, never the result."""

    tile_s: int = 64  # keys at a time, at most a block: 1.45 ms with 128, 1.37 with 64
    tile_m: int = 64  # blocks a program: 1.50 ms with 16
    num_warps: int = 4
    num_stages: int = 3


def why_not(H: int, D: int, block_size: int, dtype: DTypeLike) -> str | None:
    """None, or why this kernel cannot run a shape; neither can that of mosaic_gpu."""
    dtype = jnp.dtype(dtype)
    if dtype not in (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float8_e4m3fn)):
        return f"needs float8_e4m3fn or bfloat16 keys and queries, not {dtype.name}"
    if H not in (16, 32, 64, 128) or D not in (64, 128):
        return f"needs 16, 32, 64 or 128 heads of size 64 or 128, not {H} of {D}"
    if block_size not in (32, 64, 128, 256):
        return f"needs blocks of 32, 64, 128 or 256 tokens, not {block_size}"
    return None


def heuristic(H: int, block_size: int) -> Config:
    """More heads take more registers a key."""
    return Config(tile_s=min(64 if H <= 64 else 32, block_size))


@functools.partial(jax.jit, static_argnames=("config", "interpret"))
def refine_scores(operands: Operands, kept: KeptBlocks, *, config: Config, interpret: bool = False) -> Array:
    """Keys [S, D] -> [T, m * kept.size] int32 sort keys, as in mosaic_gpu; with pages, tiles are at most a page."""
    q, w, k, k_scale, pages = operands
    (T, H, D), m = q.shape, kept.ids.shape[1]
    check_addressable(k)
    tile_m = min(config.tile_m, m)
    first = kept.first[:, None]
    listed = None if pages is None else pages.of_blocks(first + jnp.maximum(kept.ids, 0), kept.size)
    row = lambda *shape: pl.BlockSpec((None, *shape), lambda t, j: (t,) + (0,) * len(shape))  # noqa: E731
    inputs = Inputs(q, w, kept.ids, kept.visible, first if listed is None else None, listed, k, k_scale)
    in_specs = Inputs(
        q=row(H, D),
        w=row(H),
        block_ids=row(m),
        visible=pl.BlockSpec((1,), lambda t, j: (t,)),
        first_block=row(1) if listed is None else None,
        pages=None if listed is None else row(listed.shape[1]),
        k=whole(k),
        k_scale=whole(k_scale),
    )
    page_size = None if pages is None else pages.size
    plan = Plan(block_size=kept.size, page_size=page_size, tile_s=config.tile_s, tile_m=tile_m)
    return pl.pallas_call(
        functools.partial(refine_body, plan=plan),
        grid=(T, -(-m // tile_m)),
        in_specs=[in_specs],
        out_specs=row(m * kept.size),
        out_shape=jax.ShapeDtypeStruct((T, m * kept.size), jnp.int32),
        compiler_params=plt.CompilerParams(num_warps=config.num_warps, num_stages=config.num_stages),
        name="hisa_refine",
        interpret=interpret,
    )(inputs)
