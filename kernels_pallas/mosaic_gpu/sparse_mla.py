"""Sparse multi-head latent attention, forward: every query attends to the tokens its indexer chose.
    o[t, n] = softmax_s(scale * q[t, n] . kv[s]) @ kv[s, :value_dim], s in indices[t];   lse[t, n] = log sum_s exp(...)

Floor, 4096 queries of dsv32 (128 heads, 576 / 512, 2048 tokens), H200: tensor cores 2.3 PFLOP / 990 TFLOP/s = 2.4 ms;
L2 to the SMs 19.3 GB (each group of 64 heads reads the tokens) = 1.8 ms at the 10.7 TB/s that copies alone reach;
shared memory 2.7 ms (304 KB of operands and copies a tile of 64 tokens, at 128 B a cycle). None of them is the limit at
4.06 ms: without any copies it takes 3.65. Scores of a tile and values of the one before share the tensor core, and what
follows the scores, the softmax, leaves it idle. Values that wait until they are under the softmax take longer still,
presumably since with two slots tiles then land too late (docs/notes/gpu-log.md).

A CTA takes 64 heads of a query, one CTA an SM, persistent over queries. Warp-groups: one that copies, one that scores,
two with half of the value columns each. With few queries (decode) lists are split and `combine` adds up the parts.

Latents in 8 bits are 656 bytes a token in place of 1152; the warp-group that copies makes them bfloat16 in their slot.
By clocks in an earlier form a tile kept it busy for 4,400 of 5,050 cycles, by some 1000 instructions a warp and the
wait for the tile's copies.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike

from hisa_jax.kernels_pallas.bits import in_32_bits
from hisa_jax.kernels_pallas.mosaic_gpu import sparse_mla_body
from hisa_jax.kernels_pallas.mosaic_gpu.sparse_mla_plan import (
    HEADS,
    KEY_DIM,
    PAIR,
    PARTS,
    ROWS,
    SLOTS,
    TOKENS,
    VALUE_DIM,
    Inputs,
    Plan,
    Smem,
)
from hisa_jax.kernels_pallas.mosaic_gpu.warpgroups import tiled
from hisa_jax.kernels_pallas.triton.combine import combine
from hisa_jax.kernels_pallas.types import Interpret
from hisa_jax.latents import QuantizedLatents

# Up to so many lists a CTA, all roles count what each holds: one launch in place of three. With more a fusion counts
# once, where counting would hold up each role 0.4 us a list.
_COUNTED = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """How the work is divided: it changes the speed and the last bits, nothing else."""

    n_splits: int = 1  # parts of a query's list


def why_not(
    compute_capability: str, N: int, key_dim: int, value_dim: int, dtype: DTypeLike, is_quantized: bool = False
) -> str | None:
    """None, or why this kernel cannot run a shape."""
    if compute_capability != "9.0":
        return f"needs compute capability 9.0 (Hopper), this device has {compute_capability or 'none'}"
    if jnp.dtype(dtype) != jnp.dtype(jnp.bfloat16):
        return f"needs bfloat16, not {jnp.dtype(dtype).name}"
    if (key_dim, value_dim) != (KEY_DIM, VALUE_DIM):
        return f"needs keys of {KEY_DIM} values, the first {VALUE_DIM} of them the value, not {value_dim} of {key_dim}"
    return None if N in (16, 32, 64, 128) else f"needs 16, 32, 64 or 128 heads, not {N}"


def heuristic(n_queries: int, N: int, K: int, n_ctas: int = 132) -> Config:
    """Splits the token list until every multiprocessor has work, but into no less than a pair of tiles."""
    items = n_queries * -(-N // HEADS)
    n_splits = 1
    while items * n_splits * 2 <= n_ctas and K // (2 * n_splits) >= PAIR:
        n_splits *= 2
    return Config(n_splits=n_splits)


@in_32_bits
@functools.partial(jax.jit, static_argnames=("value_dim", "scale", "config", "n_ctas", "interpret"))
def sparse_mla(
    q: Array,
    kv: Array | QuantizedLatents,
    indices: Array,
    *,
    value_dim: int,
    scale: float,
    config: Config | None = None,
    n_ctas: int = 132,
    interpret: Interpret = False,
) -> tuple[Array, Array]:
    """[B, T, N, E], [B, S, E], [B, T, K] int32 -> [B, T, N, value_dim] in the dtype of q, [B, T, N] float32 lse.

    Args:
        kv: bfloat16, or in 8 bits.
        indices: token positions in any order; any that is not one of 0 .. S - 1 stands for none. A token listed twice
            counts twice. A query with none gives zeros and an lse of -inf.
        n_ctas: how many persistent CTAs; the SMs of the device.
    """
    (B, T, N, E), S, K = q.shape, kv.shape[1], indices.shape[2]
    config = config or heuristic(B * T, N, K, n_ctas)
    n_splits, groups = config.n_splits, -(-N // HEADS)
    indices = indices.reshape(B * T, K)
    q = jnp.pad(q.reshape(B * T, N, E), ((0, 0), (0, groups * HEADS - N), (0, 0)))
    kv = jax.tree.map(lambda x: x.reshape(B * S, x.shape[2]), kv)
    plan = Plan(
        T=B * T,
        queries=T,
        keys=S,
        groups=groups,
        n_splits=n_splits,
        pairs=-(-K // (PAIR * n_splits)),
        scale=scale,
        n_ctas=min(n_ctas, n_splits * B * T * groups),
        interpret=interpret,
    )
    o_dtype = q.dtype if n_splits == 1 else jnp.float32
    out_type = [
        jax.ShapeDtypeStruct((n_splits, B * T, groups * HEADS, value_dim), o_dtype),
        jax.ShapeDtypeStruct((n_splits, B * T, groups * HEADS), jnp.float32),
    ]
    n_pairs = None if plan.n_items <= _COUNTED * plan.n_ctas else pairs_of(indices, plan)
    partial, lse = _launch(plan, out_type, Inputs(n_pairs, indices, q, kv))
    o, lse = (partial[0], lse[0]) if n_splits == 1 else combine(partial, lse, q.dtype, bool(interpret))
    return o[:, :N].reshape(B, T, N, value_dim), lse[:, :N].reshape(B, T, N)


def pairs_of(indices: Array, plan: Plan) -> Array:
    """[n_splits * T] int32: pairs of tiles up to the last token of each list, one at least, so that all roles agree."""
    K = indices.shape[1]
    is_real = (indices >= 0) & (indices < plan.keys)
    used = jnp.max(jnp.where(is_real, jnp.arange(1, K + 1, dtype=jnp.int32)[None, :], 0), axis=1)
    first = jnp.arange(plan.n_splits, dtype=jnp.int32)[:, None] * plan.pairs
    return jnp.clip((used[None, :] + PAIR - 1) // PAIR - first, 1, plan.pairs).reshape(-1)


def _launch(plan: Plan, out_type: list, inputs: Inputs) -> list[Array]:
    return plgpu.kernel(
        functools.partial(sparse_mla_body.sparse_mla_body, plan),
        out_type=out_type,
        grid=(plan.n_ctas,),
        grid_names=("cta",),
        num_threads=4,
        thread_name="warpgroup",
        scratch_types=[_smem(inputs.q.dtype, bool(plan.interpret))],
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0),
        kernel_name="sparse_mla",
        interpret=plan.interpret,
    )(inputs)


def _smem(dtype: DTypeLike, interpret: bool) -> Smem:
    barrier, smem = plgpu.Barrier, plgpu.SMEM
    return Smem(
        k_free=barrier(num_arrivals=2, num_barriers=SLOTS * len(PARTS)),
        k_full=barrier(num_barriers=SLOTS) if interpret else None,
        k=smem((SLOTS, TOKENS, KEY_DIM), dtype, transforms=tiled(KEY_DIM, dtype)),
        p_free=barrier(num_arrivals=2),
        p_full=barrier(num_barriers=SLOTS),
        p=smem((HEADS, TOKENS), dtype, transforms=tiled(TOKENS, dtype)),
        q_free=barrier(),
        q_full=barrier(),
        q=smem((1, HEADS, KEY_DIM), dtype, transforms=tiled(KEY_DIM, dtype)),
        ready=None if interpret else barrier(),
        rope_free=barrier(num_barriers=SLOTS),
        rows=smem((ROWS, HEADS), jnp.float32),
    )
