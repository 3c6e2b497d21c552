"""The PTX of select_groups.py: the exact top-k of a long row by the greatest of each group of neighbours.

    greatest of each group, in registers -> their range -> a histogram -> the bin of the k-th, its lower edge `least`
        -> groups in that bin and above, listed in order: k tokens reach `least`
        -> their tokens, in registers -> those that reach `least`, listed in order: of normal scores 1.1 k
        -> a histogram of these -> the bin of the k-th -> its sort keys, listed -> `thr` -> o

No group that is left out has one of the k best: its greatest is below k others. Several CTAs, a cluster, may share a
row: each has a part of the groups, and all of them put what reaches `least` into the shared memory of the first, which
goes on alone. Lists are in the order of tokens: a warp has neighbouring columns, a lane four of each 128, and what
lanes and warps before it have says where its own go. Of the last list a lane has one of each 32.

A row that this is not for, of fewer than k groups, infinite scores, or so many ties that a list would be too long, is
left as it is: $DONE is 0 in the first CTA. Names in capitals after a $ are operands (see `scope`). Branches are taken
by all threads of a warp or by none, and but for loops over the last list and what one warp does by all warps.
"""

from collections.abc import Callable

from hisa_jax.kernels_pallas.mosaic_gpu.ptx.candidates_text import before_warp, emit_ptx, threshold_ptx
from hisa_jax.kernels_pallas.mosaic_gpu.ptx.cluster_text import CLUSTER_SYNC, load_table, own_entry, to_all
from hisa_jax.kernels_pallas.mosaic_gpu.ptx.groups_shape import TOKENS, Groups
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
    registers,
    scan,
    sync,
)
from hisa_jax.kernels_pallas.sort_key import FORCED, INVISIBLE

OPERANDS = ("DONE", "X", "MAXIMA", "LIMIT", "O", "COUNT", "SMEM", "SORT_KEYS")


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
        f"""{registers(shape, TOKENS)}
.reg .b32 cta, m<8>, far, least, left, run, ahead, end, above, below, sort_key;
.reg .b32 own<{groups.n_loads}>, n<{n_words}>, e<{n_words}>;
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
{threshold_ptx(groups)}
emit:
{emit_ptx(groups)}
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
        f"""mad.lo.u32 column, cta, {shape.n_warps}, warp; mul.lo.u32 column, column, {32 * shape.each};
shl.b32 t, lane, 2; add.u32 column, column, t;
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
    """The same of the bins of all CTAs: they exchange sums of 32, and read the 32 that hold the k-th."""
    shape, n = groups.maxima, groups.n_ctas
    each = 32 // shape.n_warps
    sums = "".join(
        f"""mad.lo.u32 c, warp, {each}, {i}; shl.b32 at, c, 7; shl.b32 t, lane, 2;
add.u32 at, at, t; add.u32 at, at, $SMEM;
ld.shared.b32 n, [at+{shape.hist}]; redux.sync.add.s32 n, n, -1;
mad.lo.u32 at, cta, 32, c; shl.b32 at, at, 2; add.u32 at, at, $SMEM; {to_all(n, groups.sums, ["n"])}
"""
        for i in range(each)
    )
    # What is in bins before the k-th's.
    place = f"""{scan("e")}
add.s32 e, e, above; setp.lt.s32 p, e, {shape.k}; vote.sync.ballot.b32 t, p, -1; popc.b32 c, t;"""
    add = " ".join(f"add.s32 n, n, h{i};" for i in range(1, n))
    read = "\n".join(
        f"mov.b32 u, {i}; mapa.shared::cluster.u32 far, at, u; ld.shared::cluster.b32 h{i}, [far+{shape.hist}];"
        for i in range(n)
    )
    return f"""{sums}{CLUSTER_SYNC}shl.b32 at, lane, 2; add.u32 at, at, $SMEM;
{" ".join(f"ld.shared.b32 h{i}, [at+{groups.sums + 128 * i}];" for i in range(n))}
mov.b32 n, h0; {add} mov.b32 e, n; mov.b32 above, 0;
{place}
setp.ge.s32 p, c, 32; @p bra slow;
setp.ne.s32 p, warp, 0; @p bra picked;
sub.s32 e, e, n; shfl.sync.idx.b32 above, e, c, 31, -1; mov.b32 pick, c; shl.b32 t, pick, 7; add.u32 at, at, t;
{read}
mov.b32 n, h0; {add} mov.b32 e, n;
{place}
mad.lo.u32 pick, pick, 32, c; mov.b32 at, $SMEM; setp.eq.s32 p, lane, 0; @p st.shared.b32 [at+{shape.pick}], pick;
picked:
{sync(shape)}mov.b32 at, $SMEM; ld.shared.b32 pick, [at+{shape.pick}]; sub.u32 pick, {WHOLE + BINS}, pick;"""


# `least`, a sort key below all that are in bin `pick`: half a bin below its lower edge, rounded down.
_LEAST = f"""mov.b32 x, pick; sub.rn.f32 x, x, 0f4B000002; mul.rn.f32 scale, last, 0f3A802008;
fma.rm.f32 x, x, scale, first;
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
            f"setp.ge.u32 p, b{4 * i + u}, pick; add.u32 t, column, {128 * i + u}; "
            f"@p st.shared.b32 [at+{groups.list}], t; @p add.u32 at, at, 4;"
            for u in range(4)
        )
        return "\n".join([_place(i), "shl.b32 at, at, 2; add.u32 at, at, $SMEM;", *own])

    too_many = "" if groups.n_ctas > 1 else f"setp.gt.s32 p, total, {groups.most_groups}; @p bra slow;"
    return f"""mov.b32 n0, 0;
{each_key(shape, count)}
{_chunks(1)}
{before_warp(shape, 2)}
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
{_before_warp_of_all(groups) if several else before_warp(groups.maxima, 3)}
setp.gt.s32 p, total, {groups.most_candidates}; @p bra slow;
{clear_bins(groups.maxima)}
{"mov.b32 u, 0; mapa.shared::cluster.u32 far, $SMEM, u;" if several else "mov.b32 far, $SMEM;"}
{_each_load(groups, write, "written")}
{CLUSTER_SYNC if several else sync(groups.maxima)}"""
