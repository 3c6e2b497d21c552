"""Device code of `sparse_mla`: the blocks of a query's tokens come one step after the other, masked to the tokens.

    kv_hbm -- the blocks of the next step, under this one's products --> kv_vmem, a ring of 2
    q x kv --> logits, masked --> running maximum and sum [N, 1] in registers, acc_vmem += p x values --> o, lse

One query a grid step. A step takes `per_step` blocks of 128 tokens; one semaphore a slot counts the bytes of all of
them. Running maximum and sum are rescaled as in flash attention.

A row that the query did not choose has probability 0, but 0 * NaN is NaN: a block's other rows could poison the output.
To clear them every time costs more than it is worth. They show, as NaN of every head: then the query is attended to
once more, with those rows set to zero first.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from hisa_jax.kernels_pallas.bits import is_any
from hisa_jax.kernels_pallas.mosaic_tpu.config import LANES, SUBLANES
from hisa_jax.kernels_pallas.types import Ref

_LOWEST = -1e30  # instead of -inf, so that differences stay numbers
WINDOW = LANES + SUBLANES  # list entries that hold a run, from a multiple of eight on


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """The static numbers of a launch."""

    value_dim: int
    scale: float
    per_step: int  # blocks of 128 tokens a step


class Refs(NamedTuple):
    """The buffers of one query, whose list [K] is cut into runs: at most 128 entries of one block each."""

    n_runs_smem: Ref  # [1, 1]
    starts_smem: Ref  # [1, K], the entry that each run begins with
    indices_smem: Ref  # [1, K], the list
    codes: Ref  # [K // 128, 128], of its entries as `sparse_mla.runs_of` gives them
    q: Ref  # [N, E]
    kv_hbm: Ref  # [B, S, E]
    o: Ref  # out: [N, value_dim]
    lse: Ref  # out: [N, 128], the same along the lanes
    kv_vmem: Ref  # [2, per_step * 128, E], the ring
    acc_vmem: Ref  # [N, value_dim] float32
    sems: Ref  # [2], by slot
    columns_vmem: Ref  # [K + WINDOW, 128], the code of every entry along the lanes of its own row


def block_of_run(refs: Refs, j: Array) -> Array:
    """The block of 128 tokens that run j lies in."""
    return lax.div(refs.indices_smem[0, refs.starts_smem[0, j]], LANES)


def mask_of_run(refs: Refs, j: Array) -> Array:
    """[1, 128] float32: how often each token of run j's block counts."""
    start = refs.starts_smem[0, j]
    first = pl.multiple_of(lax.div(start, SUBLANES) * SUBLANES, SUBLANES)
    # The window holds entries of other runs, too, some perhaps of the same block: their codes are others.
    code = start * LANES + lax.broadcasted_iota(jnp.int32, (WINDOW, LANES), 1)
    found = jnp.where(refs.columns_vmem[pl.ds(first, WINDOW)] == code, 1.0, 0.0)
    return jnp.sum(found, axis=0, keepdims=True)


def spread_codes(refs: Refs) -> None:
    """Every entry's code along the lanes of its own row, so that a window compares its entries with 128 tokens."""
    n = refs.codes.shape[0]
    for row in range(n):
        entries = jnp.broadcast_to(refs.codes[row : row + 1], (LANES, LANES)).T
        refs.columns_vmem[row * LANES : (row + 1) * LANES] = entries
    refs.columns_vmem[n * LANES :] = jnp.full((WINDOW, LANES), -1, jnp.int32)


def sparse_mla_body(plan: Plan, refs: Refs) -> None:
    """Attention of one query to the tokens of its list."""
    spread_codes(refs)
    kv_vmem, acc_vmem, N = refs.kv_vmem, refs.acc_vmem, refs.q.shape[0]
    n_runs = refs.n_runs_smem[0, 0]
    n_steps = pl.cdiv(n_runs, plan.per_step)
    b = pl.program_id(0)

    def run(step: Array, i: Array | int) -> Array:
        """Run i of a step; the last step fills up with the last run."""
        return jnp.minimum(step * plan.per_step + i, n_runs - 1)

    def copies(step: Array) -> list:
        slot = lax.rem(step, 2)
        return [
            pltpu.make_async_copy(
                refs.kv_hbm.at[b, pl.ds(pl.multiple_of(block_of_run(refs, run(step, i)) * LANES, LANES), LANES)],
                kv_vmem.at[slot, pl.ds(i * LANES, LANES)],
                refs.sems.at[slot],
            )
            for i in range(plan.per_step)
        ]

    def start(step: Array) -> None:
        for copy in copies(step):
            copy.start()

    def clear_values(step: Array) -> None:
        """Zeros in the values of the tokens that are not chosen."""

        def one_block(i: Array, _: None) -> None:
            # Every token's count along the lanes of its own row.
            rows = jnp.broadcast_to(mask_of_run(refs, run(step, i)), (LANES, LANES)).T
            at = pl.ds(pl.multiple_of(i * LANES, LANES), LANES)
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
        logits = lax.dot_general(refs.q[...], kv, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
        parts = []
        for i in range(plan.per_step):
            is_real = jnp.where(step * plan.per_step + i < n_runs, 1.0, 0.0)
            parts.append(mask_of_run(refs, run(step, i)) * is_real)
        counts = jnp.concatenate(parts, axis=1)  # [1, per_step * 128]
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
        refs.o[...] = (acc_vmem[...] / jnp.maximum(total, 1e-30)).astype(refs.o.dtype)
        lse = jnp.where(total == 0.0, -jnp.inf, highest + jnp.log(jnp.maximum(total, 1e-30)))  # NaN stays
        refs.lse[...] = jnp.broadcast_to(lse, refs.lse.shape)
        some_heads = acc_vmem[:SUBLANES]  # a row that is not chosen poisons all heads alike
        is_poisoned = jnp.where(is_any(some_heads != some_heads), 1, 0)
        return jnp.int32(1), jnp.where(is_again > 0, 0, is_poisoned)

    lax.while_loop(lambda state: state[1] > 0, one_pass, (jnp.int32(0), jnp.int32(1)))
