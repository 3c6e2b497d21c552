"""The PTX of select_row.py: passes over a row of sort keys in shared memory by a warp-group.

Names in capitals after a $ are operands (see `scope`). Every text is a scope of its own, registers and labels too.
"""

from collections.abc import Callable, Sequence

from hisa_jax.kernels_pallas.mosaic_gpu.ptx.inline import WARPGROUP_BARRIER, scope
from hisa_jax.kernels_pallas.sort_key import FORCED, INVISIBLE

_UNROLL = 4  # a thread's loads in flight
_STEP = 2048  # bytes that a warp-group loads at a time, 16 a thread
_WARP = "mov.u32 warp, %tid.x; shr.u32 warp, warp, 5; and.b32 warp, warp, 3;"


def _over_row(registers: str, start: str, step: str) -> str:
    """PTX over a row at $ROW of $N sort keys: `step` sees four of them in v0 .. v3."""
    load = "".join(f"ld.shared.v4.b32 {{v0, v1, v2, v3}}, [at+{_STEP * u}];\n{step}\n" for u in range(_UNROLL))
    one = load[: load.index("ld.shared", 1)]
    # Four loads at a time as long as there are as many, then one at a time: rows are whole steps.
    return f""".reg .pred p, q; .reg .b32 at, end, last, v<4>, {registers};
mov.u32 at, %tid.x; and.b32 at, at, 127; shl.b32 at, at, 4; add.u32 at, at, $ROW;
shl.b32 end, $N, 2; add.u32 end, end, $ROW; sub.u32 last, end, {_STEP * (_UNROLL - 1)};
{start}
many: setp.ge.s32 p, at, last; @p bra few;
{load}add.u32 at, at, {_STEP * _UNROLL}; bra many;
few: setp.ge.s32 p, at, end; @p bra done;
{one}add.u32 at, at, {_STEP}; bra few;
done:
"""


def _across_warps(op: str, value: str, word: int) -> str:
    """PTX: combines `value` over the warp and leaves it at word `word` + warp of $SCRATCH."""
    return f"""redux.sync.{op}.s32 {value}, {value}, -1;
{_WARP}
shl.b32 warp, warp, 2; add.u32 warp, warp, $SCRATCH; st.shared.b32 [warp+{4 * word}], {value};
"""


def _total(op: str, word: int, into: str) -> str:
    combine = "\n".join(f"{op}.s32 v0, v0, v{i};" for i in (1, 2, 3))
    # Every thread reads the four warps' words: one load, and no broadcast after it.
    return f"ld.shared.v4.b32 {{v0, v1, v2, v3}}, [$SCRATCH+{4 * word}];\n{combine}\nmov.b32 {into}, v0;\n"


def _count_ptx() -> str:
    """How many sort keys reach the threshold."""
    step = "\n".join(f"setp.ge.s32 p, v{i}, $THRESHOLD; @p add.s32 n{i}, n{i}, 1;" for i in range(4))
    # Four counters, so that no addition waits for the one before it.
    start = "mov.b32 n0, 0; mov.b32 n1, 0; mov.b32 n2, 0; mov.b32 n3, 0;"
    gather = "add.s32 n0, n0, n1; add.s32 n2, n2, n3; add.s32 n0, n0, n2;\n"
    return scope(
        _over_row("n<4>, warp, id", start, step)
        + gather
        + _across_warps("add", "n0", 0)
        + WARPGROUP_BARRIER
        + _total("add", 0, "$PASSED")
        + WARPGROUP_BARRIER,
        ("PASSED", "ROW", "N", "THRESHOLD", "SCRATCH"),
    )


def _range_ptx() -> str:
    """Least visible sort key, greatest that is not forced (an infinite end reduces the search to halving), how many."""
    step = "\n".join(
        f"setp.ne.s32 p, v{i}, {FORCED}; @p max.s32 high, high, v{i}; "
        f"setp.ne.s32 p, v{i}, {INVISIBLE}; @p add.s32 n, n, 1; @p min.s32 low, low, v{i};"
        for i in range(4)
    )
    start = f"mov.b32 low, {FORCED}; mov.b32 high, {INVISIBLE}; mov.b32 n, 0;"
    return scope(
        _over_row("low, high, n, warp, id", start, step)
        + _across_warps("min", "low", 0)
        + _across_warps("max", "high", 4)
        + _across_warps("add", "n", 8)
        + WARPGROUP_BARRIER
        + _total("min", 0, "$LOW")
        + _total("max", 4, "$HIGH")
        + _total("add", 8, "$SEEN")
        + WARPGROUP_BARRIER,
        ("LOW", "HIGH", "SEEN", "ROW", "N", "UNUSED", "SCRATCH"),
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


def _count_quarter(compare: str, word: int, name: str) -> str:
    """PTX: how many sort keys of each warp's quarter pass the threshold, to words `word` + warp of the scratch."""
    step = "".join(
        f"ld.shared.s32 v0, [at+{128 * u}]; setp.{compare}.s32 p, v0, $THRESHOLD; @p add.u32 n, n, 1;\n"
        for u in range(4)
    )
    loop = _quarter(step).format(again=f"count_{name}", done=f"counted_{name}")
    return f"""mov.u32 n, 0; {loop}
{_across_warps("add", "n", word)}"""


def _split_ptx() -> str:
    """How many sort keys of each warp's quarter reach the threshold: words 0 to 3 of the scratch."""
    return scope(
        f""".reg .pred p; .reg .b32 lane, warp, at, end, column, v0, t, n;
mov.u32 lane, %laneid; {_count_quarter("ge", 0, "reached")}""",
        ("ROW", "N", "THRESHOLD", "SCRATCH"),
    )


def emit_ptx(k: int, position: Callable[[int], str], outputs: Sequence[str] = ()) -> str:
    """Writes what is chosen of a warp's quarter, $N bytes, in order.

    Where no more than k sort keys reach the threshold, all that reach it are chosen: a third of the instructions of the
    general form, which takes sort keys at the threshold from the left until `room` is used up.

    Args:
        position: as `select_row.Positions.ptx`.
        outputs: of those that `select_row.Output` may have, SORT_KEYS and LEAST, the ones that are wanted.
    """

    # Two loops over the quarter, of which a warp-group runs one. `slot` is where the warp's next chosen column goes: it
    # starts at what the warps before it choose, and a lane adds the chosen of the lanes below (`below`: their bits).
    def find(u: int) -> str:
        """Of the chosen of 32 columns, bits `b` and predicate p{u}: where they will go, to{u}, and what they are."""
        return f"""and.b32 t, b, below; popc.b32 t, t; add.u32 to{u}, t, slot; popc.b32 b, b; add.u32 slot, slot, b;
{position(u)} mov.b32 id{u}, id;
"""

    def store(u: int) -> str:
        sort_key = f"add.s64 word, word, sort_keys; @p{u} st.global.b32 [word], v{u};" if "SORT_KEYS" in outputs else ""
        return f"mad.wide.u32 word, to{u}, 4, $O; @p{u} st.global.b32 [word], id{u}; {sort_key}\n"

    # What is looked up in memory takes a while: all four are on their way before the first is stored.
    load = "".join(f"ld.shared.s32 v{u}, [at+{128 * u}];\n" for u in range(4))
    stores = "".join(store(u) for u in range(4))
    quick = "".join(
        f"setp.ge.s32 p{u}, v{u}, $THRESHOLD; vote.sync.ballot.b32 b, p{u}, -1;\n{find(u)}" for u in range(4)
    )
    general = "".join(
        f"""setp.gt.s32 p{u}, v{u}, $THRESHOLD; setp.eq.s32 q, v{u}, $THRESHOLD;
vote.sync.ballot.b32 b, q, -1; and.b32 t, b, below; popc.b32 t, t; add.u32 t, t, tie; popc.b32 b, b; add.u32 tie, tie,
b; setp.lt.s32 r, t, room; and.pred q, q, r; or.pred p{u}, p{u}, q; vote.sync.ballot.b32 b, p{u}, -1;
{find(u)}"""
        for u in range(4)
    )
    quick, general = load + quick + stores, load + general + stores
    operands = ("ROW", "N", "THRESHOLD", "SCRATCH", "IDS", "O", "COUNT", *outputs)
    sort_key_offset, sort_key_fill, least = "", "", ""
    if "SORT_KEYS" in outputs:
        sort_key_offset = "sub.s64 sort_keys, $SORT_KEYS, $O;"
        sort_key_fill = f"add.s64 word, word, sort_keys; st.global.b32 [word], {INVISIBLE};"
    if "LEAST" in outputs:
        least = f"setp.lt.u32 q, total, {k}; selp.b32 n, {INVISIBLE}, $THRESHOLD, q; @!p st.global.b32 [$LEAST], n;"
    return scope(
        f""".reg .pred p, q, r, p<4>; .reg .b64 word, sort_keys; .reg .b32 id<4>, to<4>;
.reg .b32 lane, warp, below, at, column, end, v<4>, t, id, first, b, n, slot, tie, room, total, s<8>;
mov.u32 lane, %laneid; mov.u32 below, %lanemask_lt; {_WARP} {sort_key_offset}
ld.shared.v4.u32 {{s0, s1, s2, s3}}, [$SCRATCH];
add.u32 total, s0, s1; add.u32 total, total, s2; add.u32 total, total, s3;
{_before("slot", "s0", "s1", "s2")}
setp.gt.u32 p, total, {k}; @p bra general;
{_quarter(quick).format(again="quick", done="quick_done")}
bra fill;
general: {_count_quarter("gt", 4, "above")}
{WARPGROUP_BARRIER}
ld.shared.v4.u32 {{s4, s5, s6, s7}}, [$SCRATCH+16];
add.u32 total, s4, s5; add.u32 total, total, s6; add.u32 total, total, s7; sub.s32 room, {k}, total; mov.u32 total, {k};
{_WARP} {_before("n", "s4", "s5", "s6")}
sub.u32 tie, slot, n; min.s32 slot, tie, room; add.u32 slot, slot, n;
{_quarter(general).format(again="again", done="done")}
fill: {_WARP} shl.b32 t, warp, 5; add.u32 t, t, lane; setp.ne.u32 p, t, 0; @!p st.global.u32 [$COUNT], total;
{least} add.u32 t, t, total;
more: setp.ge.u32 p, t, {k}; @p bra out;
mad.wide.u32 word, t, 4, $O; st.global.b32 [word], -1; {sort_key_fill} add.u32 t, t, 128; bra more;
out:
""",
        operands,
    )


def _before(into: str, *counts: str) -> str:
    """PTX: the sum of the counts of the warps before this one."""
    lines = [f"setp.gt.u32 p, warp, {i}; @p add.u32 {into}, {into}, {count};" for i, count in enumerate(counts)]
    return " ".join([f"mov.u32 {into}, 0;", *lines])


def prefix_ptx(k: int) -> str:
    """Writes 0 .. VISIBLE - 1, then -1, k in all, and VISIBLE as the count."""
    return scope(
        f""".reg .pred p; .reg .b64 a; .reg .b32 v, x;
mov.u32 v, %tid.x; and.b32 v, v, 127; setp.ne.u32 p, v, 0; @!p st.global.u32 [$COUNT], $VISIBLE;
again: setp.ge.u32 p, v, {k}; @p bra out;
setp.lt.s32 p, v, $VISIBLE; selp.s32 x, v, -1, p;
mul.wide.u32 a, v, 4; add.u64 a, a, $O; st.global.u32 [a], x; add.u32 v, v, 128; bra again;
out:
""",
        ("VISIBLE", "O", "COUNT"),
    )


RANGE_PTX, COUNT_PTX, SPLIT_PTX = _range_ptx(), _count_ptx(), _split_ptx()
