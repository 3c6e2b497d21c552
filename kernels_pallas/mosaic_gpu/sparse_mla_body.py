"""Device code of `sparse_mla`: the roles of the warp-groups.

    load: landed[slot] -> score: p_full[slot] -> add values, two of them: k_free[slot] -> load

A tile is 64 tokens of a query's list, and there are two slots. Its probabilities take the place of its last 64 key
columns, which are no value: there is no room for them elsewhere. In interpret mode `k_full` stands for `landed`.
"""

import dataclasses
import math
from collections.abc import Callable

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from hisa_jax.kernels_pallas.mosaic_gpu.ptx import gather_rows as gather
from hisa_jax.kernels_pallas.mosaic_gpu.ptx import sparse_mla
from hisa_jax.kernels_pallas.mosaic_gpu.ptx.gather_rows import gather_rows, load_lane_word, load_word, store_bias
from hisa_jax.kernels_pallas.mosaic_gpu.ptx.sparse_mla import PER_HEAD
from hisa_jax.kernels_pallas.mosaic_gpu.warpgroups import release, wait_all
from hisa_jax.kernels_pallas.types import Ref

HEADS = 64  # of one query a CTA takes: the rows of a product
SLOTS, TOKENS = 2, 64  # of a tile
KEY_DIM, VALUE_DIM = 576, 512
HALF = VALUE_DIM // 2  # value columns a warp-group: 128 accumulators a thread
QUARTER = HALF // 2  # columns a product: ptxas refuses 256 in a kernel launched with 128 registers a thread
# Columns that come and go together: what each warp-group of values multiplies first, and the rest.
PARTS = (((0, 128), (256, 128)), ((128, 128), (384, 128), (512, 64)))
SCORES, LOAD = 2, 3  # warp-groups; 0 and 1 take the values
VALUE_REGISTERS, SCORE_REGISTERS, LOAD_REGISTERS = 168, 120, 56  # twice the first and the others: 512
PER_TOKEN = plgpu.Layout.WGMMA.reduce(0)
_LOG2_E = math.log2(math.e)
_LEAST = -1e30  # a finite stand-in for -inf, so that differences of maxima stay numbers
_SLACK = 8.0  # the maximum may lag this much (as a power of two) behind, which spares rescaling the sums


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """The static numbers of a launch."""

    T: int  # queries of all sequences
    queries: int  # of a sequence
    keys: int  # of a sequence
    groups: int  # of 64 heads
    n_splits: int
    pairs: int  # of tiles a split
    scale: float
    n_ctas: int
    interpret: object

    @property
    def n_items(self) -> int:
        return self.n_splits * self.T * self.groups

    def items(self, cta: Array) -> Array:
        """How many items this CTA has: cta, cta + n_ctas, ..."""
        return (self.n_items - cta + self.n_ctas - 1) // self.n_ctas

    def item(self, cta: Array, i: Array) -> tuple[Array, Array, Array, Array]:
        """Split, query, first head, and place in n_pairs. Groups of a query are neighbours: the L2 cache serves one."""
        item = cta + i * self.n_ctas
        place = item // self.groups
        return place // self.T, place % self.T, item % self.groups * HEADS, place


def sparse_mla_body(plan: Plan, *refs: Ref, **scratch: Ref) -> None:
    n_pairs_gmem, indices_gmem, q_gmem, kv_gmem, o_gmem, lse_gmem = refs
    role = lax.axis_index("warpgroup")
    pl.when(role < SCORES)(lambda: add_values(plan, role, n_pairs_gmem, o_gmem, **scratch))
    pl.when(role == SCORES)(lambda: score(plan, n_pairs_gmem, lse_gmem, **scratch))
    load = load_interpreted if plan.interpret else load_keys
    pl.when(role == LOAD)(lambda: load(plan, n_pairs_gmem, indices_gmem, q_gmem, kv_gmem, **scratch))


def load_keys(
    plan: Plan,
    n_pairs_gmem: Ref,
    indices_gmem: Ref,
    q_gmem: Ref,
    kv_gmem: Ref,
    *,
    q_smem: Ref,
    k_smem: Ref,
    bias_smem: Ref,
    landed_smem: Ref,
    ready: Ref,
    q_full: Ref,
    q_free: Ref,
    k_free: Ref,
    **_: Ref,
) -> None:
    """A warp takes half of the rows of each tile, and one part of their columns."""
    plgpu.set_max_registers(LOAD_REGISTERS, action="decrease")
    cta = lax.axis_index("cta")

    def one_part(part: int, first: Array, brings_queries: Array) -> None:
        plgpu.barrier_wait(ready)

        def one_item(i, _):
            split, t, head, place = plan.item(cta, i)
            first_row = t // plan.queries * plan.keys
            column = split * plan.pairs * SLOTS * TOKENS + first
            fetch = lambda j: load_lane_word(indices_gmem, t, column + j * TOKENS)  # noqa: E731

            @pl.when(brings_queries)
            def _queries():
                plgpu.barrier_wait(q_free)
                plgpu.copy_gmem_to_smem(q_gmem.at[t, pl.ds(head, HEADS)], q_smem.at[0], q_full)

            def one_tile(j, index):
                barrier = j % SLOTS * len(PARTS) + part
                row = jnp.where((index >= 0) & (index < plan.keys), first_row + index, -1)
                plgpu.barrier_wait(k_free.at[barrier])
                gather_rows(kv_gmem, row, k_smem, j % SLOTS, first, PARTS[part], landed_smem, barrier)
                if part == 0:
                    store_bias(bias_smem, j % SLOTS, first, row, landed_smem, barrier)
                return fetch(j + 1)

            lax.fori_loop(0, SLOTS * load_word(n_pairs_gmem, place), one_tile, fetch(0))
            return _

        lax.fori_loop(0, plan.items(cta), one_item, None)

    @plgpu.warp_map
    def _warps(warp):
        first = warp % 2 * gather.ROWS
        pl.when(warp // 2 == 0)(lambda: one_part(0, first, warp == 0))
        pl.when(warp // 2 == 1)(lambda: one_part(1, first, warp < 0))


def load_interpreted(
    plan: Plan,
    n_pairs_gmem: Ref,
    indices_gmem: Ref,
    q_gmem: Ref,
    kv_gmem: Ref,
    *,
    q_smem: Ref,
    k_smem: Ref,
    bias_smem: Ref,
    q_full: Ref,
    q_free: Ref,
    k_full: Ref,
    k_free: Ref,
    **_: Ref,
) -> None:
    """`load_keys` in jnp, for interpret mode, which cannot run PTX."""
    cta = lax.axis_index("cta")

    def one_item(i, _):
        split, t, head, place = plan.item(cta, i)
        plgpu.barrier_wait(q_free)
        plgpu.copy_gmem_to_smem(q_gmem.at[t, pl.ds(head, HEADS)], q_smem.at[0], q_full)
        indices, kv = indices_gmem[t], kv_gmem[...]

        def one_pair(pair, _):
            for slot in range(SLOTS):
                column = ((split * plan.pairs + pair) * SLOTS + slot) * TOKENS + jnp.arange(TOKENS, dtype=jnp.int32)
                index = jnp.where(column < indices.shape[0], indices[jnp.minimum(column, indices.shape[0] - 1)], -1)
                there = (index >= 0) & (index < plan.keys)
                row = t // plan.queries * plan.keys + jnp.where(there, index, 0)
                for part in range(len(PARTS)):
                    plgpu.barrier_wait(k_free.at[slot * len(PARTS) + part])
                k_smem[slot] = jnp.where(there[:, None], kv[row], 0).astype(kv.dtype)
                bias_smem[slot] = jnp.where(there, 0.0, -jnp.inf)
                plgpu.commit_smem()
                plgpu.barrier_arrive(k_full.at[slot])
            return _

        return lax.fori_loop(0, n_pairs_gmem[place], one_pair, _)

    lax.fori_loop(0, plan.items(cta), one_item, None)
    wait_all(k_free, SLOTS * len(PARTS))
    plgpu.barrier_wait(q_free)


def score(
    plan: Plan,
    n_pairs_gmem: Ref,
    lse_gmem: Ref,
    *,
    q_smem: Ref,
    k_smem: Ref,
    bias_smem: Ref,
    decay_smem: Ref,
    total_smem: Ref,
    q_full: Ref,
    q_free: Ref,
    p_full: Ref,
    k_full: Ref = None,
    ready: Ref = None,
    landed_smem: Ref = None,
    turn_smem: Ref = None,
    **_: Ref,
) -> None:
    """Probabilities of each tile, and by how much they make the earlier ones decay."""
    plgpu.set_max_registers(SCORE_REGISTERS, action="decrease")
    cta = lax.axis_index("cta")
    if not plan.interpret:
        # Every lane of two warps; the bias arrives with the first part.
        gather.init_landed(landed_smem, (4 * gather.ROWS, 2 * gather.ROWS) * SLOTS)
        sparse_mla.unclaim(turn_smem)
        plgpu.barrier_arrive(ready)
    plgpu.barrier_arrive(q_free)
    row = lambda value: plgpu.layout_cast(jnp.full((HEADS,), value, jnp.float32), PER_HEAD)  # noqa: E731

    def one_item(i, n_before):
        split, t, head, place = plan.item(cta, i)
        n_tiles = SLOTS * n_pairs_gmem[place]
        plgpu.barrier_wait(q_full)

        def one_tile(j, carry):
            (highest, total), slot = carry, j % SLOTS

            def wait(part: int) -> None:
                if not plan.interpret:
                    gather.wait_landed(landed_smem, slot * len(PARTS) + part, (n_before + j) // SLOTS)
                elif part == 0:
                    plgpu.barrier_wait(k_full.at[slot])

            zero = jnp.int32(0) if plan.interpret else sparse_mla.opaque_zero()
            products = products_of(q_smem.at[zero], k_smem.at[slot], wait)
            if not plan.interpret:
                sparse_mla.unclaim(turn_smem)
            bias = plgpu.load(bias_smem.at[slot], layout=PER_TOKEN)
            logits = products * (plan.scale * _LOG2_E) + lax.broadcast_in_dim(bias, products.shape, [1])
            here = jnp.max(logits, axis=1)
            new_highest = jnp.where(here > highest + _SLACK, here, highest)
            p = jnp.exp2(logits - lax.broadcast_in_dim(new_highest, logits.shape, [0]))
            decay = jnp.exp2(highest - new_highest)
            total = total * decay + jnp.sum(p, axis=1)
            p = p.astype(k_smem.dtype)
            if plan.interpret:
                k_smem.at[slot, :, pl.ds(VALUE_DIM, TOKENS)][...] = p
                decay_smem[slot], total_smem[slot] = decay, total
                plgpu.commit_smem()
            else:
                sparse_mla.store_p(k_smem, slot, VALUE_DIM, p)
                sparse_mla.store_rows(decay_smem, slot, decay)
                sparse_mla.store_rows(total_smem, slot, total)
                sparse_mla.show_stores()
                barrier = (j + 1) % SLOTS * len(PARTS)
                sparse_mla.claim(turn_smem, landed_smem, barrier, (n_before + j + 1) // SLOTS)
            plgpu.barrier_arrive(p_full.at[slot])
            return new_highest, total

        highest, total = lax.fori_loop(0, n_tiles, one_tile, (row(_LEAST), row(0.0)))
        release(plan, q_free)
        # NaN, of a chosen token, stays: -inf would say that nothing was chosen.
        lse = (highest + jnp.log2(jnp.where(total == 0.0, 1.0, total))) / _LOG2_E
        lse_gmem[split, t, pl.ds(head, HEADS)] = jnp.where(total == 0.0, -jnp.inf, lse)
        return n_before + n_tiles

    lax.fori_loop(0, plan.items(cta), one_item, jnp.int32(0))


def add_values(
    plan: Plan,
    half: Array,
    n_pairs_gmem: Ref,
    o_gmem: Ref,
    *,
    k_smem: Ref,
    decay_smem: Ref,
    total_smem: Ref,
    k_free: Ref,
    p_full: Ref,
    turn_smem: Ref = None,
    **_: Ref,
) -> None:
    """Half of the value columns of the output."""
    plgpu.set_max_registers(VALUE_REGISTERS, action="increase")
    cta = lax.axis_index("cta")
    columns = lambda part: pl.ds((half * 2 + part) * QUARTER, QUARTER)  # noqa: E731
    for barrier in range(SLOTS * len(PARTS)):
        plgpu.barrier_arrive(k_free.at[barrier])

    def one_item(i, _):
        split, t, head, place = plan.item(cta, i)

        def one_tile(j, carry):
            o, slot = carry[:-1], j % SLOTS
            plgpu.barrier_wait(p_full.at[slot])
            decay = plgpu.load(decay_smem.at[slot], layout=PER_HEAD)
            total = plgpu.load(total_smem.at[slot], layout=PER_HEAD)
            scaled = lambda o: tuple(x * lax.broadcast_in_dim(decay, x.shape, [0]) for x in o)  # noqa: E731
            if plan.interpret:
                o = scaled(o)
            else:  # rarely does any maximum of a warp's rows move
                o = lax.cond(sparse_mla.any_decay(decay) > 0, scaled, lambda o: o, o)
                sparse_mla.let_first(turn_smem)
            p = k_smem.at[slot, :, pl.ds(VALUE_DIM, TOKENS)]
            values = [k_smem.at[slot, :, columns(part)] for part in range(2)]
            o = add_products(o, p, values, lambda part: release(plan, k_free.at[slot * len(PARTS) + part]), plan)
            return *o, total

        zeros = plgpu.layout_cast(jnp.zeros((HEADS, QUARTER), jnp.float32), plgpu.Layout.WGMMA)
        nothing = plgpu.layout_cast(jnp.zeros((HEADS,), jnp.float32), PER_HEAD)
        *o, total = lax.fori_loop(0, SLOTS * n_pairs_gmem[place], one_tile, (zeros, zeros, nothing))
        share = 1.0 / jnp.where(total > 0, total, 1.0)
        for part, x in enumerate(o):
            x = x * lax.broadcast_in_dim(share, x.shape, [0])
            place, x = o_gmem.at[split, t, pl.ds(head, HEADS), columns(part)], x.astype(o_gmem.dtype)
            if plan.interpret:
                place[...] = x
            else:
                sparse_mla.store_output(place, x)
        return _

    lax.fori_loop(0, plan.items(cta), one_item, None)


def products_of(q: Ref, k: Ref, wait: Callable[[int], None]) -> Array:
    """q @ k.T in float32, part by part of their columns, each waited for."""

    def multiply(acc: Ref) -> Array:
        for part, pieces in enumerate(PARTS):
            wait(part)
            for first, n in pieces:
                plgpu.wgmma(acc, q.at[:, pl.ds(first, n)], k.at[:, pl.ds(first, n)].T)
        return acc[...]

    return pl.run_scoped(multiply, plgpu.ACC((HEADS, TOKENS), jnp.float32))


def add_products(
    o: tuple[Array, ...], p: Ref, values: list[Ref], release: Callable[[int], None], plan: Plan
) -> tuple[Array, ...]:
    """o[i] + p @ values[i]; values[i] goes back as soon as it is read."""
    if plan.interpret:  # the interpreter has no accumulators with a start

        def product(part: int) -> Array:
            def multiply(acc: Ref) -> Array:
                plgpu.wgmma(acc, p, values[part])
                return acc[...]

            return pl.run_scoped(multiply, plgpu.ACC((HEADS, QUARTER), jnp.float32))

        o = tuple(x + product(part) for part, x in enumerate(o))
        release(0)
    else:

        def multiply(accs: tuple[Ref, ...]) -> None:
            for acc, v in zip(accs, values, strict=True):
                plgpu.wgmma(acc, p, v)
            plgpu.wgmma_wait(1)
            release(0)

        o = pl.run_state(multiply)(tuple(map(plgpu.ACC.init, o)))
    release(1)
    return o
