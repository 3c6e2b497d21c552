"""Candidates that passed a filter, from a row of sort keys in device memory to a list in shared memory, in PTX.

A round takes 128 words of the mask, one a thread: a scan of their bit counts tells each thread where in the list its
candidates go, in column order, and copies without registers (`cp.async`) fetch the sort keys, so that no thread waits
for one before it asks for the next. A round that finds no room is left to the next list; one that is too much for any
list is taken by halves.
"""

from typing import NamedTuple

from jax import Array
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu

from hisa_jax.kernels_pallas.mosaic_gpu.ptx.inline import (
    REF,
    SCALAR,
    SPLAT,
    WARPGROUP_BARRIER,
    Row,
    address_of,
    i32,
    scalar,
    scope,
)
from hisa_jax.kernels_pallas.mosaic_gpu.ptx.select_row import COLUMNS, Output
from hisa_jax.kernels_pallas.sort_key import INVISIBLE
from hisa_jax.kernels_pallas.types import Ref

ROUND = 128 * 32  # columns that a round takes at most: a list must have room for half as many
_THREAD = """mov.u32 tid, %tid.x; shr.u32 id, tid, 7; add.u32 id, id, 1; and.b32 tid, tid, 127;
"""


def gather_ptx(capacity: int) -> str:
    """PTX of `gather` for lists with room for `capacity`."""
    # again:  a round: a mask a thread, or each of the first 64; a scan of the bit counts over the warp, then over the
    #         warps through the scratch
    # each:   a thread's set bits, lowest first: a copy of the sort key goes on its way, the position is stored
    # done:   all copies have landed; pad: `INVISIBLE` up to a whole step of the selection
    scan = "".join(
        f"shfl.sync.up.b32 t|q, sum, {distance}, 0, -1; @q add.s32 sum, sum, t;\n" for distance in (1, 2, 4, 8, 16)
    )
    before = "".join(f"setp.gt.u32 q, warp, {i}; @q add.s32 at, at, v{i};\n" for i in range(3))
    return scope(
        f""".reg .pred p, q; .reg .b64 a; .reg .b32 tid, id, lane, warp, word, words, count, own, mask, n, sum, t;
.reg .b32 total, at, column, to, position, v<4>;
{_THREAD}mov.u32 lane, %laneid; shr.u32 warp, tid, 5; mov.b32 word, $WORD; mov.b32 count, $COUNT; mov.b32 words, 128;
again: setp.ge.s32 p, word, $WORDS; @p bra done;
add.s32 own, word, tid; setp.lt.s32 p, own, $WORDS; setp.lt.and.s32 p, tid, words, p;
mov.b32 mask, 0; mul.wide.u32 a, own, 4; add.u64 a, a, $MASKS;
@p ld.global.b32 mask, [a]; popc.b32 n, mask; mov.b32 sum, n;
{scan}setp.eq.u32 q, lane, 31; shl.b32 t, warp, 2; add.u32 t, t, $SCRATCH; @q st.shared.b32 [t], sum;
bar.sync id, 128; ld.shared.v4.b32 {{v0, v1, v2, v3}}, [$SCRATCH]; bar.sync id, 128;
add.s32 total, v0, v1; add.s32 t, v2, v3; add.s32 total, total, t;
add.s32 t, count, total; setp.le.s32 p, t, {capacity}; @p bra fits;
setp.gt.s32 p, count, $COUNT; @p bra done; mov.b32 words, 64; bra again;
fits: sub.s32 at, sum, n; add.s32 at, at, count; mov.b32 count, t;
mul.wide.u32 a, own, 128; add.u64 a, a, $X;
{before}shl.b32 at, at, 2; add.u32 to, at, $SORT_KEYS; add.u32 position, at, $POSITIONS; shl.b32 column, own, 5;
each: setp.eq.b32 p, mask, 0; @p bra next;
neg.s32 t, mask; and.b32 t, t, mask; xor.b32 mask, mask, t; bfind.u32 t, t; add.u32 t, t, column;
cp.async.ca.shared.global [to], [a], 4; add.u64 a, a, 4;
add.s32 t, t, $START; st.shared.b32 [position], t; add.u32 to, to, 4; add.u32 position, position, 4; bra each;
next: bar.warp.sync 0xffffffff; add.s32 word, word, words; bra again;
done: cp.async.wait_all; add.s32 t, count, {COLUMNS - 1}; and.b32 t, t, {-COLUMNS}; add.s32 own, count, tid;
pad: setp.ge.s32 p, own, t; @p bra out;
shl.b32 at, own, 2; add.u32 at, at, $SORT_KEYS; st.shared.b32 [at], {INVISIBLE}; add.s32 own, own, 128; bra pad;
out: bar.warp.sync 0xffffffff; bar.sync id, 128; mov.b32 $LISTED, count; mov.b32 $NEXT, word;
""",
        ("LISTED", "NEXT", "SORT_KEYS", "POSITIONS", "SCRATCH", "MASKS", "X", "WORD", "WORDS", "COUNT", "START"),
    )


def reload_ptx(k: int) -> str:
    """PTX of `reload` for k chosen."""
    # Between two barriers of the warp-group: all have stored what is read here, and all have it before lists are used.
    return scope(
        f""".reg .pred p; .reg .b64 a, b; .reg .b32 tid, id, at, v;
{_THREAD}bar.sync id, 128;
again: setp.ge.s32 p, tid, {k}; @p bra out;
mul.wide.u32 a, tid, 4; shl.b32 at, tid, 2;
add.u64 b, a, $BEST; ld.global.b32 v, [b]; add.u32 id, at, $SORT_KEYS; st.shared.b32 [id], v;
add.u64 b, a, $CHOSEN; ld.global.b32 v, [b]; add.u32 id, at, $POSITIONS; st.shared.b32 [id], v;
add.s32 tid, tid, 128; bra again;
out: {WARPGROUP_BARRIER}""",
        ("SORT_KEYS", "POSITIONS", "BEST", "CHOSEN"),
    )


class Lists(NamedTuple):
    """A query's candidates in shared memory, in order of position: sort keys and positions, as long as each other."""

    sort_keys: Row
    positions: Row


class Tile(NamedTuple):
    """What the scores kernel has left of a tile of keys.

    Attributes:
        masks: [T, words] int32, of each column a bit: whether it passed; `x`: [T, 32 * words], sort keys of those that
            did, of the columns of a word side by side.
        t: the query; `n_words`: of its row, those up to its limit; `start`: the position of column 0.
    """

    masks: Ref
    x: Ref
    t: Array
    n_words: Array
    start: Array


def gather(lists: Lists, scratch: Row, tile: Tile, word: Array, count: Array) -> tuple[Array, Array]:
    """Appends what passed of a tile, from `word` on, to lists that are `count` long.

    Returns: how long they are now, padded to a whole number of COLUMNS with `INVISIBLE`, and the first word not taken
        for want of room.
    """
    words, columns = tile.masks.shape[1], tile.x.shape[1]

    @plgpu.inline_mgpu(arg_types=(REF,) * 5 + (SPLAT,) * 6, return_type=(SCALAR,) * 2)
    def run(_ctx, sort_keys, positions, scratch_ref, masks, x, *scalars):
        row, t, word, n_words, count, start = (value.registers.item() for value in scalars)
        results = utils.inline_ptx(
            gather_ptx(lists.positions.width),
            address_of(sort_keys, row, lists.sort_keys.width),
            address_of(positions, row, lists.positions.width),
            address_of(scratch_ref, row, scratch.width),
            address_of(masks, t, words),
            address_of(x, t, columns),
            word,
            n_words,
            count,
            start,
            result_types=(i32(),) * 2,
            has_side_effects=True,
            convergent=True,
        )
        return tuple(scalar(result) for result in results)

    refs = lists.sort_keys.ref, lists.positions.ref, scratch.ref, tile.masks, tile.x
    return run(*refs, scratch.row, tile.t, word, tile.n_words, count, tile.start)


def reload(lists: Lists, out: Output) -> None:
    """What this warp-group has written to `out` becomes the front of the lists."""
    k, width = out.k, lists.positions.width

    @plgpu.inline_mgpu(arg_types=(REF,) * 4 + (SPLAT,) * 2)
    def run(_ctx, sort_keys, positions, best, chosen, row, t):
        row, t = row.registers.item(), t.registers.item()
        to, source = (
            (address_of(x, row, width) for x in (sort_keys, positions)),
            (address_of(x, t, k) for x in (best, chosen)),
        )
        utils.inline_ptx(reload_ptx(k), *to, *source, has_side_effects=True, convergent=True)

    run(lists.sort_keys.ref, lists.positions.ref, out.sort_keys, out.positions, lists.sort_keys.row, out.t)
