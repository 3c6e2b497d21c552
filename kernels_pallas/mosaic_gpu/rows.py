"""Selection from a row of images in shared memory by one warp-group: ranges, counts and ordered output, in PTX.

Pallas has no scatter on Mosaic GPU, and its reductions over a row in shared memory are rolled loops that wait for every
load: beside the scores, selection took 0.18 ms more that way and takes 0.08 unrolled. Rows are whole multiples of 512
images, 16 bytes a thread.

Output is in order: a warp takes a quarter of the row, 32 columns at a time. Ballots give each lane how many chosen
columns lie before its own, so a chosen column knows its slot, and images equal to the cut are taken from the left
until `room` is used up.
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

from kernels_pallas.image import FORCED, INVISIBLE, find_cut
from kernels_pallas.mosaic_gpu.lanes import address_of
from kernels_pallas.types import Interpret, Ref

COLUMNS = 512  # rows are multiples of this
SCRATCH_WORDS = 16
_SPLAT = plgpu.Layout.WG_SPLAT
_SCALAR = plgpu.ShapeDtypeStruct((), jnp.dtype(jnp.int32), layout=_SPLAT)
_UNROLL = 4
_WARP = "mov.u32 warp, %tid.x; shr.u32 warp, warp, 5; and.b32 warp, warp, 3;"


def _over_row(registers: str, start: str, step: str) -> str:
    """PTX over a row at $ROW of $N images: `step` sees four of them in v0 .. v3."""
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
    step = "\n".join(f"setp.ge.s32 p, v{i}, $CUT; @p add.s32 n{i}, n{i}, 1;" for i in range(4))
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
        "CUT",
        "SCRATCH",
    )


def _range_ptx() -> str:
    """Least visible image, greatest but for forced ones (an infinite end reduces the search to halving), how many."""
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
    """PTX: how many images of each warp's quarter compare so with the cut, to words `place` + warp of the scratch."""
    step = "".join(
        f"ld.shared.s32 v0, [at+{128 * u}]; setp.{compare}.s32 p, v0, $CUT; @p add.u32 n, n, 1;\n" for u in range(4)
    )
    loop = _quarter(step).format(again=f"count_{name}", done=f"counted_{name}")
    return f"""mov.u32 n, 0; {loop}
{_across_warps("add", "n", place)}"""


def _split_ptx() -> str:
    """How many images of each warp's quarter reach the cut: words 0 to 3 of the scratch."""
    return _scope(
        f""".reg .pred p; .reg .b32 lane, warp, at, end, column, v0, t, n;
mov.u32 lane, %laneid; {_count_quarter("ge", 0, "reached")}""",
        "ROW",
        "N",
        "CUT",
        "SCRATCH",
    )


def _emit(k: int, position: Callable[[int], str], with_images: bool) -> str:
    """Writes what is chosen of a warp's quarter, $N bytes, in order.

    Where no more than k images reach the cut, all that reach it are chosen: a third of the instructions of the general
    form, which takes images at the cut from the left until `room` is used up.

    Args:
        position: u -> PTX that turns column `column` + 32 * u, for u = 0, 1, 2, 3 in turn, into `id`.
    """

    def store(u: int, register: str) -> str:
        """The chosen of 32 columns, bits `b` and predicate p, go where `slot` is."""
        image = f"add.s64 word, word, images; @p st.global.b32 [word], {register};" if with_images else ""
        return f"""and.b32 t, b, below; popc.b32 t, t; add.u32 t, t, slot; popc.b32 b, b; add.u32 slot, slot, b;
{position(u)} mad.wide.u32 word, t, 4, $O; @p st.global.b32 [word], id; {image}
"""

    quick = "".join(f"ld.shared.s32 v{u}, [at+{128 * u}];\n" for u in range(4)) + "".join(
        f"setp.ge.s32 p, v{u}, $CUT; vote.sync.ballot.b32 b, p, -1;\n{store(u, f'v{u}')}" for u in range(4)
    )
    general = "".join(
        f"""ld.shared.s32 v0, [at+{128 * u}]; setp.gt.s32 p, v0, $CUT; setp.eq.s32 q, v0, $CUT;
vote.sync.ballot.b32 b, q, -1; and.b32 t, b, below; popc.b32 t, t; add.u32 t, t, tie; popc.b32 b, b; add.u32 tie, tie,
b; setp.lt.s32 r, t, room; and.pred q, q, r; or.pred p, p, q; vote.sync.ballot.b32 b, p, -1;
{store(u, "v0")}"""
        for u in range(4)
    )
    operands = ("ROW", "N", "CUT", "SCRATCH", "IDS", "O", "COUNT") + (("IMAGES",) if with_images else ())
    image_fill = f"add.s64 word, word, images; st.global.b32 [word], {INVISIBLE};" if with_images else ""
    return _scope(
        f""".reg .pred p, q, r; .reg .b64 word, images;
.reg .b32 lane, warp, below, at, column, end, v<4>, t, id, first, b, n, slot, tie, room, total, s<8>;
mov.u32 lane, %laneid; mov.u32 below, %lanemask_lt; {_WARP} {"sub.s64 images, $IMAGES, $O;" if with_images else ""}
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
mad.wide.u32 word, t, 4, $O; st.global.b32 [word], -1; {image_fill} add.u32 t, t, 128; bra more;
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
    return "{\n" + re.sub(r"\$([A-Z]+)", lambda name: f"${operands.index(name[1])}", body) + "}"


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


def cut_reference(images: Array, k: int) -> Array:
    """`cut_of` in jnp, for interpret mode: [W] images -> their cut."""
    count = lambda image: jnp.sum((images >= image).astype(jnp.int32))  # noqa: E731
    lowest, highest = jnp.min(jnp.where(images > INVISIBLE, images, FORCED)), _highest(images)
    return find_cut(count, jnp.minimum(lowest, highest), highest, count(jnp.int32(INVISIBLE + 1)), k)


def _highest(images: Array) -> Array:
    return jnp.max(jnp.where(images == FORCED, INVISIBLE, images))


def cut_of(
    images_smem: Ref, row: Array, width: int, n_columns: Array, k: int, scratch_smem: Ref, scratch_row: Array
) -> Array:
    """The cut of a top-k of the first n_columns images of a row; see `find_cut`.

    Args:
        images_smem: rows of `width` images; `scratch_smem`: [*, SCRATCH_WORDS] int32, row `scratch_row` ours.
    """

    def over_row(ptx: str, n_results: int) -> Callable[[Array], tuple[Array, ...]]:
        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * 2 + (_SPLAT,) * 4, return_type=(_SCALAR,) * n_results)
        def run(_ctx, images, scratch, row, scratch_row, n_columns, image):
            results = utils.inline_ptx(
                ptx,
                address_of(images, row.registers.item(), width),
                n_columns.registers.item(),
                image.registers.item(),
                address_of(scratch, scratch_row.registers.item(), SCRATCH_WORDS),
                result_types=(_i32(),) * n_results,
                has_side_effects=True,
                convergent=True,
            )
            return tuple(FragmentedArray.splat(result, (), is_signed=True) for result in results)

        return lambda image: run(images_smem, scratch_smem, row, scratch_row, n_columns, image)

    lowest, highest, n = over_row(_RANGE, 3)(jnp.int32(0))
    count = over_row(_COUNT, 1)
    return find_cut(lambda image: count(image)[0], jnp.minimum(lowest, highest), highest, n, k, _bitcast)


def compact(
    images_smem: Ref,
    row: Array,
    width: int,
    n_columns: Array,
    cut: Array,
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
    o_images_gmem: Ref = None,
) -> None:
    """Writes the chosen of the first n_columns images of a row to o[t] and count[t], and their images if asked.

    Args:
        ids_smem: what `position` looks up, in row `ids_row` of `ids_width` words.
        position: one of `block_positions`, `own_positions`, `listed_positions`.
    """
    outputs = [o_gmem, count_gmem] + ([] if o_images_gmem is None else [o_images_gmem])
    emit = _emit(k, position, o_images_gmem is not None)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * (3 + len(outputs)) + (_SPLAT,) * 6)
    def write(_ctx, images, scratch, ids, o, count, *rest):
        *o_images, row, scratch_row, ids_row, n_columns, cut, t = rest
        row, scratch_row, ids_row, n_columns, cut, t = (
            x.registers.item() for x in (row, scratch_row, ids_row, n_columns, cut, t)
        )
        first, shared = address_of(images, row, width), address_of(scratch, scratch_row, SCRATCH_WORDS)
        ptx = functools.partial(utils.inline_ptx, has_side_effects=True, convergent=True)
        ptx(_SPLIT, first, n_columns, cut, shared)  # a warp takes a quarter: as many bytes as there are columns
        utils.warpgroup_barrier()
        ptx(
            emit,
            first,
            n_columns,
            cut,
            shared,
            address_of(ids, ids_row, ids_width),
            address_of(o, t, k),
            address_of(count, t, 1),
            *(address_of(x, t, k) for x in o_images),
        )
        utils.warpgroup_barrier()

    write(images_smem, scratch_smem, ids_smem, *outputs, row, scratch_row, ids_row, n_columns, cut, t)


def compact_reference(
    images: Array,
    positions: Array,
    cut: Array,
    k: int,
    t: Array,
    o_gmem: Ref,
    count_gmem: Ref,
    o_images_gmem: Ref = None,
) -> None:
    """`compact` in jnp, for interpret mode, which cannot run PTX: [W] images and what their columns stand for."""
    above, at_cut = (images > cut) & (images > INVISIBLE), (images == cut) & (images > INVISIBLE)
    room = k - jnp.sum(above.astype(jnp.int32))
    chosen = above | (at_cut & (jnp.cumsum(at_cut.astype(jnp.int32)) <= room))
    columns = jnp.nonzero(chosen, size=k, fill_value=0)[0].astype(jnp.int32)
    count = jnp.sum(chosen.astype(jnp.int32))
    filled = jnp.arange(k, dtype=jnp.int32) < count
    o_gmem[t] = jnp.where(filled, positions[columns], -1)
    count_gmem[t] = count
    if o_images_gmem is not None:
        o_images_gmem[t] = jnp.where(filled, images[columns], INVISIBLE)


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
