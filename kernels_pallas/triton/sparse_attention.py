"""Sparse grouped-query attention, forward: every query attends to the tokens or blocks that are listed for its group.
    o[t, h] = softmax_s(scale * q[t, h] . k[s, g]) @ v[s, g], s in lists[t, g];   lse[t, h] = log sum_s exp(...)

Floor, 4096 queries of 64 heads in 4 groups of 128, 2048 tokens each, bfloat16, on an H200: 0.27 TFLOP / 990 TFLOP/s =
0.28 ms. A program reads its query's keys and values for one group, all programs 17 GB: the second level cache binds.
One sequence of a decode is bound by how many programs there are, 128 by device memory: 0.54 GB / 4.3 TB/s = 0.13 ms.

A program takes the heads of one group of one query. Of a list of tokens it gathers `tile_s` rows by pointer; of a list
of blocks it reads tiles of adjacent rows, and no pointer but the block's first is looked up. With few queries the list
is split over `n_splits` programs. A second kernel adds their partial results up by their log-sum-exps: as operations of
XLA that would be several, each as long as a small decode.
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
from hisa_jax.kernels_pallas.triton.sparse_attention_body import Inputs, Plan, sparse_attention_body
from hisa_jax.layout import BlockLists


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Tile sizes, all powers of two: they change the speed and the last bits, nothing else."""

    tile_n: int  # heads a program, of one group
    tile_s: int  # tokens at a time, of blocks at most one
    n_splits: int = 1
    num_warps: int = 4
    num_stages: int = 2


def why_not(
    compute_capability: str, Hq: int, G: int, D: int, V: int, dtype: DTypeLike, block_size: int, n_listed: int
) -> str | None:  # fmt: skip
    """None, or why this kernel cannot run a shape."""
    if reason := capability.why_not(compute_capability, dtype):
        return reason
    if jnp.dtype(dtype) != jnp.dtype(jnp.bfloat16):
        return f"needs bfloat16, not {jnp.dtype(dtype).name}"
    if any(size & (size - 1) or not 16 <= size <= 256 for size in (D, V)):
        return f"needs keys and values of 16, 32, 64, 128 or 256, not {D} and {V}"
    if block_size > 1 and (block_size & (block_size - 1) or block_size < 16):
        return f"needs blocks of 1 token or of a power of two from 16 on, not {block_size}"
    return None


def heuristic(n_queries: int, Hq: int, G: int, D: int, K: int, block_size: int, n_sms: int = 132) -> Config:
    """Splits the list until every multiprocessor has two programs, but into no less than 128 tokens."""
    # Tensor cores take 16 rows; keys and values of two stages have to fit shared memory beside the queries.
    tile_n = min(64, max(16, pl.next_power_of_2(Hq // G)))
    programs, n_splits = n_queries * G * -(-(Hq // G) // tile_n), 1
    while programs * n_splits < 2 * n_sms and K * block_size // (2 * n_splits) >= 128 and 2 * n_splits <= K:
        n_splits *= 2
    return Config(tile_n=tile_n, tile_s=32 if D > 128 else 64, n_splits=n_splits)


@in_32_bits
@functools.partial(jax.jit, static_argnames=("scale", "block_size", "config", "interpret"))
def sparse_attention(
    q: Array,
    k: Array,
    v: Array,
    lists: BlockLists,
    *,
    scale: float,
    block_size: int,
    config: Config | None = None,
    interpret: bool = False,
) -> tuple[Array, Array]:
    """[B, T, Hq, D], [B, S, G, D], [B, S, G, V] -> [B, T, Hq, V] in the dtype of q, [B, T, Hq] float32 lse.

    Args:
        lists: of blocks in any order; -1 stands for none. A block listed twice counts twice. A query with none gives
            zeros and an lse of -inf.
    """
    (B, T, Hq, D), (S, G, V), (L, K) = q.shape, v.shape[1:], lists.ids.shape[2:]
    heads = Hq // G
    config = config or heuristic(B * T, Hq, G, D, K, block_size)
    tile_n, n_splits = config.tile_n, config.n_splits
    tile_s = config.tile_s if block_size == 1 else min(config.tile_s, block_size)
    tiles_n = -(-heads // tile_n)
    q = q.reshape(B * T, G, heads, D)
    # Whole tiles of heads: before jax 0.12 nothing keeps a program from the rows after the last head.
    q = jnp.pad(q, ((0, 0), (0, 0), (0, tiles_n * tile_n - heads), (0, 0)))
    # Of a list of tokens a program takes whole tiles; of one of blocks, each block is a whole number of tiles.
    unit = tile_s if block_size == 1 else 1
    per_split = -(-K // (n_splits * unit)) * unit
    ids = jnp.pad(lists.ids, ((0, 0), (0, 0), (0, 0), (0, n_splits * per_split - K)), constant_values=-1)
    out = lambda *shape: pl.BlockSpec(  # noqa: E731
        (None, None, None, tile_n, *shape), lambda t, n, i: (i, t, n // tiles_n, n % tiles_n, *(0 for _ in shape))
    )
    whole = lambda size: pl.BlockSpec((B * S, None, size), lambda t, n, i: (0, n // tiles_n, 0))  # noqa: E731
    in_specs = Inputs(
        q=pl.BlockSpec((None, None, tile_n, D), lambda t, n, i: (t, n // tiles_n, n % tiles_n, 0)),
        k=whole(D),
        v=whole(V),
        ids=pl.BlockSpec((None, None, per_split), lambda t, n, i: (t, n // tiles_n if L > 1 else 0, i)),
        last=pl.BlockSpec((None, 2), lambda t, n, i: (t, 0)),
    )
    plan = Plan(queries=T, keys=S, scale=scale, tile_s=tile_s, block_size=block_size)
    partial, lse = pl.pallas_call(
        functools.partial(sparse_attention_body, plan=plan),
        grid=(B * T, G * tiles_n, n_splits),
        in_specs=[in_specs],
        out_specs=[out(V), out()],
        out_shape=[
            jax.ShapeDtypeStruct((n_splits, B * T, G, tiles_n * tile_n, V), q.dtype if n_splits == 1 else jnp.float32),
            jax.ShapeDtypeStruct((n_splits, B * T, G, tiles_n * tile_n), jnp.float32),
        ],
        compiler_params=plt.CompilerParams(num_warps=config.num_warps, num_stages=config.num_stages),
        name="sparse_attention",
        interpret=interpret,
    )(
        Inputs(
            q, k.reshape(B * S, G, D), v.reshape(B * S, G, V), ids.reshape(B * T, L, -1), lists.last.reshape(B * T, 2)
        )
    )
    o, lse = (partial[0], lse[0]) if n_splits == 1 else combine(partial, lse, q.dtype, interpret)
    return o[:, :, :heads].reshape(B, T, Hq, V), lse[:, :, :heads].reshape(B, T, Hq)
