"""The set bits of a row of words in device memory, as a list of their numbers in shared memory: in PTX.

A round takes 512 words, four a thread: a scan of their bit counts tells each thread where in the list its bits go.
Scattered stores go to shared memory, where they cost a cycle and not a sector of L2 each; the copy engine then writes
whole lines.
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
from hisa_jax.kernels_pallas.types import Ref

WORDS = 4  # that a thread loads at a time: rows of words are multiples of this
_STEP = 128 * WORDS


class Words(NamedTuple):
    """A row of words in device memory: ref[t], of which the first `n` count."""

    ref: Ref  # [T, words] int32
    t: Array
    n: Array


def list_bits(words: Words, into: Row, scratch: Row) -> Array:
    """Writes the numbers of the set bits to a row of shared memory, ascending, then -1, and returns how many are set.

    Those that the row has no room for are counted alone. `scratch`: 4 words of the warp-group.
    """
    width = words.ref.shape[1]

    @plgpu.inline_mgpu(arg_types=(REF,) * 3 + (SPLAT,) * 4, return_type=SCALAR)
    def run(_ctx, masks, into_ref, scratch_ref, t, n, row, scratch_row):
        t, n, row, scratch_row = (x.registers.item() for x in (t, n, row, scratch_row))
        result = utils.inline_ptx(
            list_ptx(into.width),
            address_of(masks, t, width),
            n,
            address_of(into_ref, row, into.width),
            address_of(scratch_ref, scratch_row, scratch.width),
            result_types=i32(),
            has_side_effects=True,
            convergent=True,
        )
        return scalar(result)

    return run(words.ref, into.ref, scratch.ref, words.t, words.n, into.row, scratch.row)


def list_ptx(capacity: int) -> str:
    """The text for a row with room for `capacity` numbers."""
    # again:  the next round's words are on their way, this one's are counted: over the warp, then over the warps
    # each:   a bit of each of the thread's words in turn: four chains that do not wait for each other
    # pad:    -1 up to the end of the row
    each = range(WORDS)
    words, ahead = (", ".join(f"{name}{i}" for i in each) for name in ("m", "next"))
    load = "".join(f"mov.b32 next{i}, 0;" for i in each) + f"@p ld.global.nc.v4.b32 {{{ahead}}}, [a];"
    # Words at and beyond `n` may be anything.
    known = "".join(
        f"add.u32 t, own, {i}; setp.lt.s32 q, t, $WORDS; selp.b32 m{i}, next{i}, 0, q; popc.b32 n{i}, m{i};\n"
        f"shl.b32 first{i}, t, 5;"  # the number of the word's bit 0
        for i in each
    )
    scan = "".join(
        f"shfl.sync.up.b32 t|q, sum, {distance}, 0, -1; @q add.s32 sum, sum, t;\n" for distance in (1, 2, 4, 8, 16)
    )
    before = "".join(f"setp.gt.u32 q, warp, {i}; @q add.s32 at0, at0, v{i};\n" for i in range(3))
    # A thread's bits follow each other in the list, word by word.
    places = "".join(f"shl.b32 n{i}, n{i}, 2; add.u32 at{i + 1}, at{i}, n{i};" for i in list(each)[:-1])
    bits = "".join(
        f"""setp.ne.b32 p, m{i}, 0; setp.lt.and.u32 p, at{i}, end, p;
neg.s32 t, m{i}; and.b32 t, t, m{i}; xor.b32 m{i}, m{i}, t; bfind.u32 t, t; add.u32 t, t, first{i};
@p st.shared.b32 [at{i}], t; add.u32 at{i}, at{i}, 4;
"""
        for i in each
    )
    return scope(
        f""".reg .pred p, q; .reg .b64 a; .reg .b32 tid, id, lane, warp, word, count, own, n, sum, t, u, total, end;
.reg .b32 v<4>, {words}, {ahead}, {", ".join(f"{name}{i}" for name in ("n", "first", "at") for i in each)};
mov.u32 tid, %tid.x; and.b32 tid, tid, 127; mov.u32 lane, %laneid; shr.u32 warp, tid, 5;
mov.b32 word, 0; mov.b32 count, 0; add.u32 end, $LIST, {4 * capacity};
mul.lo.u32 own, tid, {WORDS}; mul.wide.u32 a, own, 4; add.u64 a, a, $MASKS; setp.lt.s32 p, own, $WORDS;
{load}
again: setp.ge.s32 p, word, $WORDS; @p bra done;
mad.lo.u32 own, tid, {WORDS}, word; {known}
add.u64 a, a, {4 * _STEP}; add.u32 t, own, {_STEP}; setp.lt.s32 p, t, $WORDS; {load}
add.s32 n, n0, n1; add.s32 t, n2, n3; add.s32 n, n, t; mov.b32 sum, n;
{scan}setp.eq.u32 q, lane, 31; shl.b32 t, warp, 2; add.u32 t, t, $SCRATCH; @q st.shared.b32 [t], sum;
{WARPGROUP_BARRIER}ld.shared.v4.b32 {{v0, v1, v2, v3}}, [$SCRATCH];
{WARPGROUP_BARRIER}add.s32 total, v0, v1; add.s32 t, v2, v3; add.s32 total, total, t;
sub.s32 at0, sum, n; add.s32 at0, at0, count; add.s32 count, count, total;
{before}shl.b32 at0, at0, 2; add.u32 at0, at0, $LIST; {places}
each: or.b32 t, m0, m1; or.b32 u, m2, m3; or.b32 t, t, u; setp.ne.b32 p, t, 0; vote.sync.any.pred q, p, -1;
@!q bra next;
{bits}bra each;
next: add.u32 word, word, {_STEP}; bra again;
done: add.s32 n, count, tid;
pad: setp.lt.s32 p, n, {capacity}; vote.sync.any.pred q, p, -1; @!q bra out;
shl.b32 t, n, 2; add.u32 t, t, $LIST; @p st.shared.b32 [t], -1; add.s32 n, n, 128; bra pad;
out: mov.b32 $COUNT, count;
""",
        ("COUNT", "MASKS", "WORDS", "LIST", "SCRATCH"),
    )
