"""Device code of `sparse_mla`: the blocks of a query's tokens come one step after the other, masked to the tokens."""

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.mosaic_tpu.config import LANES, ROWS
from kernels_pallas.types import Ref

_LOWEST = -1e30  # instead of -inf, so that differences stay numbers
WINDOW = LANES + ROWS  # list entries that may be tokens of one block, from a multiple of eight on


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """The static numbers of a launch."""

    value_dim: int
    scale: float
    per_step: int  # blocks a step
    block_size: int


def listed_body(
    plan: Plan, n_blocks_smem: Ref, starts_smem: Ref, indices_smem: Ref, indices_ref: Ref, q_ref: Ref, kv_hbm: Ref,
    o_ref: Ref, lse_ref: Ref, kv_vmem: Ref, acc_vmem: Ref, sems: Ref, columns_vmem: Ref
) -> None:  # fmt: skip
    """The tokens are a list, ascending, then -1; starts_smem[0, j] is where its j-th block of 128 begins.

    Args:
        indices_smem: [1, K]; indices_ref: [K // 128, 128]: the list twice; columns_vmem: [K + WINDOW, 128].
    """
    n = indices_ref.shape[0]
    for row in range(n):
        # Every entry along the lanes of its own row.
        entries = jnp.broadcast_to(indices_ref[row : row + 1], (LANES, LANES)).T
        columns_vmem[row * LANES : (row + 1) * LANES] = entries
    columns_vmem[n * LANES :] = jnp.full((WINDOW, LANES), -1, jnp.int32)

    def block(j: Array) -> Array:
        return lax.div(indices_smem[0, starts_smem[0, j]], LANES)

    def mask(j: Array, block_id: Array) -> Array:
        first = pl.multiple_of(lax.div(starts_smem[0, j], ROWS) * ROWS, ROWS)
        token = block_id * LANES + lax.broadcasted_iota(jnp.int32, (WINDOW, LANES), 1)
        found = jnp.where(columns_vmem[pl.ds(first, WINDOW)] == token, 1.0, 0.0)
        return jnp.max(found, axis=0, keepdims=True)

    attend(plan, n_blocks_smem[0, 0], block, mask, q_ref, kv_hbm, o_ref, lse_ref, kv_vmem, acc_vmem, sems)


def masked_body(
    plan: Plan, n_blocks_smem: Ref, blocks_smem: Ref, mask_ref: Ref, q_ref: Ref, kv_hbm: Ref, o_ref: Ref, lse_ref: Ref,
    kv_vmem: Ref, acc_vmem: Ref, sems: Ref
) -> None:  # fmt: skip
    """The tokens are those of the blocks blocks_smem[0, :] where mask_ref [M, block_size] float32 is 1."""

    def mask(j: Array, block_id: Array) -> Array:
        return mask_ref[pl.ds(j, 1)]

    block = lambda j: blocks_smem[0, j]  # noqa: E731
    attend(plan, n_blocks_smem[0, 0], block, mask, q_ref, kv_hbm, o_ref, lse_ref, kv_vmem, acc_vmem, sems)


def attend(
    plan: Plan,
    n_blocks: Array,
    block: Callable[[Array], Array],
    mask: Callable[[Array, Array], Array],
    q_ref: Ref,
    kv_hbm: Ref,
    o_ref: Ref,
    lse_ref: Ref,
    kv_vmem: Ref,
    acc_vmem: Ref,
    sems: Ref,
) -> None:
    """Attention of one query to the masked tokens of its blocks.

    Args:
        q_ref: [N, E]; kv_hbm: [B, S, E]; o_ref: [N, value_dim]; lse_ref: [N, 128], the same along the lanes.
        kv_vmem: [2, per_step * block_size, E]; acc_vmem: [N, value_dim] float32; sems: two of DMAs.
    """
    size, N = plan.block_size, q_ref.shape[0]
    n_steps = pl.cdiv(n_blocks, plan.per_step)
    b = pl.program_id(0)

    def blocks_of(step: Array) -> list[tuple[Array, Array]]:
        """(place in the list, id) of each; the last step fills up with the last block."""
        places = [jnp.minimum(step * plan.per_step + i, n_blocks - 1) for i in range(plan.per_step)]
        return [(place, block(place)) for place in places]

    def copies(step: Array) -> list:
        slot = lax.rem(step, 2)
        return [
            pltpu.make_async_copy(
                kv_hbm.at[b, pl.ds(pl.multiple_of(block_id * size, size), size)],
                kv_vmem.at[slot, pl.ds(i * size, size)],
                sems.at[slot],
            )
            for i, (_, block_id) in enumerate(blocks_of(step))
        ]

    def start(step: Array) -> None:
        for copy in copies(step):
            copy.start()

    def one_step(step: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        highest, total = carry  # [N, 1]
        pl.when(step + 1 < n_steps)(lambda: start(step + 1))
        for copy in copies(step):
            copy.wait()
        kv = kv_vmem[lax.rem(step, 2)]
        logits = lax.dot_general(q_ref[...], kv, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
        parts = []
        for i, (place, block_id) in enumerate(blocks_of(step)):
            is_real = jnp.where(step * plan.per_step + i < n_blocks, 1.0, 0.0)
            parts.append(mask(place, block_id) * is_real)
        chosen = jnp.concatenate(parts, axis=1) > 0  # [1, per_step * size]
        logits = jnp.where(chosen, logits * plan.scale, _LOWEST)
        now = jnp.maximum(highest, jnp.max(logits, axis=1, keepdims=True))
        p = jnp.where(chosen, jnp.exp(logits - now), 0.0)
        decay = jnp.exp(highest - now)
        values = jnp.dot(p.astype(kv.dtype), kv[:, : plan.value_dim], preferred_element_type=jnp.float32)
        acc_vmem[...] = acc_vmem[...] * decay + values
        return now, total * decay + jnp.sum(p, axis=1, keepdims=True)

    acc_vmem[...] = jnp.zeros(acc_vmem.shape, jnp.float32)
    pl.when(n_steps > 0)(lambda: start(jnp.int32(0)))
    none = (jnp.full((N, 1), _LOWEST, jnp.float32), jnp.zeros((N, 1), jnp.float32))
    highest, total = lax.fori_loop(0, n_steps, one_step, none)
    o_ref[...] = (acc_vmem[...] / jnp.maximum(total, 1e-30)).astype(o_ref.dtype)
    lse = jnp.where(total > 0, highest + jnp.log(jnp.maximum(total, 1e-30)), -jnp.inf)
    lse_ref[...] = jnp.broadcast_to(lse, lse_ref.shape)
