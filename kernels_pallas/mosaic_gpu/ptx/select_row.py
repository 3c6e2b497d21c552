"""Selection from a row of sort keys in shared memory by one warp-group: ranges, counts and ordered output, in PTX.

Pallas has no scatter on Mosaic GPU, and its reductions over a row in shared memory are rolled loops that wait for every
load: beside the scores, selection took 0.18 ms more that way and takes 0.08 unrolled. Rows are whole multiples of 512
sort keys, 16 bytes a thread.

Output is in order: a warp takes a quarter of the row, 32 columns at a time. Ballots give each lane how many chosen
columns lie before its own, so a chosen column knows its slot, and sort keys equal to the threshold are taken from the
left until `room` is used up.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike

from hisa_jax.kernels_pallas.mosaic_gpu.ptx.inline import REF, SCALAR, SPLAT, Row, address_of, i32, scalar
from hisa_jax.kernels_pallas.mosaic_gpu.ptx.select_row_text import COUNT_PTX, RANGE_PTX, SPLIT_PTX, emit_ptx, prefix_ptx
from hisa_jax.kernels_pallas.sort_key import FORCED, INVISIBLE, find_threshold
from hisa_jax.kernels_pallas.types import Interpret, Ref

COLUMNS = 512  # rows are multiples of this
SCRATCH_WORDS = 16


class Output(NamedTuple):
    """Where the chosen of a query go.

    Attributes:
        t: the query.
        positions: [T, k] int32 in device memory, of its row the chosen in ascending order, then -1.
        count: [T] int32; `sort_keys`: [T, k] int32 or None, those of the chosen, then `INVISIBLE`.
        least: [T] int32 or None: no chosen sort key is below, no other above; `INVISIBLE` if fewer than k are chosen.
    """

    t: Array
    positions: Ref
    count: Ref
    sort_keys: Ref | None = None
    least: Ref | None = None

    @property
    def k(self) -> int:
        return self.positions.shape[1]


class Positions(NamedTuple):
    """What columns stand for.

    Attributes:
        ptx: u -> PTX that turns column `column` + 32 * u, for u = 0, 1, 2, 3 in turn, into `id`; it is
            needed where predicate p{u} is set.
        ids: the row that it looks up, as $IDS.
    """

    ptx: Callable[[int], str]
    ids: Row


def block_positions(block_size: int, ids: Row) -> Positions:
    """Tokens of kept blocks, whose ids are listed."""
    shift, each = block_size.bit_length() - 1, min(block_size // 32, 4)

    def position(u: int) -> str:
        # 128 neighbouring columns are of one block where blocks are as large: looked up once for them.
        find = f"""add.u32 id, column, {32 * u}; shr.u32 first, id, {shift}; shl.b32 first, first, 2;
add.u32 first, first, $IDS; ld.shared.u32 first, [first]; shl.b32 first, first, {shift};
and.b32 id, id, {block_size - 1}; add.u32 first, first, id;"""
        return f"{'' if u % each else find} add.u32 id, first, {32 * (u % each)};"

    return Positions(position, ids)


def own_positions(any_row: Row) -> Positions:
    """The columns themselves: nothing is looked up in the row."""
    return Positions(lambda u: f"add.u32 id, column, {32 * u};", any_row)


def listed_positions(ids: Row) -> Positions:
    """What is listed for each column."""
    find = "shl.b32 first, column, 2; add.u32 first, first, $IDS;"
    return Positions(lambda u: f"{'' if u else find} ld.shared.u32 id, [first+{128 * u}];", ids)


def positions_in_memory(ids: Row) -> Positions:
    """What is listed for each column in device memory; of the chosen alone it is read."""
    find = "mul.wide.u32 word, column, 4; add.s64 word, word, $IDS;"
    return Positions(lambda u: f"{find} @p{u} ld.global.nc.b32 id, [word+{128 * u}];", ids)


def choose(sort_keys: Row, n_columns: Array, scratch: Row, positions: Positions, out: Output) -> None:
    """Writes the out.k best of the first n_columns sort keys of a row. `scratch`: SCRATCH_WORDS of the warp-group."""
    threshold = threshold_of(sort_keys, n_columns, out.k, scratch)
    compact(sort_keys, n_columns, threshold, scratch, positions, out)


def choose_reference(sort_keys: Array, positions: Array, out: Output) -> None:
    """`choose` in jnp, for interpret mode, which cannot run PTX: [W] sort keys and what their columns stand for."""
    compact_reference(sort_keys, positions, threshold_reference(sort_keys, out.k), out)


def threshold_reference(sort_keys: Array, k: int) -> Array:
    """`threshold_of` in jnp: [W] sort keys -> their threshold."""
    count = lambda sort_key: jnp.sum((sort_keys >= sort_key).astype(jnp.int32))  # noqa: E731
    lowest = jnp.min(jnp.where(sort_keys > INVISIBLE, sort_keys, FORCED))
    highest = jnp.max(jnp.where(sort_keys == FORCED, INVISIBLE, sort_keys))
    return find_threshold(count, jnp.minimum(lowest, highest), highest, count(jnp.int32(INVISIBLE + 1)), k)


def threshold_of(sort_keys: Row, n_columns: Array, k: int, scratch: Row) -> Array:
    """The threshold of a top-k of the first n_columns sort keys of a row; see `find_threshold`."""

    def over_row(ptx: str, n_results: int) -> Callable[[Array], tuple[Array, ...]]:
        @plgpu.inline_mgpu(arg_types=(REF,) * 2 + (SPLAT,) * 4, return_type=(SCALAR,) * n_results)
        def run(_ctx, sort_keys_ref, scratch_ref, row, scratch_row, n_columns, sort_key):
            results = utils.inline_ptx(
                ptx,
                address_of(sort_keys_ref, row.registers.item(), sort_keys.width),
                n_columns.registers.item(),
                sort_key.registers.item(),
                address_of(scratch_ref, scratch_row.registers.item(), scratch.width),
                result_types=(i32(),) * n_results,
                has_side_effects=True,
                convergent=True,
            )
            return tuple(scalar(result) for result in results)

        return lambda sort_key: run(sort_keys.ref, scratch.ref, sort_keys.row, scratch.row, n_columns, sort_key)

    lowest, highest, n = over_row(RANGE_PTX, 3)(jnp.int32(0))
    count = over_row(COUNT_PTX, 1)
    lowest = jnp.minimum(lowest, highest)
    threshold = find_threshold(lambda sort_key: count(sort_key)[0], lowest, highest, n, k, _bitcast)
    return jnp.maximum(threshold, INVISIBLE + 1)  # where nothing is visible, `lowest` would be reached by all


def compact(
    sort_keys: Row, n_columns: Array, threshold: Array, scratch: Row, positions: Positions, out: Output
) -> None:
    """Writes what is chosen of the first n_columns sort keys of a row, given their threshold."""
    optional = {"SORT_KEYS": out.sort_keys, "LEAST": out.least}
    names = [name for name, ref in optional.items() if ref is not None]
    outputs = [out.positions, out.count, *(optional[name] for name in names)]
    emit, ids, k = emit_ptx(out.k, positions.ptx, names), positions.ids, out.k

    @plgpu.inline_mgpu(arg_types=(REF,) * (3 + len(outputs)) + (SPLAT,) * 6)
    def write(_ctx, sort_keys_ref, scratch_ref, ids_ref, o, count, *rest):
        *others, row, scratch_row, ids_row, n_columns, threshold, t = rest
        row, scratch_row, ids_row, n_columns, threshold, t = (
            x.registers.item() for x in (row, scratch_row, ids_row, n_columns, threshold, t)
        )
        first, shared = (
            address_of(sort_keys_ref, row, sort_keys.width),
            address_of(scratch_ref, scratch_row, scratch.width),
        )
        ptx = functools.partial(utils.inline_ptx, has_side_effects=True, convergent=True)
        ptx(SPLIT_PTX, first, n_columns, threshold, shared)  # a warp's quarter is n_columns bytes: a word a column
        utils.warpgroup_barrier()
        ptx(
            emit,
            first,
            n_columns,
            threshold,
            shared,
            address_of(ids_ref, ids_row, ids.width),
            address_of(o, t, k),
            address_of(count, t, 1),
            *(address_of(x, t, k if name == "SORT_KEYS" else 1) for name, x in zip(names, others, strict=True)),
        )
        utils.warpgroup_barrier()

    rows = sort_keys.row, scratch.row, ids.row
    write(sort_keys.ref, scratch.ref, ids.ref, *outputs, *rows, n_columns, threshold, out.t)


def compact_reference(sort_keys: Array, positions: Array, threshold: Array, out: Output) -> None:
    """`compact` in jnp."""
    is_there = sort_keys > INVISIBLE
    above, at_threshold = is_there & (sort_keys > threshold), is_there & (sort_keys == threshold)
    room = out.k - jnp.sum(above.astype(jnp.int32))
    chosen = above | (at_threshold & (jnp.cumsum(at_threshold.astype(jnp.int32)) <= room))
    columns = jnp.nonzero(chosen, size=out.k, fill_value=0)[0].astype(jnp.int32)
    count = jnp.sum(chosen.astype(jnp.int32))
    filled = jnp.arange(out.k, dtype=jnp.int32) < count
    out.positions[out.t] = jnp.where(filled, positions[columns], -1)
    out.count[out.t] = count
    if out.sort_keys is not None:
        out.sort_keys[out.t] = jnp.where(filled, sort_keys[columns], INVISIBLE)
    if out.least is not None:
        out.least[out.t] = jnp.where(count < out.k, INVISIBLE, threshold)


def write_prefix(out: Output, visible: Array, interpret: Interpret) -> None:
    """Writes the positions and the count of a query that keeps every token it sees."""
    k = out.k
    if interpret:
        slots = jnp.arange(k, dtype=jnp.int32)
        out.positions[out.t] = jnp.where(slots < visible, slots, -1)
        out.count[out.t] = visible
        return

    @plgpu.inline_mgpu(arg_types=(REF,) * 2 + (SPLAT,) * 2)
    def write(_ctx, o, count, t, visible):
        t, visible = t.registers.item(), visible.registers.item()
        targets = address_of(o, t, k), address_of(count, t, 1)
        utils.inline_ptx(prefix_ptx(k), visible, *targets, has_side_effects=True, convergent=True)

    write(out.positions, out.count, out.t, visible)


def _bitcast(x: Array, dtype: DTypeLike) -> Array:
    """`lax.bitcast_convert_type` of a scalar of 32 bits, which Mosaic GPU lowers for vectors alone."""

    @plgpu.inline_mgpu(arg_types=(SPLAT,), return_type=plgpu.ShapeDtypeStruct((), jnp.dtype(dtype), layout=SPLAT))
    def bitcast(_ctx, x):
        return x.bitcast(utils.dtype_to_ir_type(dtype), output_is_signed=utils.is_signed(dtype))

    return bitcast(x)
