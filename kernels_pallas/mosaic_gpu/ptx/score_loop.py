"""Scoring with the keys in registers: a warp-group's 128 keys stay, queries stream past, all in one loop of PTX.

As wgmma's A operand a tile of keys is 32 registers a thread (64 in two parts), loaded once for all queries of an item.
The tensor core then reads only the query's heads from shared memory, 64 bytes a cycle instead of all 128 there are, and
the sums over the first half of the keys are taken while the product of the second is in flight. Pallas can say neither:
it loads operands anew for every product and waits for all of them.

Which key a row of the tensor core's tile holds is free when registers are loaded: rows are chosen so that the sum of
key 32 * warp + lane ends in that very lane, and a warp stores 128 bytes in order.
"""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith

from hisa_jax.kernels_pallas.mosaic_gpu.barriers import barrier_address
from hisa_jax.kernels_pallas.mosaic_gpu.ptx.inline import REF, SPLAT, address_of, i32, numbered
from hisa_jax.kernels_pallas.mosaic_gpu.ptx.lanes import multiply_and_sum
from hisa_jax.kernels_pallas.mosaic_gpu.ptx.score_loop_text import KEYS_PER_WARPGROUP, OPERANDS, Shape, loop_ptx
from hisa_jax.kernels_pallas.sort_key import FORCED, INVISIBLE, sort_key_of
from hisa_jax.kernels_pallas.types import Interpret, Ref


@dataclasses.dataclass(frozen=True, kw_only=True)
class Item:
    """What a warp-group scores: a tile of keys for a run of queries. Int32 scalars, of JAX or of the lowered kernel.

    Attributes:
        key_slot: which barrier of `k_free` the tile goes back by; `tile`: which of the tiles in shared memory.
        first: the first query; `n`: how many, at least 1; `n_before`: how many this warp-group has met before, from
            which the ring's slot and phase follow.
        column: of the result, where the tile's first key goes; `candidate`: what limits and forced candidates call it.
    """

    key_slot: Any
    tile: Any
    n: Any
    n_before: Any
    first: Any
    column: Any
    candidate: Any


class Smem(NamedTuple):
    """Shared memory of a CTA: spans of keys, a ring of queries, and the barriers that hand them on.

    A tile is a warp-group's 128 keys; a span is the tiles of all warp-groups, which come and go together.
    """

    k_free: Ref  # barriers [n_keys], of the scoring warp-groups
    k_full: Ref  # barriers [n_keys], of a span's copies
    k: Ref  # [n_keys * n_score, parts, 128, D], or with a pitch [n_keys * n_score, 128, pitch]
    q_free: Ref  # barriers [ring], of the scoring warp-groups
    q_full: Ref  # barriers [ring], of a query's two copies
    q: Ref  # [ring, H, D]
    scale: Ref | None  # [n_keys * n_score, 128] float32
    w: Ref  # [ring, H, at least 32] float32


class PerQuery(NamedTuple):
    """Device memory with a row a query.

    Attributes:
        limit: [T] int32; `threshold`: [T] int32, or None if the loop does not filter.
        sort_keys: [T, width] int32, to be written; `masks`: [T, width // 32] int32, if the loop filters.
    """

    limit: Ref
    threshold: Ref | None
    sort_keys: Ref
    masks: Ref | None


def score_queries(shape: Shape, item: Item, smem: Smem, per_query: PerQuery, transforms: tuple) -> None:
    """Sort keys of the item's tile for its queries; the tile and the ring's slots are handed back."""
    refs = [smem.k, smem.q, smem.w, per_query.limit, per_query.sort_keys]
    types = [REF if shape.pitch else plgpu.RefType(transforms), plgpu.RefType(transforms), *[REF] * 3]
    if shape.has_scale:
        refs.append(smem.scale)
        types += [REF]
    if shape.filters:
        refs += [per_query.threshold, per_query.masks]
        types += [REF] * 2
    barriers = [barrier_address(x) for x in (smem.k_free, smem.q_full, smem.q_free)]
    scalars = [*barriers, *vars(item).values()]

    @plgpu.inline_mgpu(arg_types=(*types, *(SPLAT for _ in scalars)))
    def run(_ctx, keys, q, w, limits, o, *rest):
        k_free, q_full, q_free, *fields = (x.registers.item() for x in rest[-len(scalars) :])
        at = Item(**dict(zip(Item.__dataclass_fields__, fields, strict=True)))
        operands = {
            "KEYS": _bytes_on(utils.memref_ptr(keys), arith.muli(at.tile, utils.c(shape.tile_bytes, i32()))),
            "K_FREE": arith.addi(k_free, arith.muli(at.key_slot, utils.c(8, i32()))),
            "SCALES": address_of(rest[0], at.tile, KEYS_PER_WARPGROUP) if shape.has_scale else k_free,
            "Q": utils.memref_ptr(q),
            "W": utils.memref_ptr(w),
            "FULL": q_full,
            "FREE": q_free,
            "COUNT": at.n,
            "BEFORE": at.n_before,
            "CANDIDATE": at.candidate,
            "LIMITS": address_of(limits, at.first, 1),
            "O": address_of(o, at.first, shape.out_columns, at.column),
            # Operands that a loop without filter does not read may be any address.
            "THRESHOLDS": address_of(limits, at.first, 1),
            "MASKS": address_of(limits, at.first, 1),
        }
        if shape.filters:
            thresholds, masks = rest[-len(scalars) - 2 : -len(scalars)]
            operands["THRESHOLDS"] = address_of(thresholds, at.first, 1)
            word = arith.shrui(at.column, utils.c(5, i32()))
            operands["MASKS"] = address_of(masks, at.first, shape.out_columns // 32, word)
        values = (operands[name] for name in OPERANDS)
        utils.inline_ptx(numbered(loop_ptx(shape), OPERANDS), *values, has_side_effects=True, convergent=True)

    run(*refs, *scalars)


def score_queries_reference(shape: Shape, item: Item, smem: Smem, per_query: PerQuery, interpret: Interpret) -> None:
    """`score_queries` in Pallas, for interpret mode, which cannot run PTX."""
    candidate = item.candidate + jnp.arange(KEYS_PER_WARPGROUP, dtype=jnp.int32)

    def one_query(j, _):
        slot, t = (item.n_before + j) % shape.ring, item.first + j
        limit = per_query.limit[t]
        plgpu.barrier_wait(smem.q_full.at[slot])
        w = smem.w[slot, pl.ds(0, shape.H)]
        parts = [smem.k.at[item.tile, part] for part in range(shape.n_parts)]

        def free() -> None:
            plgpu.commit_smem()  # the race detector wants a fence before the copy that overwrites what was read
            plgpu.barrier_arrive(smem.q_free.at[slot])

        x = multiply_and_sum(parts, smem.q.at[slot], w, free, interpret)
        sort_key = sort_key_of(x if smem.scale is None else x * smem.scale[item.tile])
        if shape.keep_first or shape.keep_last:
            sort_key = jnp.where(candidate < shape.keep_first, FORCED, sort_key)
            sort_key = jnp.where(candidate >= limit - shape.keep_last, FORCED, sort_key)
        sort_key = jnp.where(candidate < limit, sort_key, INVISIBLE)
        per_query.sort_keys[t, pl.ds(item.column, KEYS_PER_WARPGROUP)] = sort_key
        if per_query.threshold is not None and per_query.masks is not None:
            passes = (sort_key > per_query.threshold[t]).astype(jnp.int32).reshape(-1, 32)
            words = jnp.sum(passes << jnp.arange(32, dtype=jnp.int32), axis=1)
            per_query.masks[t, pl.ds(item.column // 32, KEYS_PER_WARPGROUP // 32)] = words
        return _

    lax.fori_loop(0, item.n, one_query, None)
    plgpu.commit_smem()
    plgpu.barrier_arrive(smem.k_free.at[item.key_slot])


def _bytes_on(pointer: ir.Value, n: ir.Value) -> ir.Value:
    return utils.getelementptr(pointer, [n], ir.IntegerType.get_signless(8))
