"""Sparse grouped-query attention, forward: every query attends to the blocks that are listed for its group.
    o[t, h] = softmax_s(scale * q[t, h] . k[s, g]) @ v[s, g], s in lists[t, g];   lse[t, h] = log sum_s exp(...)

Floor, a query of 64 heads in 4 groups of 128, 16 blocks of 128 tokens each, bfloat16, on v5e: HBM 4.2 MB / 819 GB/s =
5.1 us, MXU 67 MFLOP / 197 TFLOP/s = 0.3 us, times 8 since a group's 16 heads fill an eighth of its 128 rows. HBM binds.
Blocks are copied whole. Keys are read as [B, S, G * D], where a group is a range of whole lanes: a cache that is kept
so and reshaped for the call is read in place, of any other XLA makes a copy first.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike

from hisa_jax.kernels_pallas.bits import in_32_bits
from hisa_jax.kernels_pallas.mosaic_tpu import config as chips
from hisa_jax.kernels_pallas.mosaic_tpu.config import LANES
from hisa_jax.kernels_pallas.mosaic_tpu.launch import HBM, Launch, pad_axis
from hisa_jax.kernels_pallas.mosaic_tpu.sparse_attention_body import Plan, Refs, sparse_attention_body
from hisa_jax.kernels_pallas.types import Interpret
from hisa_jax.layout import BlockLists

_ROWS = 16  # of a bfloat16 tile
_MOST_LISTED = 16384  # lists of two queries lie in scalar memory


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Tile sizes: they change the speed and the last bits, nothing else."""

    tile_s: int = 512  # tokens a step, at least a block


def why_not(
    device_kind: str, Hq: int, G: int, D: int, V: int, dtype: DTypeLike, block_size: int, n_listed: int
) -> str | None:  # fmt: skip
    """None, or why this kernel cannot run a shape."""
    if device_kind not in chips.CHIPS:
        return f"needs a TPU v5e, v5p, v6e or v7x, this device is {device_kind!r}"
    if jnp.dtype(dtype) != jnp.dtype(jnp.bfloat16):
        return f"needs bfloat16, not {jnp.dtype(dtype).name}"
    if block_size % LANES or block_size > 1024:
        return f"needs blocks of a multiple of {LANES} tokens up to 1024, not {block_size}"
    if D % LANES or V % LANES or max(D, V) > 512:
        return f"needs keys and values of a multiple of {LANES} up to 512, not {D} and {V}"
    if n_listed > _MOST_LISTED:
        return f"needs at most {_MOST_LISTED} blocks in the lists of a query, not {n_listed}"
    return None if Hq <= 256 else f"needs at most 256 heads, not {Hq}"


@in_32_bits
@functools.partial(jax.jit, static_argnames=("scale", "block_size", "config", "interpret"))
def sparse_attention(
    q: Array, k: Array, v: Array, lists: BlockLists, *,
    scale: float, block_size: int, config: Config | None = None, interpret: Interpret = False
) -> tuple[Array, Array]:  # fmt: skip
    """[B, T, Hq, D], [B, S, G, D], [B, S, G, V] -> [B, T, Hq, V] in the dtype of q, [B, T, Hq] float32 lse.

    Args:
        lists: of blocks in any order; -1 stands for none. A block listed twice counts twice. A query with none gives
            zeros and an lse of -inf.
    """
    (B, T, Hq, D), (G, V) = q.shape, v.shape[2:]
    heads = Hq // G
    q = pad_axis(q.reshape(B, T, G, heads, D), 3, _ROWS)
    rows = q.shape[3]
    k, v = (pad_axis(x, 1, block_size).reshape(B, -1, G * x.shape[3]) for x in (k, v))
    per_step = max((config or Config()).tile_s // block_size, 1)
    tile_s = per_step * block_size

    def scalars(x: Array) -> tuple[Array, pl.BlockSpec]:
        spec = pl.BlockSpec((None, *x.shape[2:]), lambda b, t: (b * T + t, 0, 0), memory_space=pltpu.SMEM)
        return x.reshape(B * T, *x.shape[2:]), spec

    whole = lambda *shape: pl.BlockSpec((None, None, *shape), lambda b, t: (b, t, 0, 0, 0))  # noqa: E731
    plan = Plan(scale=scale, block_size=block_size, per_step=per_step)
    o, lse = Launch(
        body=functools.partial(sparse_attention_body, plan),
        refs=Refs,
        name="sparse_attention",
        grid=(B, T),
        scalars={},
        operands={
            "n_blocks_smem": scalars(jnp.sum(lists.ids >= 0, axis=3, dtype=jnp.int32)[:, :, None]),
            "ids_smem": scalars(jnp.maximum(-jnp.sort(-lists.ids, axis=3), 0)),  # what is listed comes first
            "last_smem": scalars(lists.last[:, :, None]),
            "q": (q, whole(G, rows, D)),
            "k_hbm": (k, HBM),
            "v_hbm": (v, HBM),
        },
        outs={
            "o": (jax.ShapeDtypeStruct((B, T, G, rows, V), q.dtype), whole(G, rows, V)),
            "lse": (jax.ShapeDtypeStruct((B, T, G, rows, LANES), jnp.float32), whole(G, rows, LANES)),
        },
        scratch={
            "k_vmem": pltpu.VMEM((2, tile_s, D), k.dtype),
            "v_vmem": pltpu.VMEM((2, tile_s, V), v.dtype),
            "acc_vmem": pltpu.VMEM((rows, V), jnp.float32),
            "sems": pltpu.SemaphoreType.DMA((2,)),
        },
        vmem_bytes=4 * tile_s * (D + V) + 16 * rows * tile_s + G * rows * (4 * (D + V) + 8 * LANES) + 4 * rows * V,
        interpret=interpret,
        dimension_semantics=("parallel", "parallel"),
    )()
    return o[:, :, :, :heads].reshape(B, T, Hq, V), lse[:, :, :, :heads, 0].reshape(B, T, Hq)
