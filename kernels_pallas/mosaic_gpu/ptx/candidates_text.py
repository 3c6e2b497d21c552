"""PTX that chooses the k best of listed candidates, in order, by one CTA: the end of select_groups_text.py.

Candidates are pairs of words in shared memory, a sort key and a column. Each warp has a run of them, 32 at a time.
"""

from hisa_jax.kernels_pallas.mosaic_gpu.ptx.groups_shape import Groups
from hisa_jax.kernels_pallas.mosaic_gpu.ptx.threshold_text import (
    Shape,
    bin_of,
    bins_ptx,
    count_in,
    pick,
    rank_of_listed,
    sync,
)
from hisa_jax.kernels_pallas.sort_key import INVISIBLE


def before_warp(shape: Shape, region: int, other: str | None = None) -> str:
    """PTX: `c` of each warp -> `ahead`, the sum of the warps before it; `total`, of all; `other` of each by lane."""
    at, width = shape.parts + 512 * region, 3 if other else 2
    own, kind, clear = ("{c, " + other + "}", "v2.b32", f"mov.b32 {other}, 0;") if other else ("c", "b32", "")
    return f"""setp.eq.u32 p, lane, 0; shl.b32 at, warp, {width}; add.u32 at, at, $SMEM;
@p st.shared.{kind} [at+{at}], {own};
{sync(shape)}shl.b32 at, lane, {width}; add.u32 at, at, $SMEM; setp.lt.u32 p, lane, {shape.n_warps};
mov.b32 u, 0; {clear} @p ld.shared.{kind} {own.replace("c", "u", 1)}, [at+{at}];
redux.sync.add.s32 total, u, -1; setp.lt.u32 p, lane, warp; selp.b32 u, u, 0, p; redux.sync.add.s32 ahead, u, -1;"""


def _each_candidate(groups: Groups, name: str, body: str, has_column: bool = False) -> str:
    """PTX: a loop over the warp's candidates, whose sort keys are `key`, `INVISIBLE` after the last."""
    load = f"@in ld.shared.v2.b32 {{key, u}}, [slot+{groups.candidates}];"
    if not has_column:
        load = f"@in ld.shared.b32 key, [slot+{groups.candidates}];"
    return f"""mov.b32 i, left; add.u32 slot, left, lane; shl.b32 slot, slot, 3; add.u32 slot, slot, $SMEM;
{name}: setp.ge.s32 p, i, end; @p bra {name}_end;
mov.b32 key, {INVISIBLE}; add.s32 t, i, lane; setp.lt.s32 in, t, end; {load}
{body}
add.s32 i, i, 32; add.u32 slot, slot, 256; bra {name};
{name}_end:"""


def threshold_ptx(groups: Groups) -> str:
    """`thr`, which the k best of the candidates reach, and those that tie with the last of them."""
    shape = groups.maxima
    listing = f"""{bin_of("key", "b0")} setp.eq.u32 p, b0, pick; mov.b32 t, $SMEM;
@p atom.shared.add.u32 u, [t+{shape.n_listed}], 1; shl.b32 u, u, 2; add.u32 u, u, t;
@p st.shared.b32 [u+{shape.listed}], key;"""
    return f"""add.u32 run, total, {shape.n_threads - 1}; shr.u32 run, run, {shape.n_threads.bit_length() - 1};
shl.b32 run, run, 5; mul.lo.u32 left, warp, run; add.u32 end, left, run; min.s32 end, end, total;
mov.b32 thr, least; setp.le.s32 p, total, {shape.k}; setp.eq.or.s32 p, least, high, p; @p bra emit;
mov.b32 low, least;
{bins_ptx(shape, "slow")}
{_each_candidate(groups, "count", bin_of("key", "b0") + count_in("b0"))}
{sync(shape)}mov.b32 rank, {shape.k};
{pick(shape)}
setp.gt.u32 p, c, {shape.n_threads}; @p bra slow;
{_each_candidate(groups, "list", listing)}
{sync(shape)}{rank_of_listed(shape)}"""


def emit_ptx(groups: Groups) -> str:
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
{before_warp(groups.maxima, 4, "n")}
setp.lt.u32 p, lane, warp; selp.b32 rank, n, 0, p; redux.sync.add.s32 rank, rank, -1; sub.s32 room, {k}, total;
{_each_candidate(groups, "write", write, has_column=True)}
setp.eq.u32 p, tid, 0; mov.b32 t, {k}; mov.b64 word, $COUNT; @p st.global.b32 [word], t;"""
