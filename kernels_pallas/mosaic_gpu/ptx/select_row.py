"""Selection from a row of sort keys in shared memory by one warp-group: ranges, counts and ordered output, in PTX.

Pallas has no scatter on Mosaic GPU, and its reductions over a row in shared memory are rolled loops that wait for every
load: beside the scores, selection took 0.18 ms more that way and takes 0.08 unrolled. Rows are whole multiples of 512
sort keys, 16 bytes a thread.

Output is in order: a warp takes a quarter of the row, 32 columns at a time. Ballots give each lane how many chosen
columns lie before its own, so a chosen column knows its slot, and sort keys equal to the threshold are taken from the
left until `room` is used up.
"""

import functools
import re
from collections.abc import Callable

import jax.numpy as jnp
from jax import Array
from jax.experimental.mosaic.gpu import FragmentedArray, utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike
from jaxlib.mlir import ir

from hisa_jax.kernels_pallas.mosaic_gpu.ptx.lanes import address_of
from hisa_jax.kernels_pallas.sort_key import FORCED, INVISIBLE, find_threshold
from hisa_jax.kernels_pallas.types import Interpret, Ref

COLUMNS = 512  # rows are multiples of this
SCRATCH_WORDS = 16
_SPLAT = plgpu.Layout.WG_SPLAT
_SCALAR = plgpu.ShapeDtypeStruct((), jnp.dtype(jnp.int32), layout=_SPLAT)
_UNROLL = 4
_WARP = "mov.u32 warp, %tid.x; shr.u32 warp, warp, 5; and.b32 warp, warp, 3;"


def _over_row(registers: str, start: str, step: str) -> str:
    """PTX over a row at $ROW of $N sort keys: `step` sees four of them in v0 .. v3."""
    load = "".join(f"ld.shared.v4.b32 {{v0, v1, v2, v3}}, [at+{2048 * u}];\n{step}\n" for u in range(_UNROLL))
    one = load[: load.index("ld.shared", 1)]
    return f""".reg .pred p, q; .reg .b32 at, end, last, v<4>, {registers};
mov.u32 at, %tid.x; and.b32 at, at, 127; shl.b32 at, at, 4; add.u32 at, at, $ROW;
shl.b32 end, $N, 2; add.u32 end, end, $ROW; sub.u32 last, end, {2048 * (_UNROLL - 1)};
{start}
many: setp.ge.s32 p, at, last; @p bra few;
{load}add.u32 at, at, {2048 * _UNROLL}; bra many;
few: setp.ge.s32 p, at, end; @p bra done;
{one}add.u32 at, at, 2048; bra few;
done:
"""


def _across_warps(op: str, value: str, place: int) -> str:
    """PTX: combines `value` over the warp and leaves it at word `place` + warp of $SCRATCH."""
    return f"""redux.sync.{op}.s32 {value}, {value}, -1;
{_WARP}
shl.b32 warp, warp, 2; add.u32 warp, warp, $SCRATCH; st.shared.b32 [warp+{4 * place}], {value};
"""


_BARRIER = "mov.u32 id, %tid.x; shr.u32 id, id, 7; add.u32 id, id, 1; bar.sync id, 128;\n"


def _total(op: str, place: int, into: str) -> str:
    combine = "\n".join(f"{op}.s32 v0, v0, v{i};" for i in (1, 2, 3))
    return f"ld.shared.v4.b32 {{v0, v1, v2, v3}}, [$SCRATCH+{4 * place}];\n{combine}\nmov.b32 {into}, v0;\n"


def _count_ptx() -> str:
    step = "\n".join(f"setp.ge.s32 p, v{i}, $THRESHOLD; @p add.s32 n{i}, n{i}, 1;" for i in range(4))
    start = "mov.b32 n0, 0; mov.b32 n1, 0; mov.b32 n2, 0; mov.b32 n3, 0;"
    gather = "add.s32 n0, n0, n1; add.s32 n2, n2, n3; add.s32 n0, n0, n2;\n"
    return _scope(
        _over_row("n<4>, warp, id", start, step)
        + gather
        + _across_warps("add", "n0", 0)
        + _BARRIER
        + _total("add", 0, "$PASSED")
        + _BARRIER,
        "PASSED",
        "ROW",
        "N",
        "THRESHOLD",
        "SCRATCH",
    )


def _range_ptx() -> str:
    """Least visible sort key, greatest that is not forced (an infinite end reduces the search to halving), how many."""
    step = "\n".join(
        f"setp.ne.s32 p, v{i}, {FORCED}; @p max.s32 high, high, v{i}; "
        f"setp.ne.s32 p, v{i}, {INVISIBLE}; @p add.s32 n, n, 1; @p min.s32 low, low, v{i};"
        for i in range(4)
    )
    start = f"mov.b32 low, {FORCED}; mov.b32 high, {INVISIBLE}; mov.b32 n, 0;"
    return _scope(
        _over_row("low, high, n, warp, id", start, step)
        + _across_warps("min", "low", 0)
        + _across_warps("max", "high", 4)
        + _across_warps("add", "n", 8)
        + _BARRIER
        + _total("min", 0, "$LOW")
        + _total("max", 4, "$HIGH")
        + _total("add", 8, "$SEEN")
        + _BARRIER,
        "LOW",
        "HIGH",
        "SEEN",
        "ROW",
        "N",
        "UNUSED",
        "SCRATCH",
    )


def _quarter(step: str) -> str:
    """PTX over this warp's quarter of a row at $ROW, $N bytes of it: `step` sees 128 columns, 32 at a time, from `at`.

    `column` is the lane's first of them. There may be several in a scope: `{again}` and `{done}` are theirs alone.
    """
    return f"""{_WARP}
mul.lo.u32 at, warp, $N; add.u32 end, at, $N; shr.u32 column, at, 2; add.u32 column, column, lane;
add.u32 end, end, $ROW; add.u32 at, at, $ROW; shl.b32 t, lane, 2; add.u32 at, at, t;
{{again}}: setp.ge.u32 p, at, end; @p bra {{done}};
{step}add.u32 at, at, 512; add.u32 column, column, 128; bra {{again}};
{{done}}:"""


def _count_quarter(compare: str, place: int, name: str) -> str:
    """PTX: how many sort keys of each warp's quarter pass the threshold, to words `place` + warp of the scratch."""
    step = "".join(
        f"ld.shared.s32 v0, [at+{128 * u}]; setp.{compare}.s32 p, v0, $THRESHOLD; @p add.u32 n, n, 1;\n"
        for u in range(4)
    )
    loop = _quarter(step).format(again=f"count_{name}", done=f"counted_{name}")
    return f"""mov.u32 n, 0; {loop}
{_across_warps("add", "n", place)}"""


def _split_ptx() -> str:
    """How many sort keys of each warp's quarter reach the threshold: words 0 to 3 of the scratch."""
    return _scope(
        f""".reg .pred p; .reg .b32 lane, warp, at, end, column, v0, t, n;
mov.u32 lane, %laneid; {_count_quarter("ge", 0, "reached")}""",
        "ROW",
        "N",
        "THRESHOLD",
        "SCRATCH",
    )


def _emit(k: int, position: Callable[[int], str], with_sort_keys: bool) -> str:
    """Writes what is chosen of a warp's quarter, $N bytes, in order.

    Where no more than k sort keys reach the threshold, all that reach it are chosen: a third of the instructions of the
    general form, which takes sort keys at the threshold from the left until `room` is used up.

    Args:
        position: u -> PTX that turns column `column` + 32 * u, for u = 0, 1, 2, 3 in turn, into `id`.
    """

    def store(u: int, register: str) -> str:
        """The chosen of 32 columns, bits `b` and predicate p, go where `slot` is."""
        sort_key = f"add.s64 word, word, sort_keys; @p st.global.b32 [word], {register};" if with_sort_keys else ""
        return f"""and.b32 t, b, below; popc.b32 t, t; add.u32 t, t, slot; popc.b32 b, b; add.u32 slot, slot, b;
{position(u)} mad.wide.u32 word, t, 4, $O; @p st.global.b32 [word], id; {sort_key}
"""

    quick = "".join(f"ld.shared.s32 v{u}, [at+{128 * u}];\n" for u in range(4)) + "".join(
        f"setp.ge.s32 p, v{u}, $THRESHOLD; vote.sync.ballot.b32 b, p, -1;\n{store(u, f'v{u}')}" for u in range(4)
    )
    general = "".join(
        f"""ld.shared.s32 v0, [at+{128 * u}]; setp.gt.s32 p, v0, $THRESHOLD; setp.eq.s32 q, v0, $THRESHOLD;
vote.sync.ballot.b32 b, q, -1; and.b32 t, b, below; popc.b32 t, t; add.u32 t, t, tie; popc.b32 b, b; add.u32 tie, tie,
b; setp.lt.s32 r, t, room; and.pred q, q, r; or.pred p, p, q; vote.sync.ballot.b32 b, p, -1;
{store(u, "v0")}"""
        for u in range(4)
    )
    operands = ("ROW", "N", "THRESHOLD", "SCRATCH", "IDS", "O", "COUNT") + (("SORT_KEYS",) if with_sort_keys else ())
    sort_key_offset = "sub.s64 sort_keys, $SORT_KEYS, $O;" if with_sort_keys else ""
    sort_key_fill = f"add.s64 word, word, sort_keys; st.global.b32 [word], {INVISIBLE};" if with_sort_keys else ""
    return _scope(
        f""".reg .pred p, q, r; .reg .b64 word, sort_keys;
.reg .b32 lane, warp, below, at, column, end, v<4>, t, id, first, b, n, slot, tie, room, total, s<8>;
mov.u32 lane, %laneid; mov.u32 below, %lanemask_lt; {_WARP} {sort_key_offset}
ld.shared.v4.u32 {{s0, s1, s2, s3}}, [$SCRATCH];
add.u32 total, s0, s1; add.u32 total, total, s2; add.u32 total, total, s3;
{_before("slot", "s0", "s1", "s2")}
setp.gt.u32 p, total, {k}; @p bra general;
{_quarter(quick).format(again="quick", done="quick_done")}
bra fill;
general: {_count_quarter("gt", 4, "above")}
{_BARRIER}
ld.shared.v4.u32 {{s4, s5, s6, s7}}, [$SCRATCH+16];
add.u32 total, s4, s5; add.u32 total, total, s6; add.u32 total, total, s7; sub.s32 room, {k}, total; mov.u32 total, {k};
{_WARP} {_before("n", "s4", "s5", "s6")}
sub.u32 tie, slot, n; min.s32 slot, tie, room; add.u32 slot, slot, n;
{_quarter(general).format(again="again", done="done")}
fill: {_WARP} shl.b32 t, warp, 5; add.u32 t, t, lane; setp.ne.u32 p, t, 0; @!p st.global.u32 [$COUNT], total;
add.u32 t, t, total;
more: setp.ge.u32 p, t, {k}; @p bra out;
mad.wide.u32 word, t, 4, $O; st.global.b32 [word], -1; {sort_key_fill} add.u32 t, t, 128; bra more;
out:
""",
        *operands,
    )


def _before(into: str, *counts: str) -> str:
    """PTX: the sum of the counts of the warps before this one."""
    lines = [f"setp.gt.u32 p, warp, {i}; @p add.u32 {into}, {into}, {count};" for i, count in enumerate(counts)]
    return " ".join([f"mov.u32 {into}, 0;", *lines])


def _prefix(k: int) -> str:
    return _scope(
        f""".reg .pred p; .reg .b64 a; .reg .b32 v, x;
mov.u32 v, %tid.x; and.b32 v, v, 127; setp.ne.u32 p, v, 0; @!p st.global.u32 [$COUNT], $VISIBLE;
again: setp.ge.u32 p, v, {k}; @p bra out;
setp.lt.s32 p, v, $VISIBLE; selp.s32 x, v, -1, p;
mul.wide.u32 a, v, 4; add.u64 a, a, $O; st.global.u32 [a], x; add.u32 v, v, 128; bra again;
out:
""",
        "VISIBLE",
        "O",
        "COUNT",
    )


def _scope(body: str, *operands: str) -> str:
    """A PTX scope whose $NAMEs are the operands, in this order."""
    return "{\n" + re.sub(r"\$([A-Z_]+)", lambda name: f"${operands.index(name[1])}", body) + "}"


def block_positions(block_size: int) -> Callable[[int], str]:
    """For `compact`: the token of a kept block; the ids are block ids."""
    shift, each = block_size.bit_length() - 1, min(block_size // 32, 4)

    def position(u: int) -> str:
        find = f"""add.u32 id, column, {32 * u}; shr.u32 first, id, {shift}; shl.b32 first, first, 2;
add.u32 first, first, $IDS; ld.shared.u32 first, [first]; shl.b32 first, first, {shift};
and.b32 id, id, {block_size - 1}; add.u32 first, first, id;"""
        return f"{'' if u % each else find} add.u32 id, first, {32 * (u % each)};"

    return position


def own_positions() -> Callable[[int], str]:
    """For `compact`: the column itself."""
    return lambda u: f"add.u32 id, column, {32 * u};"


def listed_positions() -> Callable[[int], str]:
    """For `compact`: what the ids list for the column."""
    find = "shl.b32 first, column, 2; add.u32 first, first, $IDS;"
    return lambda u: f"{'' if u else find} ld.shared.u32 id, [first+{128 * u}];"


def threshold_reference(sort_keys: Array, k: int) -> Array:
    """`threshold_of` in jnp, for interpret mode: [W] sort keys -> their cut."""
    count = lambda sort_key: jnp.sum((sort_keys >= sort_key).astype(jnp.int32))  # noqa: E731
    lowest, highest = jnp.min(jnp.where(sort_keys > INVISIBLE, sort_keys, FORCED)), _highest(sort_keys)
    return find_threshold(count, jnp.minimum(lowest, highest), highest, count(jnp.int32(INVISIBLE + 1)), k)


def _highest(sort_keys: Array) -> Array:
    return jnp.max(jnp.where(sort_keys == FORCED, INVISIBLE, sort_keys))


def threshold_of(
    sort_keys_smem: Ref, row: Array, width: int, n_columns: Array, k: int, scratch_smem: Ref, scratch_row: Array
) -> Array:
    """The threshold of a top-k of the first n_columns sort keys of a row; see `find_threshold`.

    Args:
        sort_keys_smem: rows of `width` sort keys; `scratch_smem`: [*, SCRATCH_WORDS] int32, row `scratch_row` ours.
    """

    def over_row(ptx: str, n_results: int) -> Callable[[Array], tuple[Array, ...]]:
        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * 2 + (_SPLAT,) * 4, return_type=(_SCALAR,) * n_results)
        def run(_ctx, sort_keys, scratch, row, scratch_row, n_columns, sort_key):
            results = utils.inline_ptx(
                ptx,
                address_of(sort_keys, row.registers.item(), width),
                n_columns.registers.item(),
                sort_key.registers.item(),
                address_of(scratch, scratch_row.registers.item(), SCRATCH_WORDS),
                result_types=(_i32(),) * n_results,
                has_side_effects=True,
                convergent=True,
            )
            return tuple(FragmentedArray.splat(result, (), is_signed=True) for result in results)

        return lambda sort_key: run(sort_keys_smem, scratch_smem, row, scratch_row, n_columns, sort_key)

    lowest, highest, n = over_row(_RANGE, 3)(jnp.int32(0))
    count = over_row(_COUNT, 1)
    return find_threshold(lambda sort_key: count(sort_key)[0], jnp.minimum(lowest, highest), highest, n, k, _bitcast)


def compact(
    sort_keys_smem: Ref,
    row: Array,
    width: int,
    n_columns: Array,
    threshold: Array,
    k: int,
    scratch_smem: Ref,
    scratch_row: Array,
    ids_smem: Ref,
    ids_row: Array,
    ids_width: int,
    position: Callable[[int], str],
    t: Array,
    o_gmem: Ref,
    count_gmem: Ref,
    o_sort_keys_gmem: Ref = None,
) -> None:
    """Writes the chosen of the first n_columns sort keys of a row to o[t] and count[t], and their sort keys if asked.

    Args:
        ids_smem: what `position` looks up, in row `ids_row` of `ids_width` words.
        position: one of `block_positions`, `own_positions`, `listed_positions`.
    """
    outputs = [o_gmem, count_gmem] + ([] if o_sort_keys_gmem is None else [o_sort_keys_gmem])
    emit = _emit(k, position, o_sort_keys_gmem is not None)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * (3 + len(outputs)) + (_SPLAT,) * 6)
    def write(_ctx, sort_keys, scratch, ids, o, count, *rest):
        *o_sort_keys, row, scratch_row, ids_row, n_columns, threshold, t = rest
        row, scratch_row, ids_row, n_columns, threshold, t = (
            x.registers.item() for x in (row, scratch_row, ids_row, n_columns, threshold, t)
        )
        first, shared = address_of(sort_keys, row, width), address_of(scratch, scratch_row, SCRATCH_WORDS)
        ptx = functools.partial(utils.inline_ptx, has_side_effects=True, convergent=True)
        ptx(_SPLIT, first, n_columns, threshold, shared)  # a warp takes a quarter: as many bytes as there are columns
        utils.warpgroup_barrier()
        ptx(
            emit,
            first,
            n_columns,
            threshold,
            shared,
            address_of(ids, ids_row, ids_width),
            address_of(o, t, k),
            address_of(count, t, 1),
            *(address_of(x, t, k) for x in o_sort_keys),
        )
        utils.warpgroup_barrier()

    write(sort_keys_smem, scratch_smem, ids_smem, *outputs, row, scratch_row, ids_row, n_columns, threshold, t)


def compact_reference(
    sort_keys: Array,
    positions: Array,
    threshold: Array,
    k: int,
    t: Array,
    o_gmem: Ref,
    count_gmem: Ref,
    o_sort_keys_gmem: Ref = None,
) -> None:
    """`compact` in jnp, for interpret mode, which cannot run PTX: [W] sort keys and what their columns stand for."""
    above, at_threshold = (
        (sort_keys > threshold) & (sort_keys > INVISIBLE),
        (sort_keys == threshold) & (sort_keys > INVISIBLE),
    )
    room = k - jnp.sum(above.astype(jnp.int32))
    chosen = above | (at_threshold & (jnp.cumsum(at_threshold.astype(jnp.int32)) <= room))
    columns = jnp.nonzero(chosen, size=k, fill_value=0)[0].astype(jnp.int32)
    count = jnp.sum(chosen.astype(jnp.int32))
    filled = jnp.arange(k, dtype=jnp.int32) < count
    o_gmem[t] = jnp.where(filled, positions[columns], -1)
    count_gmem[t] = count
    if o_sort_keys_gmem is not None:
        o_sort_keys_gmem[t] = jnp.where(filled, sort_keys[columns], INVISIBLE)


def write_prefix(o_gmem: Ref, count_gmem: Ref, t: Array, visible: Array, interpret: Interpret) -> None:
    """Writes o[t] and count[t] of a query that keeps every token it sees."""
    k = o_gmem.shape[1]
    if interpret:
        slots = jnp.arange(k, dtype=jnp.int32)
        o_gmem[t] = jnp.where(slots < visible, slots, -1)
        count_gmem[t] = visible
        return

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * 2 + (_SPLAT,) * 2)
    def write(_ctx, o, count, t, visible):
        t, visible = t.registers.item(), visible.registers.item()
        utils.inline_ptx(
            _prefix(k), visible, address_of(o, t, k), address_of(count, t, 1), has_side_effects=True, convergent=True
        )

    write(o_gmem, count_gmem, t, visible)


def _bitcast(x: Array, dtype: DTypeLike) -> Array:
    """`lax.bitcast_convert_type` of a scalar of 32 bits, which Mosaic GPU lowers for vectors alone."""

    @plgpu.inline_mgpu(arg_types=(_SPLAT,), return_type=plgpu.ShapeDtypeStruct((), jnp.dtype(dtype), layout=_SPLAT))
    def bitcast(_ctx, x):
        return x.bitcast(utils.dtype_to_ir_type(dtype), output_is_signed=utils.is_signed(dtype))

    return bitcast(x)


def _i32() -> ir.Type:
    return ir.IntegerType.get_signless(32)


_RANGE, _COUNT, _SPLIT = _range_ptx(), _count_ptx(), _split_ptx()
