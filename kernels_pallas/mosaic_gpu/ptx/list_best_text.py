"""The PTX of list_best.py: the tokens of the best sort keys of one row, by all threads of a CTA.

The threshold of a sample is found as `threshold_text.py` finds that of a row. One pass over the row leaves a bit for
each sort key in shared memory, warp by warp without a barrier; then each thread lists the bits of its own words.
"""

import dataclasses

from hisa_jax.kernels_pallas.mosaic_gpu.ptx.inline import scope
from hisa_jax.kernels_pallas.mosaic_gpu.ptx.threshold_text import (
    Shape,
    before,
    clear_ptx,
    registers,
    sync,
    threshold_ptx,
)
from hisa_jax.kernels_pallas.sort_key import FORCED, INVISIBLE

OPERANDS = ("X", "SAMPLES", "LIMIT", "O", "COUNT", "SMEM")
WORD = 32  # sort keys of a word of bits; a warp takes so many words at a time
_CHUNK = WORD * WORD
_COUNTED, _TIED = 3, 6  # places of sums over threads that no other sum of `threshold_ptx` still has


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """The static numbers of a row.

    Attributes:
        width: sort keys, a multiple of 32; `step`: every so many are sampled.
        apart: from a sample to the next: `step`, or 1 where samples are side by side.
        least: how many are listed at least, if there are so many; `most`: at most.
        keep_first, keep_last: candidates that are listed whatever their sort keys.
        sample: of the samples, and how many of them reach the first threshold.
    """

    width: int
    step: int
    apart: int
    least: int
    most: int
    keep_first: int
    keep_last: int
    sample: Shape

    @property
    def words_a_thread(self) -> int:
        return -(-self.width // (WORD * self.sample.n_threads))

    @property
    def bits(self) -> int:
        """Where in shared memory the bits are, and those above the threshold where many tie."""
        return -(-self.sample.smem_bytes // 16) * 16

    @property
    def bits_bytes(self) -> int:
        chunks = -(-self.width // _CHUNK) * WORD
        return 4 * max(chunks, self.words_a_thread * self.sample.n_threads)

    @property
    def list(self) -> int:
        """Where the list is: in place of the samples, if there is room for it."""
        return 0 if 4 * self.most <= self.bits else self.bits + 2 * self.bits_bytes

    @property
    def smem_bytes(self) -> int:
        return self.bits + 2 * self.bits_bytes + (4 * self.most if self.list else 0)


def list_ptx(row: Row) -> str:
    """Lists the best of the first $LIMIT of the row at $X to $O, ascending, then -1; how many to $COUNT."""
    return scope(
        f"""{registers(row.sample)}
.reg .pred leads; .reg .b32 mode, into, least, stride, x<{WORD}>;
{_sample(row)}
{threshold_ptx(row.sample)}
emit: mov.b32 lo, {INVISIBLE + 1}; mov.b32 hi, {FORCED}; mov.b32 mode, 0; mov.b32 into, 0;
mov.b32 stride, {1 << 14}; setp.eq.u32 leads, lane, 0;
min.s32 least, $LIMIT, {row.least}; setp.le.s32 p, $LIMIT, {row.most}; @p mov.b32 thr, lo;
{_mark(row)}
{_count(row)}
{_look_again(row)}
{_list(row)}
""",
        OPERANDS,
    )


def _sample(row: Row) -> str:
    """A thread's samples, in registers and in shared memory; which these are does not matter."""
    shape = row.sample
    lines = [
        f"mul.wide.u32 word, tid, {4 * row.apart}; add.s64 word, word, $SAMPLES; mul.lo.u32 column, tid, {row.step};"
    ]
    for j in range(shape.each):
        skipped, at = (j * shape.n_threads * apart for apart in (row.step, 4 * row.apart))
        lines.append(
            f"mov.b32 v{j}, {INVISIBLE}; sub.s32 t, $LIMIT, {skipped}; setp.lt.s32 p, column, t; "
            f"@p ld.global.b32 v{j}, [word+{at}];"
        )
    lines.append(clear_ptx(shape))
    lines.append(f"mul.lo.u32 at, tid, {shape.pitch}; add.u32 at, at, $SMEM;")
    for j in range(0, shape.each, 4):
        four = ", ".join(f"v{j + i}" for i in range(4))
        lines.append(f"st.shared.v4.b32 [at+{shape.keys + 4 * j}], {{{four}}};")
    return "\n".join([*lines, sync(shape)])


def _mark(row: Row) -> str:
    """A bit for each sort key that reaches `thr`. A warp takes every 32nd 1024 of them, all on their way at once."""
    n_warps = row.sample.n_warps
    lines = [
        f"""mark: mov.b32 i, warp;
chunk: mul.lo.u32 column, i, {_CHUNK}; setp.ge.s32 p, column, $LIMIT; @p bra marked;
add.u32 t, column, lane; mul.wide.u32 word, t, 4; add.s64 word, word, $X;"""
    ]
    is_ragged = row.width % _CHUNK
    for k in range(WORD):
        if is_ragged:
            lines.append(f"mov.b32 x{k}, {INVISIBLE}; setp.lt.s32 p, column, {row.width - WORD * k};")
        lines.append(f"{'@p ' if is_ragged else ''}ld.global.b32 x{k}, [word+{4 * WORD * k}];")
    lines.append(f"mul.lo.u32 at, i, {4 * WORD}; add.u32 at, at, $SMEM; add.u32 at, at, into;")
    for k in range(0, WORD, 4):
        for i in range(k, k + 4):
            lines.append(f"setp.ge.s32 p, x{i}, thr; vote.sync.ballot.b32 x{i}, p, -1;")
        four = ", ".join(f"x{k + i}" for i in range(4))
        lines.append(f"@leads st.shared.v4.b32 [at+{row.bits + 4 * k}], {{{four}}};")
    lines.append(f"add.u32 i, i, {n_warps}; bra chunk;\nmarked: {sync(row.sample)}")
    return "\n".join(lines)


def _below(n: str, into: str) -> str:
    """PTX: `into`, the bits of those of the word from `column` on that are below n."""
    return f"""sub.s32 {into}, {n}, column; max.s32 {into}, {into}, 0; mov.b32 u, 1; shl.b32 {into}, u, {into};
sub.s32 {into}, {into}, 1;"""


def _own_words(row: Row) -> str:
    """PTX: `at` and `column` of this thread's first word."""
    each = row.words_a_thread
    return f"""mul.lo.u32 t, tid, {each}; shl.b32 column, t, 5; shl.b32 at, t, 2; add.u32 at, at, $SMEM;
add.u32 at, at, {row.bits};"""


def _count(row: Row) -> str:
    """`total` bits, of which `e` come before this thread's; words are left as what is listed."""
    # Beyond the last word that was written there may be anything: it lies beyond the limit.
    return f"""{_own_words(row)}
add.u32 at, at, into; mov.b32 n, 0; mov.b32 i, 0;
count: ld.shared.b32 key, [at];
{_below(str(row.keep_first), "g")} or.b32 key, key, g;
sub.s32 t, $LIMIT, {row.keep_last}; {_below("t", "g")} not.b32 g, g; or.b32 key, key, g;
{_below("$LIMIT", "g")} and.b32 key, key, g; st.shared.b32 [at], key; popc.b32 g, key; add.s32 n, n, g;
add.u32 at, at, 4; add.s32 column, column, {WORD}; add.s32 i, i, 1;
setp.lt.s32 p, i, {row.words_a_thread}; @p bra count;
{before(row.sample, _COUNTED, "n")}"""


def _look_again(row: Row) -> str:
    """Too many or too few: another threshold is tried, until no sort key is left between the bounds.

    The first one is hardly ever far off, so steps from it begin small, four times as far each time, but no farther than
    the middle. At the end more tie at `lo` than there is room for. Those above it are marked apart, then those that
    reach it (mode 1 and 2): of the ones that tie the first are listed.
    """
    middle = """shr.s32 middle, lo, 1; shr.s32 t, hi, 1; add.s32 middle, middle, t; or.b32 t, lo, hi; and.b32 t, t, 1;
add.s32 middle, middle, t; sub.s32 t, middle, lo; sub.s32 u, hi, middle; min.u32 t, t, stride; min.u32 u, u, stride;
@p add.s32 thr, lo, t; @!p sub.s32 thr, hi, u; shl.b32 stride, stride, 2;"""
    return f"""setp.eq.s32 p, mode, 2; @p bra choose; setp.eq.s32 p, mode, 1; @p bra above;
setp.gt.s32 p, total, {row.most}; setp.lt.s32 q, total, least; or.pred s, p, q; @!s bra write;
@p mov.b32 lo, thr; @q sub.s32 hi, thr, 1; setp.lt.s32 q, lo, hi; @!q bra tied;
min.u32 stride, stride, {1 << 28}; {middle} bra mark;
tied: mov.b32 mode, 1; add.s32 thr, lo, 1; mov.b32 into, {row.bits_bytes}; bra mark;
above: mov.b32 mode, 2; sub.s32 room, {row.least}, total; mov.b32 thr, lo; mov.b32 into, 0; bra mark;
choose: {_own_words(row)}
mov.b32 n, 0; mov.b32 i, 0;
those: ld.shared.b32 key, [at]; ld.shared.b32 g, [at+{row.bits_bytes}]; xor.b32 key, key, g; popc.b32 g, key;
add.s32 n, n, g; add.u32 at, at, 4; add.s32 i, i, 1; setp.lt.s32 p, i, {row.words_a_thread}; @p bra those;
{before(row.sample, _TIED, "n")}
sub.s32 room, room, e; {_own_words(row)}
mov.b32 n, 0; mov.b32 i, 0;
keep: ld.shared.b32 key, [at]; ld.shared.b32 c, [at+{row.bits_bytes}]; xor.b32 key, key, c;
lowest: setp.ne.u32 p, key, 0; setp.gt.and.s32 p, room, 0, p; vote.sync.any.pred q, p, -1; @!q bra kept;
neg.s32 t, key; and.b32 t, t, key; @p xor.b32 key, key, t; @p or.b32 c, c, t; @p sub.s32 room, room, 1; bra lowest;
kept: st.shared.b32 [at], c; popc.b32 g, c; add.s32 n, n, g;
add.u32 at, at, 4; add.s32 i, i, 1; setp.lt.s32 p, i, {row.words_a_thread}; @p bra keep;
{before(row.sample, _COUNTED, "n")}"""


def _list(row: Row) -> str:
    """Each thread lists its bits after those of the threads before it, in shared memory; whole lines are written out.

    Scattered stores of single words to device memory would be a sector of L2 each.
    """
    n, four = row.sample.n_threads, "{x0, x1, x2, x3}"
    filled = "".join(f"add.s32 u, t, {j}; setp.lt.s32 q, u, total; selp.b32 x{j}, x{j}, -1, q;\n" for j in range(4))
    return f"""write: {sync(row.sample) if row.list == 0 else ""}{_own_words(row)}
mov.b32 i, 0; shl.b32 slot, e, 2; add.u32 slot, slot, $SMEM;
next: ld.shared.b32 key, [at];
bit: setp.ne.u32 p, key, 0; vote.sync.any.pred q, p, -1; @!q bra empty;
neg.s32 u, key; and.b32 u, u, key; xor.b32 key, key, u; bfind.u32 t, u; add.u32 t, t, column;
@p st.shared.b32 [slot+{row.list}], t; @p add.s32 slot, slot, 4; bra bit;
empty: add.u32 at, at, 4; add.s32 column, column, {WORD}; add.s32 i, i, 1; setp.lt.s32 p, i, {row.words_a_thread};
@p bra next;
setp.eq.u32 p, tid, 0; mov.b64 word, $COUNT; @p st.global.b32 [word], total; shl.b32 t, tid, 2;
{sync(row.sample)}out: setp.ge.s32 p, t, {row.most}; @p bra done;
shl.b32 at, t, 2; add.u32 at, at, $SMEM; ld.shared.v4.b32 {four}, [at+{row.list}];
{filled}mul.wide.s32 word, t, 4; add.s64 word, word, $O; st.global.v4.b32 [word], {four};
add.s32 t, t, {4 * n}; bra out;
done:"""
