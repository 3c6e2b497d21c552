"""Device code of `sparse_attention`: the blocks of a query's groups come one step after the other.

    k_hbm, v_hbm -- the blocks of the next step, under this one's products --> k_vmem, v_vmem, rings of 2
    q x k --> logits, masked --> running maximum and sum [rows, 1] in registers, acc_vmem += p x v --> o, lse

One query a grid step, its groups one after the other in one row of steps, so that a group's first blocks come under the
last products of the group before. A step takes `per_step` blocks; one semaphore a slot counts the bytes of all of them.
Groups with fewer blocks than others repeat a block that counts for nothing.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from hisa_jax.kernels_pallas.mosaic_tpu.config import LANES
from hisa_jax.kernels_pallas.types import Ref

_LOWEST = -1e30  # instead of -inf, so that differences stay numbers


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """The static numbers of a launch."""

    scale: float
    block_size: int
    per_step: int  # blocks a step


class Refs(NamedTuple):
    """The buffers of one query: L lists, one a group or one for all G, of which the listed blocks come first."""

    n_blocks_smem: Ref  # [1, L]
    ids_smem: Ref  # [L, K]
    last_smem: Ref  # [1, 2], the block that is open, and how many of its tokens count
    q: Ref  # [G, rows, D]
    k_hbm: Ref  # [B, S, G * D]
    v_hbm: Ref  # [B, S, G * V]
    o: Ref  # out: [G, rows, V]
    lse: Ref  # out: [G, rows, 128], the same along the lanes
    k_vmem: Ref  # [2, per_step * block_size, D], the ring
    v_vmem: Ref  # [2, per_step * block_size, V], its twin
    acc_vmem: Ref  # [rows, V] float32
    sems: Ref  # [2], by slot


def sparse_attention_body(plan: Plan, refs: Refs) -> None:
    """Attention of one query to the blocks of its lists."""
    (G, rows, D), V, size = refs.q.shape, refs.o.shape[2], plan.block_size
    L, K = refs.ids_smem.shape
    b = pl.program_id(0)
    most = refs.n_blocks_smem[0, 0]
    for i in range(1, L):
        most = jnp.maximum(most, refs.n_blocks_smem[0, i])
    # One step at least, in which nothing counts: it writes the zeros.
    n_steps = jnp.maximum(lax.div(most + (plan.per_step - 1), jnp.int32(plan.per_step)), 1)

    def place(step: Array) -> tuple[Array, Array]:
        """Of a step in the row of all: its group, and the group's step."""
        return lax.div(step, n_steps), lax.rem(step, n_steps)

    def block(step: Array, i: int) -> tuple[Array, Array]:
        """Block i of a step, and how many of its tokens count."""
        g, at = place(step)
        of = g if L > 1 else 0
        entry = at * plan.per_step + i
        block_id = refs.ids_smem[of, jnp.minimum(entry, K - 1)]
        count = jnp.where(block_id == refs.last_smem[0, 0], refs.last_smem[0, 1], size)
        return block_id, jnp.where(entry < refs.n_blocks_smem[0, of], count, 0)

    def copies(step: Array) -> list:
        slot, (g, _) = lax.rem(step, 2), place(step)
        made = []
        for i in range(plan.per_step):
            first = pl.multiple_of(block(step, i)[0] * size, size)
            for hbm, vmem, width in ((refs.k_hbm, refs.k_vmem, D), (refs.v_hbm, refs.v_vmem, V)):
                source = hbm.at[b, pl.ds(first, size), pl.ds(pl.multiple_of(g * width, LANES), width)]
                made.append(pltpu.make_async_copy(source, vmem.at[slot, pl.ds(i * size, size)], refs.sems.at[slot]))
        return made

    def start(step: Array) -> None:
        for copy in copies(step):
            copy.start()

    def clear_values(slot: Array, i: int, count: Array) -> None:
        """Zeros in the values of the tokens that do not count: a probability of 0 would not hide a NaN there."""
        at = pl.ds(i * size, size)
        is_real = lax.broadcasted_iota(jnp.int32, (size, V), 0) < count
        values = refs.v_vmem[slot, at].astype(jnp.float32)
        refs.v_vmem[slot, at] = jnp.where(is_real, values, 0.0).astype(refs.v_vmem.dtype)

    def one_step(step: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        (g, at), slot = place(step), lax.rem(step, 2)
        pl.when(step + 1 < G * n_steps)(lambda: start(step + 1))
        for copy in copies(step):
            copy.wait()
        masks = []
        for i in range(plan.per_step):
            count = block(step, i)[1]
            pl.when(count < size)(functools.partial(clear_values, slot, i, count))
            masks.append(jnp.where(lax.broadcasted_iota(jnp.int32, (1, size), 1) < count, 1.0, 0.0))
        mask = jnp.concatenate(masks, axis=1)  # [1, per_step * block_size]
        logits = lax.dot_general(
            refs.q[g], refs.k_vmem[slot], (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
        )
        logits = jnp.where(mask > 0, logits * plan.scale, _LOWEST)
        is_first = at == 0
        highest, total = jnp.where(is_first, _LOWEST, carry[0]), jnp.where(is_first, 0.0, carry[1])  # [rows, 1]
        now = jnp.maximum(highest, jnp.max(logits, axis=1, keepdims=True))
        p = jnp.exp(logits - now) * mask
        decay = jnp.exp(highest - now)
        values = jnp.dot(p.astype(refs.v_vmem.dtype), refs.v_vmem[slot], preferred_element_type=jnp.float32)
        acc = jnp.where(is_first, 0.0, refs.acc_vmem[...] * decay) + values
        refs.acc_vmem[...] = acc
        total = total * decay + jnp.sum(p, axis=1, keepdims=True)

        @pl.when(at == n_steps - 1)
        def _group_ends():
            some = jnp.maximum(total, 1e-30)  # NaN, of a listed token, stays
            refs.o[g] = (acc / some).astype(refs.o.dtype)
            lse = jnp.where(total == 0.0, -jnp.inf, now + jnp.log(some))
            refs.lse[g] = jnp.broadcast_to(lse, (rows, LANES))

        return now, total

    start(jnp.int32(0))
    none = (jnp.full((rows, 1), _LOWEST, jnp.float32), jnp.zeros((rows, 1), jnp.float32))
    lax.fori_loop(0, G * n_steps, one_step, none)
