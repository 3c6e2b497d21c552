"""Device code of `sparse_mla`: the blocks of a query's tokens come one step after the other, masked to the tokens.

A row that the query did not choose has probability 0, but 0 * NaN is NaN: a block's other rows could poison the output.
To clear them every time costs more than it is worth. They show, as NaN of every head: then the query is attended to
once more, with those rows set to zero first.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from hisa_jax.kernels_pallas.bits import is_any
from hisa_jax.kernels_pallas.mosaic_tpu.config import LANES, ROWS
from hisa_jax.kernels_pallas.types import Ref

_LOWEST = -1e30  # instead of -inf, so that differences stay numbers
WINDOW = LANES + ROWS  # list entries that hold a run, from a multiple of eight on


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """The static numbers of a launch."""

    value_dim: int
    scale: float
    per_step: int  # blocks a step
    block_size: int
    tokens: int  # of a sequence, before it was padded to whole blocks


def listed_body(
    plan: Plan, n_runs_smem: Ref, starts_smem: Ref, indices_smem: Ref, codes_ref: Ref, q_ref: Ref, kv_hbm: Ref,
    o_ref: Ref, lse_ref: Ref, kv_vmem: Ref, acc_vmem: Ref, sems: Ref, columns_vmem: Ref
) -> None:  # fmt: skip
    """The tokens are a list in runs of at most 128 entries of one block; starts_smem[0, j] is where the j-th begins.

    Args:
        indices_smem: [1, K], the list; codes_ref: [K // 128, 128], of its entries as `sparse_mla.runs_of` gives them.
        columns_vmem: [K + WINDOW, 128].
    """
    n = codes_ref.shape[0]
    for row in range(n):
        # Every entry along the lanes of its own row.
        entries = jnp.broadcast_to(codes_ref[row : row + 1], (LANES, LANES)).T
        columns_vmem[row * LANES : (row + 1) * LANES] = entries
    columns_vmem[n * LANES :] = jnp.full((WINDOW, LANES), -1, jnp.int32)

    def block(j: Array) -> Array:
        return lax.div(indices_smem[0, starts_smem[0, j]], LANES)

    def mask(j: Array, block_id: Array) -> Array:
        start = starts_smem[0, j]
        first = pl.multiple_of(lax.div(start, ROWS) * ROWS, ROWS)
        # The window holds entries of other runs, too, some perhaps of the same block: their codes are others.
        code = start * LANES + lax.broadcasted_iota(jnp.int32, (WINDOW, LANES), 1)
        found = jnp.where(columns_vmem[pl.ds(first, WINDOW)] == code, 1.0, 0.0)
        return jnp.sum(found, axis=0, keepdims=True)

    attend(plan, n_runs_smem[0, 0], block, mask, q_ref, kv_hbm, o_ref, lse_ref, kv_vmem, acc_vmem, sems)


def masked_body(
    plan: Plan, n_blocks_smem: Ref, blocks_smem: Ref, mask_ref: Ref, q_ref: Ref, kv_hbm: Ref, o_ref: Ref, lse_ref: Ref,
    kv_vmem: Ref, acc_vmem: Ref, sems: Ref
) -> None:  # fmt: skip
    """The tokens are those of the blocks blocks_smem[0, :] where mask_ref [M, block_size] float32 is 1."""

    def mask(j: Array, block_id: Array) -> Array:
        found = mask_ref[pl.ds(j, 1)]
        if plan.tokens % plan.block_size:
            token = block_id * plan.block_size + lax.broadcasted_iota(jnp.int32, found.shape, 1)
            found = jnp.where(token < plan.tokens, found, 0.0)
        return found

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
        mask: (place in the list, block id) -> [1, block_size] float32, how often each token counts.
        q_ref: [N, E]; kv_hbm: [B, S, E]; o_ref: [N, value_dim]; lse_ref: [N, 128], the same along the lanes.
        kv_vmem: [2, per_step * block_size, E]; acc_vmem: [N, value_dim] float32; sems: two of DMAs.
    """
    size, N = plan.block_size, q_ref.shape[0]
    n_steps = pl.cdiv(n_blocks, plan.per_step)
    b = pl.program_id(0)

    def block_of(step: Array, i: Array | int) -> tuple[Array, Array]:
        """(place in the list, id) of a block of a step; the last step fills up with the last block."""
        place = jnp.minimum(step * plan.per_step + i, n_blocks - 1)
        return place, block(place)

    def copies(step: Array) -> list:
        slot = lax.rem(step, 2)
        return [
            pltpu.make_async_copy(
                kv_hbm.at[b, pl.ds(pl.multiple_of(block_of(step, i)[1] * size, size), size)],
                kv_vmem.at[slot, pl.ds(i * size, size)],
                sems.at[slot],
            )
            for i in range(plan.per_step)
        ]

    def start(step: Array) -> None:
        for copy in copies(step):
            copy.start()

    def clear_values(step: Array) -> None:
        """Zeros in the values of the tokens that are not chosen."""

        def one_block(i: Array, _: None) -> None:
            counts = mask(*block_of(step, i))
            for first in range(0, size, LANES):
                # Every token's count along the lanes of its own row.
                rows = jnp.broadcast_to(counts[:, first : first + LANES], (LANES, LANES)).T
                at = pl.ds(pl.multiple_of(i * size + first, LANES), LANES)
                for column in range(0, plan.value_dim, LANES):
                    values = kv_vmem[lax.rem(step, 2), at, column : column + LANES]
                    kept = jnp.where(rows > 0, values.astype(jnp.float32), 0.0).astype(values.dtype)
                    kv_vmem[lax.rem(step, 2), at, column : column + LANES] = kept

        lax.fori_loop(0, plan.per_step, one_block, None)

    def one_step(is_again: Array, step: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        highest, total = carry  # [N, 1]
        pl.when(step + 1 < n_steps)(lambda: start(step + 1))
        for copy in copies(step):
            copy.wait()
        pl.when(is_again > 0)(lambda: clear_values(step))
        kv = kv_vmem[lax.rem(step, 2)]
        logits = lax.dot_general(q_ref[...], kv, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
        parts = []
        for i in range(plan.per_step):
            is_real = jnp.where(step * plan.per_step + i < n_blocks, 1.0, 0.0)
            parts.append(mask(*block_of(step, i)) * is_real)
        counts = jnp.concatenate(parts, axis=1)  # [1, per_step * size]
        logits = jnp.where(counts > 0, logits * plan.scale, _LOWEST)
        now = jnp.maximum(highest, jnp.max(logits, axis=1, keepdims=True))
        p = jnp.exp(logits - now) * counts
        decay = jnp.exp(highest - now)
        values = jnp.dot(p.astype(kv.dtype), kv[:, : plan.value_dim], preferred_element_type=jnp.float32)
        acc_vmem[...] = acc_vmem[...] * decay + values
        return now, total * decay + jnp.sum(p, axis=1, keepdims=True)

    def one_pass(state: tuple[Array, Array]) -> tuple[Array, Array]:
        is_again, _ = state
        acc_vmem[...] = jnp.zeros(acc_vmem.shape, jnp.float32)
        pl.when(n_steps > 0)(lambda: start(jnp.int32(0)))
        none = (jnp.full((N, 1), _LOWEST, jnp.float32), jnp.zeros((N, 1), jnp.float32))
        highest, total = lax.fori_loop(0, n_steps, functools.partial(one_step, is_again), none)
        o_ref[...] = (acc_vmem[...] / jnp.maximum(total, 1e-30)).astype(o_ref.dtype)
        lse = jnp.where(total == 0.0, -jnp.inf, highest + jnp.log(jnp.maximum(total, 1e-30)))  # NaN stays
        lse_ref[...] = jnp.broadcast_to(lse, lse_ref.shape)
        some_heads = acc_vmem[:ROWS]  # a row that is not chosen poisons all heads alike
        is_poisoned = jnp.where(is_any(some_heads != some_heads), 1, 0)
        return jnp.int32(1), jnp.where(is_again > 0, 0, is_poisoned)

    lax.while_loop(lambda state: state[1] > 0, one_pass, (jnp.int32(0), jnp.int32(1)))
