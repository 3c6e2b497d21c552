"""Sparse multi-head latent attention, forward: every query attends to the tokens its indexer chose.
    o[t, n] = softmax_s(scale * q[t, n] . kv[s]) @ kv[s, :value_dim], s chosen by t;   lse[t, n] = log sum_s exp(...)

Floor, a query of dsv32 (128 heads, 576 / 512, 8192 tokens of 64 blocks) on v5e: MXU 2.3 GFLOP / 197 TFLOP/s = 12 us,
HBM 9.4 MB / 819 GB/s = 12 us. Whole blocks are read and masked to the chosen tokens: four times the arithmetic of
the 2048 tokens alone, but one row of a bfloat16 array cannot be copied alone, and 2048 copies a query would cost
more cycles to start than the product takes. A list of tokens is turned into its blocks of 128 and, in the kernel, their
masks; of a list over all of a long context that is the whole context.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike

from hisa_jax.kernels_pallas.bits import in_32_bits
from hisa_jax.kernels_pallas.mosaic_tpu import config as chips
from hisa_jax.kernels_pallas.mosaic_tpu.config import LANES
from hisa_jax.kernels_pallas.mosaic_tpu.launch import HBM, Launch
from hisa_jax.kernels_pallas.mosaic_tpu.sparse_mla_body import WINDOW, Plan, Refs, sparse_mla_body
from hisa_jax.kernels_pallas.mosaic_tpu.topk import topk
from hisa_jax.kernels_pallas.sort_key import FORCED, INVISIBLE
from hisa_jax.kernels_pallas.types import Interpret


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Tile sizes: they change the speed and the last bits, nothing else."""

    tile_s: int = 1024  # tokens a step: 22,300 cycles a query on v5e with 512, 21,800 with 1024


def why_not(
    device_kind: str, N: int, key_dim: int, value_dim: int, dtype: DTypeLike, is_quantized: bool = False
) -> str | None:
    """None, or why this kernel cannot run a shape."""
    if is_quantized:
        return "needs latents that are not quantised"
    if device_kind not in chips.CHIPS:
        return f"needs a TPU v5e, v5p, v6e or v7x, this device is {device_kind!r}"
    if jnp.dtype(dtype) != jnp.dtype(jnp.bfloat16):
        return f"needs bfloat16, not {jnp.dtype(dtype).name}"
    if value_dim % LANES or not value_dim <= key_dim:
        return (
            f"needs a value size that is a multiple of {LANES} and at most the key size, not {value_dim} of {key_dim}"
        )
    return None if N % 16 == 0 else f"needs a multiple of 16 heads, not {N}"


@in_32_bits
@functools.partial(jax.jit, static_argnames=("value_dim", "scale", "config", "interpret"))
def sparse_mla(
    q: Array, kv: Array, indices: Array, *,
    value_dim: int, scale: float, config: Config | None = None, interpret: Interpret = False
) -> tuple[Array, Array]:  # fmt: skip
    """[B, T, N, E], [B, S, E], [B, T, K] int32 -> [B, T, N, value_dim] in the dtype of q, [B, T, N] float32 lse.

    Args:
        indices: token positions in any order; any that is not one of 0 .. S - 1 stands for none. A token listed twice
            counts twice. A query with none gives zeros and an lse of -inf. A block of 128 tokens is read as often as
            the list comes back to it: ascending lists are read fastest.
    """
    (B, T, N, E), S = q.shape, kv.shape[1]
    indices = jnp.pad(indices, ((0, 0), (0, 0), (0, -indices.shape[2] % LANES)), constant_values=-1)
    K = indices.shape[2]
    is_start, codes = runs_of(indices, S)
    n_runs = jnp.sum(is_start, axis=2, dtype=jnp.int32)
    flags = jnp.where(is_start, FORCED, INVISIBLE).reshape(B * T, K)
    starts, _ = topk(flags, n_runs.reshape(-1), K, interpret=interpret)
    kv = jnp.pad(kv, ((0, 0), (0, -S % LANES), (0, 0)))
    per_step = max((config or Config()).tile_s // LANES, 1)
    tile_s = per_step * LANES

    def scalars(x: Array) -> tuple[Array, pl.BlockSpec]:
        spec = pl.BlockSpec((None, 1, x.shape[2]), lambda b, t: (b * T + t, 0, 0), memory_space=pltpu.SMEM)
        return x.reshape(B * T, 1, -1), spec

    whole = lambda *shape: pl.BlockSpec((None, None, *shape), lambda b, t: (b, t, 0, 0))  # noqa: E731
    o, lse = Launch(
        body=functools.partial(sparse_mla_body, Plan(value_dim=value_dim, scale=scale, per_step=per_step)),
        refs=Refs,
        name="sparse_mla",
        grid=(B, T),
        scalars={},
        operands={
            "n_runs_smem": scalars(n_runs[..., None]),
            "starts_smem": scalars(jnp.maximum(starts, 0).reshape(B, T, K)),
            "indices_smem": scalars(indices),
            "codes": (codes.reshape(B, T, K // LANES, LANES), whole(K // LANES, LANES)),
            "q": (q, whole(N, E)),
            "kv_hbm": (kv, HBM),
        },
        outs={
            "o": (jax.ShapeDtypeStruct((B, T, N, value_dim), q.dtype), whole(N, value_dim)),
            "lse": (jax.ShapeDtypeStruct((B, T, N, LANES), jnp.float32), whole(N, LANES)),
        },
        scratch={
            "kv_vmem": pltpu.VMEM((2, tile_s, E), kv.dtype),
            "acc_vmem": pltpu.VMEM((N, value_dim), jnp.float32),
            "sems": pltpu.SemaphoreType.DMA((2,)),
            "columns_vmem": pltpu.VMEM((K + WINDOW, LANES), jnp.int32),
        },
        vmem_bytes=4 * tile_s * E + N * (8 * E + 12 * value_dim + 12 * tile_s) + (6 << 20),
        interpret=interpret,
        dimension_semantics=("parallel", "parallel"),
    )()
    return o, lse[..., 0]


def runs_of(indices: Array, S: int) -> tuple[Array, Array]:
    """Cuts lists [..., K] into runs: at most 128 entries, next to each other, that lie in one block of 128 tokens.

    Returns: [..., K] bool, where a run begins; [..., K] int32, 128 * (entry where the run begins) + token % 128, which
        tells an entry from those of other runs of its block, and -1 for what is no token.
    """
    is_token = (indices >= 0) & (indices < S)
    block = jnp.where(is_token, indices // LANES, -1)
    before = jnp.concatenate([jnp.full_like(block[..., :1], -1), block[..., :-1]], axis=-1)
    entry = lax.broadcasted_iota(jnp.int32, indices.shape, indices.ndim - 1)
    stretch = lax.cummax(jnp.where(block != before, entry, 0), axis=indices.ndim - 1)
    start = entry - (entry - stretch) % LANES
    return is_token & (start == entry), jnp.where(is_token, start * LANES + indices % LANES, -1)
