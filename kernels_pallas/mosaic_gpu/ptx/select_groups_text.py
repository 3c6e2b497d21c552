"""The PTX of select_groups.py: the exact top-k of a long row by the greatest of each group of neighbours.

    greatest of each group, in registers -> their range -> a histogram -> the bin of the k-th, its lower edge `least`
        -> groups in that bin and above, listed in order: k tokens reach `least`
        -> their tokens, in registers -> those that reach `least`, listed in order: of normal scores 1.1 k
        -> a histogram of these -> the bin of the k-th -> its sort keys, listed -> `thr` -> o

No group that is left out has one of the k best: its greatest is below k others. Several CTAs, a cluster, may share a
row: each has a part of the groups, and all of them put what reaches `least` into the shared memory of the first, which
goes on alone. Lists are in the order of tokens: a warp has neighbouring columns, a lane four of each 128, and what lanes
and warps before it have says where its own go. Of the last list a lane has one of each 32.

A row that this is not for, of fewer than k groups, infinite scores, or so many ties that a list would be too long, is
left as it is: $DONE is 0 in the first CTA. Names in capitals after a $ are operands (see `scope`). Branches are taken by
all threads of a warp or by none, and but for loops over the last list and what one warp does by all warps.
"""

import dataclasses
from collections.abc import Callable

from hisa_jax.kernels_pallas.mosaic_gpu.ptx.cluster_text import CLUSTER_SYNC, load_table, own_entry, to_all
from hisa_jax.kernels_pallas.mosaic_gpu.ptx.inline import SORT_KEY, scope
from hisa_jax.kernels_pallas.mosaic_gpu.ptx.threshold_text import (
    BINS,
    WHOLE,
    Shape,
    bin_of,
    bins_ptx,
    clear_bins,
    clear_ptx,
    count_in,
    each_key,
    over_warps,
    pick,
    rank_of_listed,
    registers,
    scan,
    sync,
)
from hisa_jax.kernels_pallas.sort_key import FORCED, INVISIBLE

OPERANDS = ("DONE", "X", "MAXIMA", "LIMIT", "O", "COUNT", "SMEM", "SORT_KEYS")
_TOKENS = 32  # sort keys of tokens that a thread holds
_CANDIDATES = 16384  # that the last list has room for


@dataclasses.dataclass(frozen=True, kw_only=True)
class Groups:
    """The static numbers of a row.

    Attributes:
        maxima: the row of groups, of which a thread has shape.each.
        size: tokens a group, 2, 4 or 8.
        n_ctas: that share a row.
        has_sort_keys: whether those of the chosen are written, too, to $SORT_KEYS.
    """

    maxima: Shape
    size: int
    n_ctas: int = 1
    has_sort_keys: bool = False

    def __post_init__(self):
        shape = self.maxima
        if self.n_ctas > 1 and (shape.each * self.size > _TOKENS or self.n_ctas * shape.n_warps % 32):
            raise ValueError(f"{self}: a CTA of several must have room for all its tokens, and whole warps for all warps")

    @property
    def chunk(self) -> int:
        """Neighbouring tokens that a lane loads at a time."""
        return min(self.size, 4)

    @property
    def groups_a_load(self) -> int:
        """That a warp loads at a time."""
        return 32 * self.chunk // self.size

    @property
    def n_loads(self) -> int:
        return _TOKENS // self.chunk

    @property
    def most_groups(self) -> int:
        """That can be listed."""
        return self.maxima.n_warps * self.groups_a_load * self.n_loads

    @property
    def most_candidates(self) -> int:
        return _CANDIDATES

    @property
    def list(self) -> int:
        """Where in shared memory groups are listed; behind them candidates, their sort keys and columns."""
        return self.maxima.keys

    @property
    def candidates(self) -> int:
        return self.list + 4 * self.most_groups

    @property
    def table(self) -> int:
        """Where the CTAs of a row tell each other their ranges; then 32 sums of bins; then how many candidates."""
        return self.candidates + 8 * self.most_candidates

    @property
    def sums(self) -> int:
        return self.table + 8 * self.all_warps

    @property
    def counts(self) -> int:
        return self.sums + 128 * self.n_ctas

    @property
    def all_warps(self) -> int:
        return self.n_ctas * self.maxima.n_warps

    @property
    def smem_bytes(self) -> int:
        return self.table if self.n_ctas == 1 else self.counts + 4 * self.all_warps


def groups_ptx(groups: Groups) -> str:
    """Writes the k best of the first $LIMIT sort keys of a row at $X to $O, ascending; k to $COUNT, 1 to $DONE.

    $MAXIMA has the greatest of each group. Or it writes nothing but 0 to $DONE.
    """
    shape = groups.maxima
    n_words = groups.n_loads // 4
    several = groups.n_ctas > 1
    # The first CTA goes on when all candidates are there.
    alone = "setp.ne.s32 p, cta, 0; @p bra done;" if several else ""
    return scope(
        f"""{registers(shape, _TOKENS)}
.reg .b32 cta, m<8>, far, least, left, run, ahead, end, above, below, sort_key, own<{groups.n_loads}>, n<{n_words}>, e<{n_words}>;
.reg .pred in;
{"mov.u32 cta, %cluster_ctarank;" if several else "mov.b32 cta, 0;"}
{_load_maxima(groups)}
{_range(groups)}
{bins_ptx(shape, "slow")}
{each_key(shape, lambda j: bin_of(f"v{j}", f"b{j}") + count_in(f"b{j}"))}
{sync(shape)}{_pick_of_all(groups) if several else _pick(shape)}
{_LEAST}
{_list_groups(groups)}
{_load_tokens(groups)}
{_list_candidates(groups)}
{alone}
{_threshold(groups)}
emit:
{_emit(groups)}
done: mov.b32 $DONE, 1; bra out;
slow: {sync(shape)}setp.ne.s32 p, cta, 0; selp.b32 t, 1, 0, p; mov.b32 $DONE, t;
out:
""",
        OPERANDS,
    )


def _load_maxima(groups: Groups) -> str:
    """A lane has four neighbouring groups of each 128 of its warp's; `column` is the first."""
    shape = groups.maxima
    chunks = range(shape.each // 4)
    lines = [
        f"""mad.lo.u32 column, cta, {shape.n_warps}, warp; mul.lo.u32 column, column, {32 * shape.each}; shl.b32 t, lane, 2; add.u32 column, column, t;
mul.wide.u32 word, column, 4; add.s64 word, word, $MAXIMA;"""
    ]
    for i in chunks:
        names = [f"v{4 * i + u}" for u in range(4)]
        guard = ""
        if shape.width != groups.n_ctas * shape.n_threads * shape.each:
            guard = "@p "
            lines.append(" ".join(f"mov.b32 {name}, {INVISIBLE};" for name in names))
            lines.append(f"add.u32 t, column, {128 * i}; setp.lt.u32 p, t, {shape.width};")
        lines.append(f"{guard}ld.global.v4.b32 {{{', '.join(names)}}}, [word+{512 * i}];")
    # While they are on their way.
    lines.append(clear_ptx(shape))
    own = each_key(shape, lambda j: f"setp.le.s32 p, t, {128 * (j // 4) + j % 4}; @p mov.b32 v{j}, {INVISIBLE};")
    lines.append(
        f"""add.s32 t, $LIMIT, {groups.size - 1}; shr.s32 t, t, {groups.size.bit_length() - 1};
setp.ge.s32 p, t, {shape.width}; @p bra whole;
sub.s32 t, t, column;
{own}
whole:"""
    )
    return "\n".join(lines)


def _range(groups: Groups) -> str:
    """The least visible sort key, and the greatest."""
    shape, each = groups.maxima, groups.all_warps // 32
    # One less, `INVISIBLE` is the greatest number there is.
    one = lambda j: f"sub.s32 t, v{j}, 1; min.s32 low, low, t; max.s32 high, high, v{j};"  # noqa: E731
    own = f"mov.b32 low, {FORCED}; mov.b32 high, {INVISIBLE};\n{each_key(shape, one)}"
    if groups.n_ctas == 1:
        all_of_them = over_warps(shape, 0, {"low": ("min", FORCED), "high": ("max", INVISIBLE)})
        return f"{own}\n{all_of_them}\nadd.s32 low, low, 1;"
    reduce = "redux.sync.min.s32 low, low, -1; redux.sync.max.s32 high, high, -1;"
    words = [f"m{i}" for i in range(2 * each)]
    join = " ".join(
        f"min.s32 low, low, {a}; max.s32 high, high, {b};" for a, b in zip(words[::2], words[1::2], strict=True)
    )
    return f"""{own}
{reduce}
{own_entry(shape.n_warps, 8)}{to_all(groups.n_ctas, groups.table, ["low", "high"])}
{CLUSTER_SYNC}{load_table(2 * groups.all_warps, groups.table, words)}
{join}
{reduce} add.s32 low, low, 1;"""


def _pick(shape: Shape) -> str:
    """`pick`, the bin of the k-th."""
    return f"mov.b32 rank, {shape.k};\n{pick(shape)}\nsetp.lt.s32 p, total, {shape.k}; @p bra slow;"


def _pick_of_all(groups: Groups) -> str:
    """The same of the bins of all CTAs. Each tells the others sums of 32 bins: one holds the k-th, its bins are read."""
    shape, n = groups.maxima, groups.n_ctas
    each = 32 // shape.n_warps
    sums = "".join(
        f"""mad.lo.u32 c, warp, {each}, {i}; shl.b32 at, c, 7; shl.b32 t, lane, 2; add.u32 at, at, t; add.u32 at, at, $SMEM;
ld.shared.b32 n, [at+{shape.hist}]; redux.sync.add.s32 n, n, -1;
mad.lo.u32 at, cta, 32, c; shl.b32 at, at, 2; add.u32 at, at, $SMEM; {to_all(n, groups.sums, ["n"])}
"""
        for i in range(each)
    )
    # What is in bins before the k-th's.
    place = f"""{scan("e")}
add.s32 e, e, above; setp.lt.s32 p, e, {shape.k}; vote.sync.ballot.b32 t, p, -1; popc.b32 c, t;"""
    add = " ".join(f"add.s32 n, n, h{i};" for i in range(1, n))
    return f"""{sums}{CLUSTER_SYNC}shl.b32 at, lane, 2; add.u32 at, at, $SMEM;
{" ".join(f"ld.shared.b32 h{i}, [at+{groups.sums + 128 * i}];" for i in range(n))}
mov.b32 n, h0; {add} mov.b32 e, n; mov.b32 above, 0;
{place}
setp.ge.s32 p, c, 32; @p bra slow;
setp.ne.s32 p, warp, 0; @p bra picked;
sub.s32 e, e, n; shfl.sync.idx.b32 above, e, c, 31, -1; mov.b32 pick, c; shl.b32 t, pick, 7; add.u32 at, at, t;
{" ".join(f"mov.b32 u, {i}; mapa.shared::cluster.u32 far, at, u; ld.shared::cluster.b32 h{i}, [far+{shape.hist}];" for i in range(n))}
mov.b32 n, h0; {add} mov.b32 e, n;
{place}
mad.lo.u32 pick, pick, 32, c; mov.b32 at, $SMEM; setp.eq.s32 p, lane, 0; @p st.shared.b32 [at+{shape.pick}], pick;
picked:
{sync(shape)}mov.b32 at, $SMEM; ld.shared.b32 pick, [at+{shape.pick}]; sub.u32 pick, {WHOLE + BINS}, pick;"""


# `least`, a sort key below all that are in bin `pick`: half a bin below its lower edge, rounded down.
_LEAST = f"""mov.b32 x, pick; sub.rn.f32 x, x, 0f4B000002; mul.rn.f32 scale, last, 0f3A802008; fma.rm.f32 x, x, scale, first;
{SORT_KEY} mov.b32 least, sort_key;"""


def _chunks(words: int) -> str:
    """PTX: counts n of a lane, a byte each of four loads -> e, of the lanes before it; h, of all; `c`, their sum.

    Bytes do: a lane has 4 of a load at most, a warp 128.
    """
    lines = ["mov.b32 c, 0;"]
    for w in range(words):
        lines.append(
            f"mov.b32 e{w}, n{w};\n{scan(f'e{w}')}\nshfl.sync.idx.b32 h{w}, e{w}, 31, 31, -1; sub.s32 e{w}, e{w}, n{w};"
        )
        lines += [f"{_byte('t', f'h{w}', i)} add.s32 c, c, t;" for i in range(4)]
    return "\n".join(lines)


def _byte(into: str, word: str, i: int) -> str:
    return f"prmt.b32 {into}, {word}, 0, 0x444{i};"


def _place(i: int) -> str:
    """PTX: `at`, how many of the list come before the lane's own of load i; `ahead` goes on to the next load."""
    e, h = f"e{i // 4}", f"h{i // 4}"
    return f"{_byte('at', e, i % 4)} add.u32 at, at, ahead; {_byte('t', h, i % 4)} add.u32 ahead, ahead, t;"


def _before_warp(shape: Shape, region: int, other: str | None = None) -> str:
    """PTX: `c` of each warp -> `ahead`, the sum of the warps before it; `total`, of all; `other` of each by lane."""
    at, width = shape.parts + 512 * region, 3 if other else 2
    own, kind, clear = ("{c, " + other + "}", "v2.b32", f"mov.b32 {other}, 0;") if other else ("c", "b32", "")
    return f"""setp.eq.u32 p, lane, 0; shl.b32 at, warp, {width}; add.u32 at, at, $SMEM; @p st.shared.{kind} [at+{at}], {own};
{sync(shape)}shl.b32 at, lane, {width}; add.u32 at, at, $SMEM; setp.lt.u32 p, lane, {shape.n_warps};
mov.b32 u, 0; {clear} @p ld.shared.{kind} {own.replace("c", "u", 1)}, [at+{at}];
redux.sync.add.s32 total, u, -1; setp.lt.u32 p, lane, warp; selp.b32 u, u, 0, p; redux.sync.add.s32 ahead, u, -1;"""


def _before_warp_of_all(groups: Groups) -> str:
    """The same for the warps of all CTAs."""
    shape, each = groups.maxima, groups.all_warps // 32
    words = [f"m{i}" for i in range(each)]
    own = "".join(
        f"add.s32 total, total, {word}; setp.lt.u32 p, t, e; @p add.s32 ahead, ahead, {word}; add.u32 t, t, 1;\n"
        for word in words
    )
    return f"""{own_entry(shape.n_warps, 4)}{to_all(groups.n_ctas, groups.counts, ["c"])}
{CLUSTER_SYNC}{load_table(groups.all_warps, groups.counts, words)}
mov.b32 total, 0; mov.b32 ahead, 0; mad.lo.u32 e, cta, {shape.n_warps}, warp; mul.lo.u32 t, lane, {each};
{own}redux.sync.add.s32 total, total, -1; redux.sync.add.s32 ahead, ahead, -1;"""


def _list_groups(groups: Groups) -> str:
    """Those in the bin of the k-th and above; `total`, how many this CTA has."""
    shape = groups.maxima
    count = lambda j: f"setp.ge.u32 p, b{j}, pick; @p add.s32 n0, n0, {1 << 8 * (j // 4)};"  # noqa: E731

    def write(i: int) -> str:
        own = (
            f"setp.ge.u32 p, b{4 * i + u}, pick; add.u32 t, column, {128 * i + u}; @p st.shared.b32 [at+{groups.list}], t; "
            "@p add.u32 at, at, 4;"
            for u in range(4)
        )
        return "\n".join([_place(i), "shl.b32 at, at, 2; add.u32 at, at, $SMEM;", *own])

    too_many = "" if groups.n_ctas > 1 else f"setp.gt.s32 p, total, {groups.most_groups}; @p bra slow;"
    return f"""mov.b32 n0, 0;
{each_key(shape, count)}
{_chunks(1)}
{_before_warp(shape, 2)}
{too_many}
{"".join(write(i) for i in range(shape.each // 4))}
{sync(shape)}"""


def _load_tokens(groups: Groups) -> str:
    """A warp has a run of listed groups; `own` is the column of a lane's first token of each load."""
    shape, size, chunk = groups.maxima, groups.size, groups.chunk
    lanes = size // chunk  # of a group
    half = f"and.b32 u, lane, {lanes - 1}; shl.b32 u, u, {chunk.bit_length() - 1};"
    lines = [
        f"""add.u32 run, total, {shape.n_warps - 1}; shr.u32 run, run, {shape.n_warps.bit_length() - 1};
mul.lo.u32 t, warp, run; sub.s32 left, total, t; min.s32 left, left, run; shr.u32 u, lane, {lanes.bit_length() - 1};
sub.s32 left, left, u; add.u32 t, t, u; shl.b32 at, t, 2; add.u32 at, at, $SMEM; {half}"""
    ]

    def load(i: int) -> str:
        n, names = groups.groups_a_load * i, ", ".join(f"v{chunk * i + u}" for u in range(chunk))
        return f"""mov.b32 own{i}, -1; setp.gt.s32 p, left, {n}; @p ld.shared.b32 own{i}, [at+{groups.list + 4 * n}];
mad.lo.s32 own{i}, own{i}, {size}, u; mul.wide.s32 word, own{i}, 4; add.s64 word, word, $X;
@p ld.global.v{chunk}.b32 {{{names}}}, [word];"""

    return "\n".join([*lines, _each_load(groups, load, "asked")])


def _each_load(groups: Groups, line: Callable[[int], str], end: str) -> str:
    """PTX: a line for each load, as far as any warp has groups for it; then goes on at a label."""
    skip = lambda i: f"setp.le.s32 p, run, {groups.groups_a_load * i}; @p bra {end};\n" if i else ""  # noqa: E731
    return "\n".join(skip(i) + line(i) for i in range(groups.n_loads)) + f"\n{end}:"


def _list_candidates(groups: Groups) -> str:
    """Of the tokens of listed groups those that reach `least`."""
    chunk, words, several = groups.chunk, groups.n_loads // 4, groups.n_ctas > 1
    shared = "shared::cluster" if several else "shared"

    def count(i: int) -> str:
        own = [f"v{chunk * i + u}" for u in range(chunk)]
        hide = "\n".join(f"setp.le.s32 p, t, {u}; @p mov.b32 {v}, {INVISIBLE};" for u, v in enumerate(own))
        # Few lanes load what is no group, or has tokens that are beyond the limit.
        return f"""sub.s32 t, $LIMIT, own{i}; setp.ge.s32 p, own{i}, 0; selp.b32 t, t, 0, p; setp.lt.s32 p, t, {chunk};
vote.sync.any.pred q, p, -1; @!q bra all{i};
{hide}
all{i}:
""" + "\n".join(f"setp.ge.s32 p, {v}, least; @p add.s32 n{i // 4}, n{i // 4}, {1 << 8 * (i % 4)};" for v in own)

    def write(i: int) -> str:
        own = (
            f"setp.ge.s32 p, v{chunk * i + u}, least; add.s32 t, own{i}, {u}; "
            f"@p st.{shared}.v2.b32 [at+{groups.candidates}], {{v{chunk * i + u}, t}}; @p add.u32 at, at, 8;"
            for u in range(chunk)
        )
        return "\n".join([_place(i), "shl.b32 at, at, 3; add.u32 at, at, far;", *own])

    # Now all have read this CTA's bins.
    return f"""{" ".join(f"mov.b32 n{w}, 0;" for w in range(words))}
{_each_load(groups, count, "counted")}
{_chunks(words)}
{_before_warp_of_all(groups) if several else _before_warp(groups.maxima, 3)}
setp.gt.s32 p, total, {groups.most_candidates}; @p bra slow;
{clear_bins(groups.maxima)}
{"mov.b32 u, 0; mapa.shared::cluster.u32 far, $SMEM, u;" if several else "mov.b32 far, $SMEM;"}
{_each_load(groups, write, "written")}
{CLUSTER_SYNC if several else sync(groups.maxima)}"""


def _each_candidate(groups: Groups, name: str, body: str, has_column: bool = False) -> str:
    """PTX: a loop over the warp's candidates, whose sort keys are `key`, `INVISIBLE` behind the last."""
    load = f"@in ld.shared.v2.b32 {{key, u}}, [slot+{groups.candidates}];"
    if not has_column:
        load = f"@in ld.shared.b32 key, [slot+{groups.candidates}];"
    return f"""mov.b32 i, left; add.u32 slot, left, lane; shl.b32 slot, slot, 3; add.u32 slot, slot, $SMEM;
{name}: setp.ge.s32 p, i, end; @p bra {name}_end;
mov.b32 key, {INVISIBLE}; add.s32 t, i, lane; setp.lt.s32 in, t, end; {load}
{body}
add.s32 i, i, 32; add.u32 slot, slot, 256; bra {name};
{name}_end:"""


def _threshold(groups: Groups) -> str:
    """`thr`, which the k best of the candidates reach, and those that tie with the last of them."""
    shape = groups.maxima
    listing = f"""{bin_of("key", "b0")} setp.eq.u32 p, b0, pick; mov.b32 t, $SMEM;
@p atom.shared.add.u32 u, [t+{shape.n_listed}], 1; shl.b32 u, u, 2; add.u32 u, u, t; @p st.shared.b32 [u+{shape.listed}], key;"""
    return f"""add.u32 run, total, {shape.n_threads - 1}; shr.u32 run, run, {shape.n_threads.bit_length() - 1}; shl.b32 run, run, 5;
mul.lo.u32 left, warp, run; add.u32 end, left, run; min.s32 end, end, total;
mov.b32 thr, least; setp.le.s32 p, total, {shape.k}; setp.eq.or.s32 p, least, high, p; @p bra emit;
mov.b32 low, least;
{bins_ptx(shape, "slow")}
{_each_candidate(groups, "count", bin_of("key", "b0") + count_in("b0"))}
{sync(shape)}mov.b32 rank, {shape.k};
{pick(shape)}
setp.gt.u32 p, c, {shape.n_threads}; @p bra slow;
{_each_candidate(groups, "list", listing)}
{sync(shape)}{rank_of_listed(shape)}"""


def _emit(groups: Groups) -> str:
    """What is above `thr`, and the first of those at it, as many as there is room for."""
    k = groups.maxima.k
    ballots = """setp.gt.s32 p, key, thr; vote.sync.ballot.b32 above, p, -1;
setp.eq.s32 q, key, thr; vote.sync.ballot.b32 tie, q, -1;"""
    keys = ""
    if groups.has_sort_keys:
        keys = "mul.wide.u32 word, t, 4; add.s64 word, word, $SORT_KEYS; @p st.global.b32 [word], key;"
    # A lane's place: those above before it, and the ties before it that are chosen.
    write = f"""{ballots}
and.b32 t, above, below; popc.b32 t, t; and.b32 e, tie, below; popc.b32 e, e; add.s32 e, e, rank;
setp.lt.and.s32 q, e, room, q; or.pred p, p, q; min.s32 e, e, room; add.s32 t, t, ahead; add.s32 t, t, e;
{keys} mul.wide.u32 word, t, 4; add.s64 word, word, $O; @p st.global.b32 [word], u;
popc.b32 t, above; add.s32 ahead, ahead, t; popc.b32 t, tie; add.s32 rank, rank, t;"""
    return f"""mov.b32 c, 0; mov.b32 n, 0; mov.u32 below, %lanemask_lt;
{_each_candidate(groups, "sum", ballots + " popc.b32 t, above; add.s32 c, c, t; popc.b32 t, tie; add.s32 n, n, t;")}
{_before_warp(groups.maxima, 4, "n")}
setp.lt.u32 p, lane, warp; selp.b32 rank, n, 0, p; redux.sync.add.s32 rank, rank, -1; sub.s32 room, {k}, total;
{_each_candidate(groups, "write", write, has_column=True)}
setp.eq.u32 p, tid, 0; mov.b32 t, {k}; mov.b64 word, $COUNT; @p st.global.b32 [word], t;"""
