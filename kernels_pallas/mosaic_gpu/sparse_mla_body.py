"""Device code of `sparse_mla`: the roles of the warp-groups."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from hisa_jax.kernels_pallas.mosaic_gpu.ptx import gather_rows as gather
from hisa_jax.kernels_pallas.mosaic_gpu.ptx import sparse_mla
from hisa_jax.kernels_pallas.mosaic_gpu.ptx.count_tiles import count_tiles
from hisa_jax.kernels_pallas.mosaic_gpu.ptx.gather_latents import gather_latents
from hisa_jax.kernels_pallas.mosaic_gpu.ptx.gather_rows import (
    ROWS_PER_WARP,
    TileRows,
    gather_rows,
    load_lane_word,
    load_word,
    store_bias,
)
from hisa_jax.kernels_pallas.mosaic_gpu.ptx.sparse_mla import PER_HEAD
from hisa_jax.kernels_pallas.mosaic_gpu.sparse_mla_plan import (
    BIAS,
    DECAY,
    HEADS,
    HELD,
    LOAD_REGISTERS,
    PAIR,
    PARTS,
    ROPE,
    SCORE_REGISTERS,
    SLOTS,
    TOKENS,
    TOTAL,
    VALUE_DIM,
    VALUE_REGISTERS,
    WORDS,
    Inputs,
    Plan,
    Smem,
)
from hisa_jax.kernels_pallas.mosaic_gpu.warpgroups import release, wait_all
from hisa_jax.kernels_pallas.types import Ref
from hisa_jax.latents import GROUP, QuantizedLatents

HALF = VALUE_DIM // 2  # value columns a warp-group: 128 accumulators a thread
QUARTER = HALF // 2  # columns a product: ptxas refuses 256 in a kernel launched with 128 registers a thread
SCORES, LOAD = 2, 3  # warp-groups; 0 and 1 take the values
PER_TOKEN = plgpu.Layout.WGMMA.reduce(0)
_LOG2_E = math.log2(math.e)
_LEAST = -1e30  # a finite stand-in for -inf, so that differences of maxima stay numbers
_SLACK = 8.0  # the maximum may be this much too low (as a power of two), which spares rescaling the sums


def sparse_mla_body(plan: Plan, gmem: Inputs, o_gmem: Ref, lse_gmem: Ref, smem: Smem) -> None:
    #   loader (4 warps)  ->  landed[slot, part]  ->  scorer  ->  p_full[slot]  ->  two warp-groups of values  ->  o
    #                     <-  rope_free[slot]  <--         <---  p_free  <---------  half of the columns each
    #                     <-  k_free[slot, part]  <------------------------------
    #
    # A tile is 64 tokens of a query's list, and there are two slots: while values are added up for one tile, the next
    # is scored and the one after it is on its way. Columns come and go in parts, so that scoring starts when the first
    # has landed, and copies when the first has been read. The last 64 columns, which are no value, go before the rest.
    #
    # There is room for one tile's probabilities: those of the next are in registers by the time these are read. The
    # output, the softmax's sums and 128 columns of the query stay in registers from its first tile to its last. Scores
    # and values take the tensor core as they come: to let scores go first cost 1 %.
    #
    # Latents in 8 bits land in their slot, where the loader writes them anew in bfloat16: the rest is the same.
    #
    # In interpret mode, which cannot run PTX, `load_interpreted` loads and `k_full` stands for `landed`.
    role = lax.axis_index("warpgroup")
    pl.when(role < SCORES)(lambda: add_values(plan, role, gmem, o_gmem, smem))
    pl.when(role == SCORES)(lambda: score(plan, gmem, lse_gmem, smem))
    load = load_interpreted if plan.interpret else load_keys
    pl.when(role == LOAD)(lambda: load(plan, gmem, smem))


def tiles_of(plan: Plan, gmem: Inputs, split: Array, t: Array, by_warp: bool = False) -> Array:
    """Tiles up to the last token of a part of a list, in pairs, one at least: what all roles agree on.

    Args:
        by_warp: for a warp by itself.
    """
    if gmem.n_pairs is not None:
        i = split * plan.T + t
        return SLOTS * (load_word(gmem.n_pairs, i) if by_warp else gmem.n_pairs[i])
    K, first = gmem.indices.shape[1], split * plan.pairs * PAIR
    end = jnp.minimum(first + plan.pairs * PAIR, K)
    if not plan.interpret:
        return count_tiles(gmem.indices, t, first, end, plan.keys, PAIR)
    index, column = gmem.indices[t], jnp.arange(K, dtype=jnp.int32)
    is_real = (index >= 0) & (index < plan.keys) & (column < end)
    return SLOTS * (jnp.maximum(jnp.max(jnp.where(is_real, column, first)) - first, 0) // PAIR + 1)


def load_keys(plan: Plan, gmem: Inputs, smem: Smem) -> None:
    """All warps bring some rows of one part of a tile, and then of the next.

    Of latents in 8 bits, which take their time to convert, a warp brings half of the rows of one part.
    """
    plgpu.set_max_registers(LOAD_REGISTERS, action="decrease")
    cta, is_quantized = lax.axis_index("cta"), isinstance(gmem.kv, QuantizedLatents)

    def copy(parts: tuple[int, ...], first: Array, n_rows: int, brings_queries: Array) -> None:
        plgpu.barrier_wait(smem.ready)

        def one_item(i, _):
            split, t, head = plan.item(cta, i)
            first_row = t // plan.queries * plan.keys
            column = split * plan.pairs * PAIR + first
            fetch = lambda j: load_lane_word(gmem.indices, t, column + j * TOKENS)  # noqa: E731

            def queries():
                plgpu.barrier_wait(smem.q_free)
                plgpu.copy_gmem_to_smem(gmem.q.at[t, pl.ds(head, HEADS)], smem.q.at[0], smem.q_full)

            def one_tile(j, index):
                slot = j % SLOTS
                row = jnp.where((index >= 0) & (index < plan.keys), first_row + index, -1)
                tile = TileRows(smem.k, slot, first, n_rows)
                for part in parts:
                    barrier = slot * len(PARTS) + part
                    landed = smem.landed(barrier)
                    if part == rope_part(is_quantized):
                        plgpu.barrier_wait(smem.rope_free.at[slot])
                        if not is_quantized:  # lands with the columns that come next
                            gather_rows(gmem.kv, row, tile, (ROPE,), None, keeps=True)
                    plgpu.barrier_wait(smem.k_free.at[barrier])
                    if isinstance(gmem.kv, QuantizedLatents):
                        gather_latents(gmem.kv, row, tile, *groups_of(part), landed)
                    else:
                        gather_rows(gmem.kv, row, tile, PARTS[part], landed, keeps=True)
                    if part == 0:
                        store_bias(smem.bias(slot), first, n_rows, row, landed)
                # The next tile's index, so that it is there when its slot is.
                following = fetch(j + 1)
                # The last list's queries are needed longer than the slot of this one's first tile.
                pl.when(brings_queries & (i > 0) & (j == 0))(queries)
                return following

            index = fetch(0)
            pl.when(brings_queries & (i == 0))(queries)
            lax.fori_loop(0, tiles_of(plan, gmem, split, t, by_warp=True), one_tile, index)
            return _

        lax.fori_loop(0, plan.items(cta), one_item, None)

    @plgpu.warp_map
    def _warps(warp):
        if is_quantized:
            first = warp % 2 * ROWS_PER_WARP
            pl.when(warp // 2 == 0)(lambda: copy((0,), first, ROWS_PER_WARP, warp == 0))
            pl.when(warp // 2 == 1)(lambda: copy((1,), first, ROWS_PER_WARP, warp < 0))
        else:
            copy((0, 1), warp * ROWS_PER_WARP // 2, ROWS_PER_WARP // 2, warp == 0)


def arrivals(is_quantized: bool) -> tuple[int, int]:
    """At the barriers of both parts of a tile: of all lanes of four warps, of latents in 8 bits of two a part.

    With the first part the bias arrives, once a token; a rope part beside values of 8 bits by itself.
    """
    lanes = ROWS_PER_WARP * (2 if is_quantized else 4)
    return lanes + TOKENS, (1 + is_quantized) * lanes


def rope_part(is_quantized: bool) -> int:
    """The part that the last columns come with: the first, so that few are missing when the other one has landed.

    In 8 bits they are bfloat16 already, and the warps of the second part have time for them.
    """
    return 1 if is_quantized else 0


def groups_of(part: int) -> tuple[tuple[int, ...], bool]:
    """Of latents in 8 bits, a part's groups of values that share a scale, and whether the rope part comes with it."""
    return tuple(start // GROUP for start, _ in PARTS[part]), part == 1


def load_interpreted(plan: Plan, gmem: Inputs, smem: Smem) -> None:
    """`load_keys` in jnp, for interpret mode, which cannot run PTX."""
    cta = lax.axis_index("cta")

    def one_item(i, _):
        split, t, head = plan.item(cta, i)
        plgpu.barrier_wait(smem.q_free)
        plgpu.copy_gmem_to_smem(gmem.q.at[t, pl.ds(head, HEADS)], smem.q.at[0], smem.q_full)
        indices, kv = gmem.indices[t], jax.tree.map(lambda ref: ref[...], gmem.kv)

        def one_pair(pair, _):
            for slot in range(SLOTS):
                column = (split * plan.pairs + pair) * PAIR + slot * TOKENS + jnp.arange(TOKENS, dtype=jnp.int32)
                index = jnp.where(column < indices.shape[0], indices[jnp.minimum(column, indices.shape[0] - 1)], -1)
                there = (index >= 0) & (index < plan.keys)
                row = t // plan.queries * plan.keys + jnp.where(there, index, 0)
                for part in range(len(PARTS)):
                    plgpu.barrier_wait(smem.k_free.at[slot * len(PARTS) + part])
                plgpu.barrier_wait(smem.rope_free.at[slot])
                smem.k[slot] = jnp.where(there[:, None], rows_of(kv, row), 0).astype(smem.k.dtype)
                smem.rows[BIAS + slot] = jnp.where(there, 0.0, -jnp.inf)
                plgpu.commit_smem()
                plgpu.barrier_arrive(smem.k_full.at[slot])
            return _

        return lax.fori_loop(0, tiles_of(plan, gmem, split, t) // SLOTS, one_pair, _)

    lax.fori_loop(0, plan.items(cta), one_item, None)
    wait_all(smem.k_free, SLOTS * len(PARTS))
    wait_all(smem.rope_free, SLOTS)
    plgpu.barrier_wait(smem.q_free)


def rows_of(kv: Array | QuantizedLatents, row: Array) -> Array:
    """kv[row], what latents in 8 bits are."""
    found = jax.tree.map(lambda x: x[row], kv)
    return found.dequantize() if isinstance(found, QuantizedLatents) else found


def score(plan: Plan, gmem: Inputs, lse_gmem: Ref, smem: Smem) -> None:
    """Probabilities of each tile, and by how much they make the earlier ones decay."""
    plgpu.set_max_registers(SCORE_REGISTERS, action="decrease")
    cta, is_quantized = lax.axis_index("cta"), isinstance(gmem.kv, QuantizedLatents)
    if not plan.interpret:
        gather.init_landed(smem.rows.at[WORDS], arrivals(is_quantized) * SLOTS)
        plgpu.barrier_arrive(smem.ready)
    plgpu.barrier_arrive(smem.q_free)
    for slot in range(SLOTS):
        plgpu.barrier_arrive(smem.rope_free.at[slot])
    row = lambda value: plgpu.layout_cast(jnp.full((HEADS,), value, jnp.float32), PER_HEAD)  # noqa: E731

    def one_item(i, n_before):
        split, t, head = plan.item(cta, i)
        n_tiles = tiles_of(plan, gmem, split, t)
        plgpu.barrier_wait(smem.q_full)
        # So much of the queries stays in registers: the tensor core reads that from shared memory once a list.
        load = lambda first: plgpu.load(smem.q.at[0, :, pl.ds(first, 64)], layout=plgpu.Layout.WGMMA)  # noqa: E731
        held = {} if plan.interpret else {first: load(first) for first in HELD}

        def one_tile(j, carry):
            (highest, total), slot = carry, j % SLOTS

            def wait(part: int) -> None:
                if not plan.interpret:
                    gather.wait_landed(smem.landed(slot * len(PARTS) + part), (n_before + j) // SLOTS)
                elif part == 0:
                    plgpu.barrier_wait(smem.k_full.at[slot])

            zero = jnp.int32(0) if plan.interpret else sparse_mla.opaque_zero()
            products = products_of(smem.q.at[zero], smem.k.at[slot], wait, rope_part(is_quantized), held)
            release(plan, smem.rope_free.at[slot])
            bias = plgpu.load(smem.rows.at[BIAS + slot], layout=PER_TOKEN)
            # To base two, which is what the hardware's exponential takes.
            logits = products * (plan.scale * _LOG2_E) + lax.broadcast_in_dim(bias, products.shape, [1])
            here = jnp.max(logits, axis=1)
            new_highest = jnp.where(here > highest + _SLACK, here, highest)
            p = jnp.exp2(logits - lax.broadcast_in_dim(new_highest, logits.shape, [0]))
            decay = jnp.exp2(highest - new_highest)
            total = total * decay + jnp.sum(p, axis=1)
            p = p.astype(smem.p.dtype)
            plgpu.barrier_wait(smem.p_free)
            if plan.interpret:
                smem.p[...] = p
                smem.rows[DECAY + slot], smem.rows[TOTAL + slot] = decay, total
                plgpu.commit_smem()
            else:
                sparse_mla.store_p(smem.p, p)
                sparse_mla.store_rows(smem.rows, DECAY + slot, decay)
                sparse_mla.store_rows(smem.rows, TOTAL + slot, total)
                sparse_mla.show_stores()
            plgpu.barrier_arrive(smem.p_full.at[slot])
            return new_highest, total

        highest, total = lax.fori_loop(0, n_tiles, one_tile, (row(_LEAST), row(0.0)))
        release(plan, smem.q_free)
        # NaN, of a chosen token, stays: -inf would say that nothing was chosen.
        lse = (highest + jnp.log2(jnp.where(total == 0.0, 1.0, total))) / _LOG2_E
        lse_gmem[split, t, pl.ds(head, HEADS)] = jnp.where(total == 0.0, -jnp.inf, lse)
        return n_before + n_tiles

    lax.fori_loop(0, plan.items(cta), one_item, jnp.int32(0))
    if plan.interpret:
        plgpu.barrier_wait(smem.p_free)


def add_values(plan: Plan, half: Array, gmem: Inputs, o_gmem: Ref, smem: Smem) -> None:
    """Half of the value columns of the output."""
    plgpu.set_max_registers(VALUE_REGISTERS, action="increase")
    cta = lax.axis_index("cta")
    columns = lambda part: pl.ds((half * 2 + part) * QUARTER, QUARTER)  # noqa: E731
    for barrier in range(SLOTS * len(PARTS)):
        plgpu.barrier_arrive(smem.k_free.at[barrier])
    plgpu.barrier_arrive(smem.p_free)

    def one_item(i, _):
        split, t, head = plan.item(cta, i)

        def one_tile(j, carry):
            o, slot = carry[:-1], j % SLOTS
            plgpu.barrier_wait(smem.p_full.at[slot])
            decay = plgpu.load(smem.rows.at[DECAY + slot], layout=PER_HEAD)
            total = plgpu.load(smem.rows.at[TOTAL + slot], layout=PER_HEAD)
            scaled = lambda o: tuple(x * lax.broadcast_in_dim(decay, x.shape, [0]) for x in o)  # noqa: E731
            if plan.interpret:
                o = scaled(o)
            else:  # rarely does any maximum of a warp's rows move
                o = lax.cond(sparse_mla.any_decay(decay, total) > 0, scaled, lambda o: o, o)
            values = [smem.k.at[slot, :, columns(part)] for part in range(2)]
            free = lambda part: release(plan, smem.k_free.at[slot * len(PARTS) + part])  # noqa: E731
            o = add_products(o, smem.p, values, free, plan)
            release(plan, smem.p_free)
            return *o, total

        zeros = plgpu.layout_cast(jnp.zeros((HEADS, QUARTER), jnp.float32), plgpu.Layout.WGMMA)
        nothing = plgpu.layout_cast(jnp.zeros((HEADS,), jnp.float32), PER_HEAD)
        n_tiles = tiles_of(plan, gmem, split, t)
        *o, total = lax.fori_loop(0, n_tiles, one_tile, (zeros, zeros, nothing))
        # A query without tokens has a total of 0, and zeros for an output.
        share = 1.0 / jnp.where(total > 0, total, 1.0)
        for part, x in enumerate(o):
            x = x * lax.broadcast_in_dim(share, x.shape, [0])
            target, x = o_gmem.at[split, t, pl.ds(head, HEADS), columns(part)], x.astype(o_gmem.dtype)
            if plan.interpret:
                target[...] = x
            else:
                sparse_mla.store_output(target, x)
        return _

    lax.fori_loop(0, plan.items(cta), one_item, None)


def products_of(q: Ref, k: Ref, wait: Callable[[int], None], rope_part: int, held: dict[int, Array]) -> Array:
    """q @ k.T in float32, part by part of their columns, each waited for.

    Args:
        held: 64 columns of q each, in registers, by the first of them.
    """

    def multiply(acc: Ref) -> Array:
        for part, pieces in enumerate(PARTS):
            wait(part)
            for first, n in (*pieces, ROPE) if part == rope_part else pieces:
                if first in held:
                    plgpu.wgmma(acc, held[first], k.at[:, pl.ds(first, 64)].T)
                    first, n = first + 64, n - 64
                if n:
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
