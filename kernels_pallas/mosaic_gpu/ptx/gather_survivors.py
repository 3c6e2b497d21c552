"""Candidates that passed a filter, from a row of sort keys in device memory to a list in shared memory, in PTX.

A round takes 128 words of the mask, one a thread: a scan of their bit counts tells each thread where in the list its
candidates go, in column order, and copies without registers (`cp.async`) fetch the sort keys, so that no thread waits
for one before it asks for the next.
"""

import functools
import re

import jax.numpy as jnp
from jax import Array
from jax.experimental.mosaic.gpu import FragmentedArray, utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir

from hisa_jax.kernels_pallas.mosaic_gpu.ptx.lanes import address_of
from hisa_jax.kernels_pallas.mosaic_gpu.ptx.select_row import COLUMNS, SCRATCH_WORDS
from hisa_jax.kernels_pallas.sort_key import INVISIBLE
from hisa_jax.kernels_pallas.types import Ref

ROUND = 128 * 32  # columns that a round takes at most: a list must have room for as many
_SPLAT = plgpu.Layout.WG_SPLAT
_SCALAR = plgpu.ShapeDtypeStruct((), jnp.dtype(jnp.int32), layout=_SPLAT)
_THREAD = """mov.u32 tid, %tid.x; shr.u32 id, tid, 7; add.u32 id, id, 1; and.b32 tid, tid, 127;
"""


def gather_ptx(capacity: int) -> str:
    scan = "".join(
        f"shfl.sync.up.b32 t|q, sum, {distance}, 0, -1; @q add.s32 sum, sum, t;\n" for distance in (1, 2, 4, 8, 16)
    )
    before = "".join(f"setp.gt.u32 q, warp, {i}; @q add.s32 at, at, v{i};\n" for i in range(3))
    return _scope(
        f""".reg .pred p, q; .reg .b64 a; .reg .b32 tid, id, lane, warp, word, count, own, mask, n, sum, t, total, at;
.reg .b32 column, to, position, v<4>;
{_THREAD}mov.u32 lane, %laneid; shr.u32 warp, tid, 5; mov.b32 word, $WORD; mov.b32 count, $COUNT;
again: setp.ge.s32 p, word, $WORDS; @p bra done;
add.s32 own, word, tid; setp.lt.s32 p, own, $WORDS; mov.b32 mask, 0; mul.wide.u32 a, own, 4; add.u64 a, a, $MASKS;
@p ld.global.b32 mask, [a]; popc.b32 n, mask; mov.b32 sum, n;
{scan}setp.eq.u32 q, lane, 31; shl.b32 t, warp, 2; add.u32 t, t, $SCRATCH; @q st.shared.b32 [t], sum;
bar.sync id, 128; ld.shared.v4.b32 {{v0, v1, v2, v3}}, [$SCRATCH]; bar.sync id, 128;
add.s32 total, v0, v1; add.s32 t, v2, v3; add.s32 total, total, t;
add.s32 t, count, total; setp.gt.s32 p, t, {capacity}; @p bra done;
sub.s32 at, sum, n; add.s32 at, at, count; mov.b32 count, t;
{before}shl.b32 at, at, 2; add.u32 to, at, $SORT_KEYS; add.u32 position, at, $POSITIONS; shl.b32 column, own, 5;
each: setp.eq.b32 p, mask, 0; @p bra next;
neg.s32 t, mask; and.b32 t, t, mask; xor.b32 mask, mask, t; bfind.u32 t, t; add.u32 t, t, column;
mul.wide.u32 a, t, 4; add.u64 a, a, $X; cp.async.ca.shared.global [to], [a], 4;
add.s32 t, t, $START; st.shared.b32 [position], t; add.u32 to, to, 4; add.u32 position, position, 4; bra each;
next: bar.warp.sync 0xffffffff; add.s32 word, word, 128; bra again;
done: cp.async.wait_all; add.s32 t, count, {COLUMNS - 1}; and.b32 t, t, {-COLUMNS}; add.s32 own, count, tid;
pad: setp.ge.s32 p, own, t; @p bra out;
shl.b32 at, own, 2; add.u32 at, at, $SORT_KEYS; st.shared.b32 [at], {INVISIBLE}; add.s32 own, own, 128; bra pad;
out: bar.warp.sync 0xffffffff; bar.sync id, 128; mov.b32 $LISTED, count; mov.b32 $NEXT, word;
""",
        ("LISTED", "NEXT", "SORT_KEYS", "POSITIONS", "SCRATCH", "MASKS", "X", "WORD", "WORDS", "COUNT", "START"),
    )


def reload_ptx(k: int) -> str:
    return _scope(
        f""".reg .pred p; .reg .b64 a, b; .reg .b32 tid, id, at, v;
{_THREAD}bar.sync id, 128;
again: setp.ge.s32 p, tid, {k}; @p bra out;
mul.wide.u32 a, tid, 4; shl.b32 at, tid, 2;
add.u64 b, a, $BEST; ld.global.b32 v, [b]; add.u32 id, at, $SORT_KEYS; st.shared.b32 [id], v;
add.u64 b, a, $CHOSEN; ld.global.b32 v, [b]; add.u32 id, at, $POSITIONS; st.shared.b32 [id], v;
add.s32 tid, tid, 128; bra again;
out: mov.u32 id, %tid.x; shr.u32 id, id, 7; add.u32 id, id, 1; bar.sync id, 128;
""",
        ("SORT_KEYS", "POSITIONS", "BEST", "CHOSEN"),
    )


def _scope(body: str, operands: tuple[str, ...]) -> str:
    return "{\n" + re.sub(r"\$([A-Z_]+)", lambda name: f"${operands.index(name[1])}", body) + "}"


def gather(
    sort_keys_smem: Ref,
    positions_smem: Ref,
    scratch_smem: Ref,
    row: Array,
    capacity: int,
    masks_gmem: Ref,
    x_gmem: Ref,
    t: Array,
    word: Array,
    n_words: Array,
    count: Array,
    start: Array,
) -> tuple[Array, Array]:
    """Appends what passed to the lists in `row` of sort_keys_smem and positions_smem, [*, capacity] each.

    Args:
        masks_gmem: [T, words]; x_gmem: [T, 32 * words]; of both row t, from `word` up to `n_words`.
        count: how long the lists are; `start`: the position of column 0.

    Returns: how long they are now, padded to a whole number of COLUMNS with `INVISIBLE`, and the first word not taken
        for want of room.
    """
    words, columns = masks_gmem.shape[1], x_gmem.shape[1]

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * 5 + (_SPLAT,) * 6, return_type=(_SCALAR,) * 2)
    def run(_ctx, sort_keys, positions, scratch, masks, x, *scalars):
        row, t, word, n_words, count, start = (value.registers.item() for value in scalars)
        results = utils.inline_ptx(
            gather_ptx(capacity),
            address_of(sort_keys, row, capacity),
            address_of(positions, row, capacity),
            address_of(scratch, row, SCRATCH_WORDS),
            address_of(masks, t, words),
            address_of(x, t, columns),
            word,
            n_words,
            count,
            start,
            result_types=(ir.IntegerType.get_signless(32),) * 2,
            has_side_effects=True,
            convergent=True,
        )
        return tuple(FragmentedArray.splat(result, (), is_signed=True) for result in results)

    return run(sort_keys_smem, positions_smem, scratch_smem, masks_gmem, x_gmem, row, t, word, n_words, count, start)


def reload(
    sort_keys_smem: Ref, positions_smem: Ref, row: Array, capacity: int, best_gmem: Ref, chosen_gmem: Ref, t: Array
) -> None:
    """Row t of [T, k] best_gmem and chosen_gmem, written by this warp-group, to the front of the lists."""
    k = best_gmem.shape[1]

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * 4 + (_SPLAT,) * 2)
    def run(_ctx, sort_keys, positions, best, chosen, row, t):
        row, t = row.registers.item(), t.registers.item()
        ptx = functools.partial(utils.inline_ptx, has_side_effects=True, convergent=True)
        ptx(
            reload_ptx(k),
            address_of(sort_keys, row, capacity),
            address_of(positions, row, capacity),
            address_of(best, t, k),
            address_of(chosen, t, k),
        )

    run(sort_keys_smem, positions_smem, best_gmem, chosen_gmem, row, t)
