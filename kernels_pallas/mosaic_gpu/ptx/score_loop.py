"""Scoring with the keys in registers: a warp-group's 128 keys stay, queries stream past, all in one loop of PTX.

As wgmma's A operand a tile of keys is 32 registers a thread (64 in two parts), loaded once for all queries of an item.
The tensor core then reads only the query's heads from shared memory, 64 bytes a cycle instead of all 128 there are, and
the sums over the first half of the keys are taken while the product of the second is in flight. Pallas can say neither:
it loads operands anew for every product and waits for all of them.

Which key a row of the tensor core's tile holds is free when registers are loaded: rows are chosen so that the sum of
key 32 * warp + lane ends in that very lane, and a warp stores 128 bytes in order.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith

from hisa_jax.kernels_pallas.mosaic_gpu.barriers import barrier_address
from hisa_jax.kernels_pallas.mosaic_gpu.ptx.inline import REF, SPLAT, address_of, i32, numbered
from hisa_jax.kernels_pallas.mosaic_gpu.ptx.lanes import head_sum, multiply
from hisa_jax.kernels_pallas.mosaic_gpu.ptx.score_groups_text import by_query_of
from hisa_jax.kernels_pallas.mosaic_gpu.ptx.score_loop_text import OPERANDS, loop_ptx
from hisa_jax.kernels_pallas.mosaic_gpu.ptx.score_shape import KEYS_PER_WARPGROUP, Shape
from hisa_jax.kernels_pallas.sort_key import FORCED, INVISIBLE, score_of, sort_key_of
from hisa_jax.kernels_pallas.types import Interpret, Ref

_IN_DEVICE_MEMORY = ("LIMITS", "THRESHOLDS", "O", "MASKS", "MAXIMA")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Item:
    """What a warp-group scores: a tile of keys for a run of queries. Int32 scalars, of JAX or of the lowered kernel.

    Where queries come in groups, groups are counted.

    Attributes:
        group: of the warp-groups that score.
        key_slot: which barrier of `k_free` the tile goes back by; `tile`: which of the tiles in shared memory.
        first: the first query; `n`: how many, at least 1; `n_before`: how many slots this warp-group has met before,
            from which the ring's slot and phase follow.
        column: of the result, where the tile's first key goes; `candidate`: what limits and forced candidates call it.
    """

    group: Any
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
    pin: Ref  # [n_score, 128, Shape.pin_words] float32, never read
    k: Ref  # [n_keys * n_score, parts, 128, D], or with a pitch [n_keys * n_score, 128, pitch]
    q_free: Ref  # barriers [ring], of the scoring warp-groups
    q_full: Ref  # barriers [ring], of each query's two copies
    q: Ref  # [ring, Shape.columns, D]
    scale: Ref | None  # [n_keys * n_score, 128] float32
    w: Ref  # [ring, Shape.w_words] float32


class PerQuery(NamedTuple):
    """Device memory with a row a query.

    Attributes:
        limit: [T] int32; `threshold`: [T] int32, or None if the loop does not filter. Of groups they are in the slots.
        sort_keys: [T, width] int32, to be written, unless groups are filtered.
        masks: [T, width // 32] int32, if the loop filters.
        maxima: [T, width // shape.maxima_of] int32, if they are wanted.
    """

    limit: Ref = None
    threshold: Ref = None
    sort_keys: Ref = None
    masks: Ref = None
    maxima: Ref = None


def score_queries(shape: Shape, item: Item, smem: Smem, per_query: PerQuery, transforms: tuple) -> None:
    """Sort keys of the item's tile for its queries; the tile and the ring's slots are handed back."""
    tile_types = REF if shape.pitch else plgpu.RefType(transforms), plgpu.RefType(transforms)
    words = {"SCALES": smem.scale, "LIMITS": per_query.limit, "THRESHOLDS": per_query.threshold}
    words |= {"O": per_query.sort_keys, "MASKS": per_query.masks, "MAXIMA": per_query.maxima}
    names = [name for name, ref in words.items() if ref is not None]
    refs = [smem.k, smem.q, smem.w, smem.pin, *(words[name] for name in names)]
    barriers = [barrier_address(x) for x in (smem.k_free, smem.q_full, smem.q_free)]
    scalars = [*barriers, *vars(item).values()]

    @plgpu.inline_mgpu(arg_types=(*tile_types, REF, REF, *(REF for _ in names), *(SPLAT for _ in scalars)))
    def run(_ctx, keys, q, w, pin, *rest):
        k_free, q_full, q_free, *fields = (x.registers.item() for x in rest[-len(scalars) :])
        at = Item(**dict(zip(Item.__dataclass_fields__, fields, strict=True)))
        first = arith.muli(at.first, utils.c(shape.group, i32()))
        row = lambda ref, n: address_of(  # noqa: E731
            ref, first, shape.out_columns // n, arith.divui(at.column, utils.c(n, i32()))
        )
        address = {
            "SCALES": lambda ref: address_of(ref, at.tile, KEYS_PER_WARPGROUP),
            "LIMITS": lambda ref: address_of(ref, first, 1),
            "THRESHOLDS": lambda ref: address_of(ref, first, 1),
            "O": lambda ref: address_of(ref, first, shape.out_columns, at.column),
            "MASKS": lambda ref: row(ref, 32),
            "MAXIMA": lambda ref: row(ref, shape.maxima_of),
        }
        given = {name: address[name](ref) for name, ref in zip(names, rest, strict=False)}
        operands = {
            "KEYS": _bytes_on(utils.memref_ptr(keys), arith.muli(at.tile, utils.c(shape.tile_bytes, i32()))),
            "K_FREE": arith.addi(k_free, arith.muli(at.key_slot, utils.c(8, i32()))),
            "SCALES": k_free,
            "Q": utils.memref_ptr(q),
            "W": utils.memref_ptr(w),
            "FULL": q_full,
            "FREE": q_free,
            "PIN": address_of(pin, at.group, KEYS_PER_WARPGROUP * shape.pin_words),
            "COUNT": at.n,
            "BEFORE": at.n_before,
            "CANDIDATE": at.candidate,
            # What this loop does not read may be any address.
            **dict.fromkeys(_IN_DEVICE_MEMORY, next(x for n, x in given.items() if n != "SCALES")),
            **given,
        }
        values = (operands[name] for name in OPERANDS)
        utils.inline_ptx(numbered(loop_ptx(shape), OPERANDS), *values, has_side_effects=True, convergent=True)

    run(*refs, *scalars)


def score_queries_reference(shape: Shape, item: Item, smem: Smem, per_query: PerQuery, interpret: Interpret) -> None:
    """`score_queries` in Pallas, for interpret mode, which cannot run PTX."""
    candidate = item.candidate + jnp.arange(KEYS_PER_WARPGROUP, dtype=jnp.int32)

    def one_slot(j, _):
        slot = (item.n_before + j) % shape.ring
        plgpu.barrier_wait(smem.q_full.at[slot])
        w = smem.w[slot]
        parts = [smem.k.at[item.tile, part] for part in range(shape.n_parts)]

        def free() -> None:
            plgpu.commit_smem()  # the race detector wants a fence before the copy that overwrites what was read
            plgpu.barrier_arrive(smem.q_free.at[slot])

        products = multiply(parts, smem.q.at[slot])
        if shape.rows is None:
            each = [slice(i * shape.H, (i + 1) * shape.H) for i in range(shape.together)]
            x = jnp.stack([head_sum(products[:, heads], w[heads], interpret) for heads in each])
        else:
            x = _sums_of_group(shape, products, w[: shape.H])
        free()
        x = x if smem.scale is None else x * smem.scale[item.tile]
        store = functools.partial(_store_reference, shape, item, per_query, candidate=candidate, w=w)
        for i in range(shape.queries):
            t = item.first * shape.group + j * shape.queries + i
            is_there = i == 0 or shape.together == 1 or j * shape.together + i < item.n
            pl.when(is_there)(functools.partial(store, t, i, x[i]))
        return _

    lax.fori_loop(0, (item.n + shape.together - 1) // shape.together, one_slot, None)
    plgpu.commit_smem()
    plgpu.barrier_arrive(smem.k_free.at[item.key_slot])


def _sums_of_group(shape: Shape, products: Array, w: Array) -> Array:
    """[128, H], [H] -> [group, 128], the sums of each query's rows."""
    by_query = by_query_of(shape, products), by_query_of(shape, w[None])
    row = jnp.arange(shape.rows, dtype=jnp.int32)
    terms = jnp.where(row < shape.n_linear, by_query[0], jnp.maximum(by_query[0], 0)) * by_query[1]
    return jnp.sum(jnp.where(row < shape.n_rows, terms, 0), axis=2).T


def _store_reference(
    shape: Shape, item: Item, per_query: PerQuery, t: Array, i: int, x: Array, candidate: Array, w: Array
) -> None:
    """Sort keys [128] of query t, or which of them pass; it is query i of its slot, whose weights are `w`."""
    sort_key = sort_key_of(x)
    is_alone = shape.rows is None
    limit = per_query.limit[t] if is_alone else lax.bitcast_convert_type(w[3 * shape.H // 2 + i], jnp.int32)
    if shape.keep_first or shape.keep_last:
        sort_key = jnp.where(candidate < shape.keep_first, FORCED, sort_key)
        sort_key = jnp.where(candidate >= limit - shape.keep_last, FORCED, sort_key)
    sort_key = jnp.where(candidate < limit, sort_key, INVISIBLE)
    if per_query.sort_keys is not None and not shape.filters:
        per_query.sort_keys[t, pl.ds(item.column, KEYS_PER_WARPGROUP)] = sort_key
    if per_query.masks is not None:
        if is_alone:
            passes = sort_key > per_query.threshold[t]
        else:
            # As scores: no threshold above infinity has a sort key.
            passes = (score_of(sort_key) >= w[shape.H + i]) & (sort_key > INVISIBLE) | (sort_key == FORCED)
        bits = passes.astype(jnp.int32).reshape(-1, 32) << jnp.arange(32, dtype=jnp.int32)
        per_query.masks[t, pl.ds(item.column // 32, KEYS_PER_WARPGROUP // 32)] = jnp.sum(bits, axis=1)
        if per_query.sort_keys is not None:
            order = jnp.argsort(~passes.reshape(-1, 32), axis=1, stable=True)
            side_by_side = jnp.take_along_axis(sort_key.reshape(-1, 32), order, axis=1).reshape(-1)
            per_query.sort_keys[t, pl.ds(item.column, KEYS_PER_WARPGROUP)] = side_by_side
    if per_query.maxima is not None:
        n = shape.maxima_of
        there = pl.ds(item.column // n, KEYS_PER_WARPGROUP // n)
        per_query.maxima[t, there] = jnp.max(sort_key.reshape(-1, n), axis=1)


def _bytes_on(pointer: ir.Value, n: ir.Value) -> ir.Value:
    return utils.getelementptr(pointer, [n], ir.IntegerType.get_signless(8))
