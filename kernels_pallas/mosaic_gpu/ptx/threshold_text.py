"""PTX that finds the threshold of a row: of the k best sort keys the last, by all threads of a CTA.

    registers v: a thread's sort keys -> their range -> a histogram of scores in bins of equal width
        -> the bin that holds the threshold -> its sort keys, listed -> each thread ranks one      -> `thr`
                                               too many of them, or no range of scores: by halving -> `thr`

Three kernels begin so: what is chosen is written by select_few_text.py, list_best_text.py and slopes_text.py. Names in
capitals after a $ are operands (see `scope`). Branches are taken by all threads of a warp or by none, and but for
two loops without barriers by all warps.
"""

import dataclasses
from collections.abc import Callable

from hisa_jax.kernels_pallas.sort_key import FORCED, INVISIBLE

BINS = 1024
_PAD = 16  # bytes between rows of a thread's sort keys in shared memory: 8 threads then read 32 banks
WHOLE = 0x4B000000  # 2^23, in float32; the next number is one more
_BARRIER = 8  # those below are of single warp-groups


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """The static numbers of a row.

    Attributes:
        width: sort keys of the row, a multiple of 4; `k`: how many are chosen.
        each: neighbouring columns of a thread, 8, 16 or 32; `n_threads`: 128, 256, 512 or 1024.
        has_forced: whether some sort keys may be `FORCED`.
        is_full: columns before the limit are all candidates: where k or fewer are, no sort key is looked at.
        is_listed: what columns stand for is listed at $IDS, one by one.
        group: $IDS lists groups of so many neighbouring sort keys of a longer row, which are the columns; 0: it does
            not. 2, 4 or 8. Columns stand for themselves in that row, and so are limited. Each group has a candidate.
        has_sort_keys: whether those of the chosen are written, too, to $SORT_KEYS.
        is_there: sort keys are in shared memory already, each thread's own in a run, `INVISIBLE` for no candidate. The
            limit says no more than with `is_full`.
    """

    width: int
    k: int
    each: int
    n_threads: int
    has_forced: bool = True
    is_full: bool = False
    is_listed: bool = False
    group: int = 0
    has_sort_keys: bool = False
    is_there: bool = False

    # Bytes of shared memory: where each part begins. Parts of warps: range, bins, listed, chosen; two of a
    # bisection; ties.
    hist: int = 0
    parts: int = 4 * BINS + 16  # behind the bins is one for what is in none
    pick: int = parts + 7 * 512
    found: int = pick + 32
    n_listed: int = found + 16
    listed: int = n_listed + 16

    def of_threads(self, n: int) -> "Shape":
        """The same by n threads."""
        return dataclasses.replace(self, n_threads=n, each=max(self.each * self.n_threads // n, 8))

    @property
    def keys(self) -> int:
        return self.listed + 4 * self.n_threads

    @property
    def pitch(self) -> int:
        """Bytes from a thread's sort keys in shared memory to the next thread's."""
        return 4 * self.each + _PAD

    @property
    def smem_bytes(self) -> int:
        return self.keys + self.n_threads * self.pitch

    @property
    def n_warps(self) -> int:
        return self.n_threads // 32


def registers(shape: Shape, n_keys: int = 0) -> str:
    """PTX: the registers that all texts of a row share, and who a thread is. It may hold more sort keys than these."""
    return f""".reg .pred p, q, s; .reg .b32 tid, lane, warp, at, t, u, n, low, high, column, base, rank, pick, c, slot;
.reg .b32 key, v<{max(shape.each, n_keys)}>, b<{shape.each}>, base<8>, h<8>, e, g, thr, lo, hi, middle, room, tie;
.reg .b32 i, visible, total, buffer;
.reg .b64 word; .reg .f32 x, first, last, scale;
mov.u32 tid, %tid.x; and.b32 lane, tid, 31; shr.u32 warp, tid, 5;"""


def threshold_ptx(shape: Shape) -> str:
    """PTX: `thr`, which the k best of the sort keys in registers v reach, and those that tie with the last of them.

    It goes on at a label `emit`. A thread's sort keys are in shared memory, too.
    """
    return f"""{_range(shape)}
{_histogram(shape)}
{pick(shape)}
{_gather(shape)}
{rank_of_listed(shape)}
{_bisect(shape)}"""


def sync(shape: Shape) -> str:
    return f"bar.sync {_BARRIER}, {shape.n_threads};\n"


def each_key(shape: Shape, line: Callable[[int], str]) -> str:
    """A line for each of a thread's sort keys."""
    return "\n".join(line(j) for j in range(shape.each))


def clear_bins(shape: Shape) -> str:
    """An empty histogram; a barrier must follow."""
    n = shape.n_threads
    lines = [f"mov.b32 u, 0; shl.b32 at, tid, 4; add.u32 at, at, $SMEM; setp.lt.u32 p, tid, {BINS // 4};"]
    lines += [f"@p st.shared.v4.b32 [at+{shape.hist + 16 * n * i}], {{u, u, u, u}};" for i in range(-(-BINS // 4 // n))]
    return "\n".join(lines)


def clear_ptx(shape: Shape) -> str:
    """An empty histogram, and a list of nothing; a barrier must follow."""
    lines = [clear_bins(shape)]
    lines.append(
        f"""shl.b32 at, tid, 2; add.u32 at, at, $SMEM; mov.b32 u, {INVISIBLE}; st.shared.b32 [at+{shape.listed}], u;
setp.eq.u32 p, tid, 0; mov.b32 at, $SMEM; mov.b32 u, 0; @p st.shared.b32 [at+{shape.n_listed}], u;"""
    )
    return "\n".join(lines)


def over_warps(shape: Shape, region: int, ops: dict[str, tuple[str, int]]) -> str:
    """PTX: registers -> what all threads' add up to, by `ops`: register -> (operation, what no thread has)."""
    names, at = list(ops), shape.parts + 512 * region
    four = (names + [names[-1]] * 3)[:4]
    reduce = " ".join(f"redux.sync.{op}.s32 {name}, {name}, -1;" for name, (op, _) in ops.items())
    return f"""{reduce}
setp.eq.u32 p, lane, 0; shl.b32 at, warp, 4; add.u32 at, at, $SMEM;
@p st.shared.v4.b32 [at+{at}], {{{", ".join(four)}}};
{sync(shape)}shl.b32 at, lane, 4; add.u32 at, at, $SMEM; setp.lt.u32 p, lane, {shape.n_warps};
{" ".join(f"mov.b32 {name}, {nothing};" for name, (_, nothing) in ops.items())}
@p ld.shared.v4.b32 {{{", ".join(([*names, "h0", "h1", "h2"])[:4])}}}, [at+{at}];
{reduce}"""


def _range(shape: Shape) -> str:
    """Least visible sort key, greatest that is not forced, how many there are of both kinds: some need no search.

    Of at least k listed groups the least greatest is a better bound: none of the k best is below.
    """
    ops = {"low": ("min", FORCED), "high": ("max", INVISIBLE), "n": ("add", 0)}

    def one(j: int) -> str:
        seen = f"setp.ne.s32 p, v{j}, {INVISIBLE}; @p min.s32 low, low, v{j}; @p add.s32 n, n, 1;"
        if not shape.has_forced:
            return f"{seen} max.s32 high, high, v{j};"
        return f"{seen} setp.ne.s32 p, v{j}, {FORCED}; @p max.s32 high, high, v{j}; @!p add.s32 n, n, 65536;"

    bound, lowest = "", "mov.b32 thr, low;"
    if shape.group and shape.width >= shape.k * shape.group:
        size = shape.group
        n_groups = shape.width // size
        # Columns beyond the list and groups that are not there have no part in it.
        for i in range(shape.each // size):
            bound += f"max.s32 t, v{size * i}, v{size * i + 1};"
            bound += "".join(f" max.s32 t, t, v{size * i + u};" for u in range(2, size))
            bound += f" setp.gt.and.s32 p, t, {INVISIBLE}, q; @p min.s32 g, g, t;\n"
        bound = f"""mov.b32 g, {FORCED}; ld.global.b32 u, [$IDS+{4 * n_groups - 4}]; setp.ge.s32 q, u, 0;
{bound}@q mov.b32 low, g;"""
        lowest = f"mov.b32 thr, {INVISIBLE + 1};"
    return f"""mov.b32 low, {FORCED}; mov.b32 high, {INVISIBLE}; mov.b32 n, 0;
{each_key(shape, one)}
{bound}
{over_warps(shape, 0, ops)}
and.b32 visible, n, 65535; shr.u32 n, n, 16; {lowest}
setp.le.s32 p, visible, {shape.k}; @p bra emit;
sub.s32 rank, {shape.k}, n; mov.b32 thr, {FORCED}; setp.le.s32 p, rank, 0; @p bra emit;"""


def _score(sort_key: str, into: str) -> str:
    """PTX: `score_of`; of `INVISIBLE` a NaN."""
    return f"shr.s32 t, {sort_key}, 31; and.b32 t, t, {FORCED}; xor.b32 t, t, {sort_key}; mov.b32 {into}, t;"


def bins_ptx(shape: Shape, otherwise: str) -> str:
    """Bins of equal width from score `low` to `high`; where those are infinite or too close it goes to a label."""
    last_bin = shape.hist + 4 * (BINS + WHOLE) - (1 << 32)
    return f"""{_score("low", "first")} {_score("high", "last")} sub.rn.f32 last, last, first;
setp.gt.f32 p, last, 0f0DA24260; setp.lt.and.f32 p, last, 0f7E967699, p; @!p bra {otherwise};
div.approx.f32 scale, 0f447FC000, last; add.s32 at, $SMEM, {last_bin};"""


def bin_of(sort_key: str, into: str) -> str:
    """PTX: `into`, the bin of a sort key, greater ones of higher scores."""
    # A number added to 2^23 is rounded to a whole one, in its low bits. Bin 0 has what is below all of them, and NaN,
    # of what is forced or has no score: a condition on the addition would be a branch for each.
    return f"""{_score(sort_key, "x")} sub.rn.f32 x, x, first; fma.rn.f32 x, x, scale, 0f4B000001;
max.f32 x, x, 0f4B000000; mov.b32 {into}, x;"""


def count_in(bin: str) -> str:
    """PTX: one more in a bin, by `at` of `bins_ptx`: in memory bins 1, 2, ... are in descending order."""
    return f"mad.lo.s32 t, {bin}, -4, at; red.shared.add.u32 [t], 1;"


def _histogram(shape: Shape) -> str:
    """Scores in bins, which registers b keep. Where bins cannot be had, halving does it alone."""
    return f"""mov.b32 lo, low; mov.b32 hi, high;
{bins_ptx(shape, "bisect")}
{each_key(shape, lambda j: bin_of(f"v{j}", f"b{j}") + count_in(f"b{j}"))}
{sync(shape)}"""


def scan(into: str) -> str:
    """PTX: `into` becomes its sum over this lane and those below."""
    steps = (f"shfl.sync.up.b32 u|p, {into}, {1 << d}, 0, -1; @p add.s32 {into}, {into}, u;" for d in range(5))
    return "\n".join(steps)


def before(shape: Shape, region: int, own: str) -> str:
    """PTX: `e`, the sum of `own` over the threads before this one, and `total`, over all."""
    at = shape.parts + 512 * region
    return f"""mov.b32 e, {own};
{scan("e")}
setp.eq.u32 p, lane, 31; shl.b32 at, warp, 2; add.u32 at, at, $SMEM; @p st.shared.b32 [at+{at}], e;
{sync(shape)}shl.b32 at, lane, 2; add.u32 at, at, $SMEM; setp.lt.u32 p, lane, {shape.n_warps};
mov.b32 u, 0; @p ld.shared.b32 u, [at+{at}];
redux.sync.add.s32 total, u, -1; setp.lt.u32 p, lane, warp; selp.b32 u, u, 0, p; redux.sync.add.s32 u, u, -1;
add.s32 e, e, u; sub.s32 e, e, {own};"""


def pick(shape: Shape) -> str:
    """`pick`, the bin that holds the threshold; `rank`, which of it that is; `c`, how many it has; `total`, of all."""
    each = BINS // shape.n_threads
    load = {1: "ld.shared.b32 h0", 2: "ld.shared.v2.b32 {h0, h1}"}.get(each, "ld.shared.v4.b32 {h0, h1, h2, h3}")
    more = f"ld.shared.v4.b32 {{h4, h5, h6, h7}}, [at+{shape.hist + 16}];" if each == 8 else ""

    def one(i: int) -> str:
        return f"""setp.lt.s32 p, e, rank; add.s32 g, e, h{i}; setp.ge.and.s32 p, g, rank, p; sub.s32 slot, rank, e;
add.s32 pick, c, {i}; @p st.shared.v4.b32 [t+{shape.pick}], {{pick, slot, h{i}, h{i}}}; mov.b32 e, g;"""

    return f"""mul.lo.u32 c, tid, {each}; shl.b32 at, c, 2; add.u32 at, at, $SMEM;
{load}, [at+{shape.hist}]; {more}
mov.b32 n, h0; {" ".join(f"add.s32 n, n, h{i};" for i in range(1, each))}
{before(shape, 1, "n")}
mov.b32 t, $SMEM;
{"".join(one(i) for i in range(each))}
{sync(shape)}mov.b32 t, $SMEM; ld.shared.v4.b32 {{pick, rank, c, u}}, [t+{shape.pick}];
sub.u32 pick, {WHOLE + BINS}, pick;"""


def _gather(shape: Shape) -> str:
    """The bin's sort keys, listed as far as there is one a thread, and their range."""
    ops = {"lo": ("min", FORCED), "hi": ("max", INVISIBLE)}
    mark = each_key(shape, lambda j: f"setp.eq.u32 p, b{j}, pick; @p or.b32 n, n, {1 << j};")
    # Few threads have one: they take it from shared memory, since registers have no index.
    return f"""mov.b32 n, 0;
{mark}
mov.b32 at, $SMEM; mov.b32 lo, {FORCED}; mov.b32 hi, {INVISIBLE}; mul.lo.u32 u, tid, {shape.pitch}; add.u32 u, u, at;
list: setp.ne.u32 p, n, 0; vote.sync.any.pred q, p, -1; @!q bra listed;
bfind.u32 i, n; mov.b32 t, 1; shl.b32 t, t, i; @p xor.b32 n, n, t; shl.b32 t, i, 2; add.u32 t, t, u;
@p ld.shared.b32 key, [t+{shape.keys}]; @p min.s32 lo, lo, key; @p max.s32 hi, hi, key;
@p atom.shared.add.u32 slot, [at+{shape.n_listed}], 1; setp.lt.and.u32 p, slot, {shape.n_threads}, p;
shl.b32 t, slot, 2; add.u32 t, t, at; @p st.shared.b32 [t+{shape.listed}], key; bra list;
listed:
{over_warps(shape, 2, ops)}
setp.gt.u32 p, c, {shape.n_threads}; @p bra bisect;"""


def rank_of_listed(shape: Shape) -> str:
    """A thread, a listed sort key: the one of which fewer than `rank` are greater, and enough not less."""
    compare = "".join(
        f"setp.gt.s32 p, h{i}, key; @p add.s32 g, g, 1; setp.eq.s32 p, h{i}, key; @p add.s32 e, e, 1;\n"
        for i in range(4)
    )
    return f"""shl.b32 t, tid, 2; add.u32 t, t, $SMEM; ld.shared.b32 key, [t+{shape.listed}];
mov.b32 g, 0; mov.b32 e, 0; mov.b32 i, 0; mov.b32 at, $SMEM; shl.b32 t, warp, 5; setp.ge.u32 p, t, c; @p bra compared;
compare: setp.ge.u32 p, i, c; @p bra compared;
ld.shared.v4.b32 {{h0, h1, h2, h3}}, [at+{shape.listed}];
{compare}add.u32 i, i, 4; add.u32 at, at, 16; bra compare;
compared: add.s32 e, e, g; mov.b32 at, $SMEM;
setp.lt.s32 p, g, rank; setp.ge.and.s32 p, e, rank, p; setp.lt.and.u32 p, tid, c, p;
@p st.shared.b32 [at+{shape.found}], key;
{sync(shape)}ld.shared.b32 thr, [at+{shape.found}]; bra emit;"""


def _bisect(shape: Shape) -> str:
    """The threshold between `lo` and `hi` by halving: for bins that many share, as ties do."""
    count = each_key(shape, lambda j: f"setp.ge.s32 p, v{j}, middle; @p add.s32 n, n, 1;")
    # Two buffers in turns: whoever is late still reads the one before.
    return f"""bisect: mov.b32 buffer, 0;
halve: mov.b32 thr, lo; setp.ge.s32 p, lo, hi; @p bra emit;
shr.s32 middle, lo, 1; shr.s32 t, hi, 1; add.s32 middle, middle, t; or.b32 t, lo, hi; and.b32 t, t, 1;
add.s32 middle, middle, t; mov.b32 n, 0;
{count}
redux.sync.add.s32 n, n, -1; setp.eq.u32 p, lane, 0; shl.b32 at, warp, 2; add.u32 at, at, $SMEM; add.u32 at, at, buffer;
@p st.shared.b32 [at+{shape.parts + 512 * 4}], n;
{sync(shape)}shl.b32 at, lane, 2; add.u32 at, at, $SMEM; add.u32 at, at, buffer; setp.lt.u32 p, lane, {shape.n_warps};
mov.b32 n, 0; @p ld.shared.b32 n, [at+{shape.parts + 512 * 4}];
redux.sync.add.s32 n, n, -1; xor.b32 buffer, buffer, 512;
setp.ge.s32 p, n, {shape.k}; @p mov.b32 lo, middle; @!p sub.s32 hi, middle, 1;
setp.eq.s32 p, n, {shape.k}; @p mov.b32 hi, middle; bra halve;"""
