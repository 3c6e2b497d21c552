"""Sparse multi-head latent attention, forward: every query attends to the tokens its indexer chose.
    o[t, n] = softmax_s(scale * q[t, n] . kv[s]) @ kv[s, :value_dim], s in indices[t];   lse[t, n] = log sum_s exp(...)

Floor, 4096 queries of dsv32 (128 heads, 576 / 512, 2048 tokens) in bfloat16 on an H200: 2.3 PFLOP / 990 TFLOP/s = 2.4
ms. A program takes 32 heads of one query and gathers 64 rows of kv at a time by pointer. With few queries (decode)
the list is split over `n_splits` programs, whose partial results `combine` adds up by their log-sum-exps.

Latents in 8 bits are 656 bytes a token in place of 1152. A tile's values are multiplied by their scales and rounded to
bfloat16, in registers, then all is as before.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jax.typing import DTypeLike

from hisa_jax.kernels_pallas.bits import in_32_bits
from hisa_jax.kernels_pallas.triton import capability
from hisa_jax.kernels_pallas.triton.combine import combine
from hisa_jax.kernels_pallas.triton.launch import whole
from hisa_jax.kernels_pallas.triton.pool import check_addressable
from hisa_jax.kernels_pallas.triton.sparse_mla_body import Inputs, Plan, sparse_mla_body
from hisa_jax.kernels_pallas.tuning import tuned
from hisa_jax.latents import QuantizedLatents


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Tile sizes: they change the speed and the last bits, nothing else."""

    tile_n: int = 32  # heads a program
    tile_s: int = 64  # tokens at a time: 16.0 ms with 64 heads and 32 tokens, 12.6 with 64 and 64, 10.4 with 32 and 64
    n_splits: int = 1
    num_warps: int = 4
    num_stages: int = 2


def why_not(
    compute_capability: str, N: int, key_dim: int, value_dim: int, dtype: DTypeLike, is_quantized: bool = False
) -> str | None:
    """None, or why this kernel cannot run a shape."""
    for kind in (dtype, jnp.float8_e4m3fn) if is_quantized else (dtype,):
        if reason := capability.why_not(compute_capability, kind):
            return reason
    if jnp.dtype(dtype) != jnp.dtype(jnp.bfloat16):
        return f"needs bfloat16, not {jnp.dtype(dtype).name}"
    if value_dim & (value_dim - 1) or (key_dim - value_dim) & (key_dim - value_dim - 1) or key_dim < value_dim + 16:
        return f"needs a value size and a rest of the key size that are powers of two, not {value_dim} of {key_dim}"
    return None if N >= 16 else f"needs at least 16 heads, not {N}"


def heuristic(n_queries: int, N: int, K: int, tiles: Config | None = None, n_sms: int = 132) -> Config:
    """Splits the token list until every multiprocessor has a program, but into no less than 128 tokens.

    `tiles`: tile sizes that were found by measurement.
    """
    config = tiles or Config(tile_n=min(32, pl.next_power_of_2(N)))
    programs = n_queries * -(-N // config.tile_n)
    n_splits = 1
    while programs * n_splits < n_sms and K // (2 * n_splits) >= 128:
        n_splits *= 2
    return dataclasses.replace(config, n_splits=n_splits)


@in_32_bits
@functools.partial(jax.jit, static_argnames=("value_dim", "scale", "config", "interpret"))
def sparse_mla(
    q: Array,
    kv: Array | QuantizedLatents,
    indices: Array,
    *,
    value_dim: int,
    scale: float,
    config: Config | None = None,
    interpret: bool = False,
) -> tuple[Array, Array]:
    """[B, T, N, E], [B, S, E], [B, T, K] int32 -> [B, T, N, value_dim] in the dtype of q, [B, T, N] float32 lse.

    Args:
        kv: bfloat16, or in 8 bits.
        indices: token positions in any order; any that is not one of 0 .. S - 1 stands for none. A token listed twice
            counts twice. A query with none gives zeros and an lse of -inf.
    """
    (B, T, N, E), S, K = q.shape, kv.shape[1], indices.shape[2]
    if config is None:
        tiles = tuned(Config, "triton.sparse_mla", N=N, key_dim=E, value_dim=value_dim)
        if isinstance(kv, QuantizedLatents):  # with 4 warps conversions spill registers
            tiles = Config(tile_n=min(32, pl.next_power_of_2(N)), num_warps=8)
        config = heuristic(B * T, N, K, tiles)
    tile_n, n_splits = config.tile_n, config.n_splits
    # Whole tiles of heads: before jax 0.12 nothing keeps a program from the rows after the last head.
    q = jnp.pad(q.reshape(B * T, N, E), ((0, 0), (0, -N % tile_n), (0, 0)))
    heads = q.shape[1]
    per_split = -(-K // (n_splits * config.tile_s)) * config.tile_s
    indices = jnp.pad(indices.reshape(B * T, K), ((0, 0), (0, n_splits * per_split - K)), constant_values=-1)
    out = lambda *shape: pl.BlockSpec((None, None, tile_n, *shape), lambda t, n, i: (i, t, n, *(0 for _ in shape)))  # noqa: E731
    if isinstance(kv, QuantizedLatents):
        check_addressable(kv.values, "kv")
    kv = jax.tree.map(lambda x: x.reshape(B * S, x.shape[2]), kv)
    in_specs = Inputs(
        q=pl.BlockSpec((None, tile_n, E), lambda t, n, i: (t, n, 0)),
        kv=whole(kv),
        indices=pl.BlockSpec((None, per_split), lambda t, n, i: (t, i)),
    )
    plan = Plan(queries=T, keys=S, scale=scale, tile_s=config.tile_s, value_dim=value_dim)
    partial, lse = pl.pallas_call(
        functools.partial(sparse_mla_body, plan=plan),
        grid=(B * T, heads // tile_n, n_splits),
        in_specs=[in_specs],
        out_specs=[out(value_dim), out()],
        out_shape=[
            jax.ShapeDtypeStruct((n_splits, B * T, heads, value_dim), q.dtype if n_splits == 1 else jnp.float32),
            jax.ShapeDtypeStruct((n_splits, B * T, heads), jnp.float32),
        ],
        compiler_params=plt.CompilerParams(num_warps=config.num_warps, num_stages=config.num_stages),
        name="sparse_mla",
        interpret=interpret,
    )(Inputs(q, kv, indices))
    o, lse = (partial[0], lse[0]) if n_splits == 1 else combine(partial, lse, q.dtype, interpret)
    return o[:, :N].reshape(B, T, N, value_dim), lse[:, :N].reshape(B, T, N)
