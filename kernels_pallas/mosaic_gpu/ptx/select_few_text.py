"""The PTX of select_few.py: the exact top-k of one row by all threads of a CTA, its sort keys in registers.

They are loaded so that each thread has neighbouring columns, `threshold_text.py` finds the threshold, and each thread
writes what is chosen of its own. Where kernels have just made them, they are in shared memory already.
"""

from collections.abc import Callable

from hisa_jax.kernels_pallas.mosaic_gpu.ptx.inline import scope
from hisa_jax.kernels_pallas.mosaic_gpu.ptx.threshold_text import (
    Shape,
    before,
    clear_ptx,
    each_key,
    registers,
    sync,
    threshold_ptx,
)
from hisa_jax.kernels_pallas.sort_key import INVISIBLE

ROW_OPERANDS = ("COLUMN", "SMEM", "SORT_KEY")
OPERANDS = ("X", "LIMIT", "IDS", "O", "COUNT", "SMEM", "SORT_KEYS")
_CHUNK = 4  # sort keys that a thread loads at a time


def select_ptx(shape: Shape, position: Callable[[], str]) -> str:
    """Writes the k best of a row at $X of $LIMIT sort keys to $O, ascending, then -1; how many to $COUNT.

    Args:
        position: PTX that turns `column`, a thread's first, into `base`, what it stands for; $IDS is a row to look it
            up in. Not of listed columns, nor of listed groups.
    """
    text = f"""{registers(shape)}
{_load_own(shape) if shape.is_there else _load_groups(shape) if shape.group else _load(shape)}
{threshold_ptx(shape)}
emit:
{_emit(shape, position)}
out:
"""
    return scope(text, OPERANDS)


def row_ptx(shape: Shape, n_ctas: int) -> str:
    """Stores $SORT_KEY of $COLUMN in the shared memory of the first of `n_ctas` where a thread finds its own."""
    store = f"st.shared.b32 [at+{shape.keys}], $SORT_KEY;"
    if n_ctas > 1:
        store = f"""mov.b32 t, 0; mapa.shared::cluster.u32 at, at, t;
st.shared::cluster.b32 [at+{shape.keys}], $SORT_KEY;"""
    text = f""".reg .b32 at, t;
shr.u32 t, $COLUMN, {shape.each.bit_length() - 1}; mad.lo.u32 at, t, {shape.pitch - 4 * shape.each}, $SMEM;
shl.b32 t, $COLUMN, 2; add.u32 at, at, t; {store}
"""
    return scope(text, ROW_OPERANDS)


def _load(shape: Shape) -> str:
    """Neighbouring threads load neighbouring sort keys; by shared memory each gets its own run of columns."""
    n, each = shape.n_threads, shape.each
    chunks, per_row = range(each // _CHUNK), each // _CHUNK
    names = lambda i: "{" + ", ".join(f"v{_CHUNK * i + u}" for u in range(_CHUNK)) + "}"  # noqa: E731
    is_ragged = n * each != shape.width
    lines = [f"mul.wide.u32 word, tid, {4 * _CHUNK}; add.s64 word, word, $X; shl.b32 t, tid, 2;"]
    for i in chunks:
        if is_ragged:
            lines += [f"mov.b32 v{_CHUNK * i + u}, {INVISIBLE};" for u in range(_CHUNK)]
            lines.append(f"add.u32 u, t, {_CHUNK * n * i}; setp.lt.u32 p, u, {shape.width};")
        lines.append(f"{'@p ' if is_ragged else ''}ld.global.v4.b32 {names(i)}, [word+{4 * _CHUNK * n * i}];")
    # While they are on their way.
    lines.append(clear_ptx(shape))
    lines.append(
        f"""shr.u32 t, tid, {per_row.bit_length() - 1}; mul.lo.u32 at, t, {shape.pitch}; add.u32 at, at, $SMEM;
and.b32 t, tid, {per_row - 1}; shl.b32 t, t, 4; add.u32 at, at, t;"""
    )
    lines += [f"st.shared.v4.b32 [at+{shape.keys + i * (n // per_row) * shape.pitch}], {names(i)};" for i in chunks]
    lines.append(sync(shape) + f"mul.lo.u32 at, tid, {shape.pitch}; add.u32 at, at, $SMEM;")
    lines += [f"ld.shared.v4.b32 {names(i)}, [at+{shape.keys + 16 * i}];" for i in chunks]
    if shape.is_full:
        lines.append(
            f"""setp.gt.s32 p, $LIMIT, {shape.k}; @p bra scored;
{each_key(shape, lambda j: f"mov.b32 v{j}, 0;")}
scored:"""
        )
    lines.append(
        f"""shl.b32 column, tid, {each.bit_length() - 1};
setp.ge.s32 p, $LIMIT, {shape.width}; @p bra whole;
sub.s32 t, $LIMIT, column;
{each_key(shape, lambda j: f"setp.le.s32 p, t, {j}; @p mov.b32 v{j}, {INVISIBLE};")}
whole:"""
    )
    return "\n".join(lines)


def _load_own(shape: Shape) -> str:
    """What is in shared memory as `_load` leaves it there."""
    lines = [clear_ptx(shape), f"mul.lo.u32 at, tid, {shape.pitch}; add.u32 at, at, $SMEM;"]
    for i in range(0, shape.each, _CHUNK):
        four = ", ".join(f"v{i + u}" for u in range(_CHUNK))
        lines.append(f"ld.shared.v4.b32 {{{four}}}, [at+{shape.keys + 4 * i}];")
    lines.append(f"shl.b32 column, tid, {shape.each.bit_length() - 1};")
    if shape.is_full:
        own = lambda j: f"setp.gt.s32 p, t, {j}; selp.b32 v{j}, 0, {INVISIBLE}, p;"  # noqa: E731
        lines.append(
            f"""setp.gt.s32 p, $LIMIT, {shape.k}; @p bra scored; sub.s32 t, $LIMIT, column;
{each_key(shape, own)}
scored:"""
        )
    if shape.n_threads * shape.each != shape.width:
        # No thread has columns before the end of the row and after it.
        hide = each_key(shape, lambda j: f"@p mov.b32 v{j}, {INVISIBLE};")
        lines.append(f"setp.ge.u32 p, column, {shape.width};\n{hide}")
    return "\n".join([*lines, sync(shape)])


def _load_groups(shape: Shape) -> str:
    """A thread loads whole groups, neighbours of the list: its columns are in order, too.

    The list may be what this CTA has just written.
    """
    size, n = shape.group, shape.width // shape.group
    groups, chunk = shape.each // size, min(size, _CHUNK)
    lines = [
        sync(shape),
        f"mul.wide.u32 word, tid, {4 * groups}; add.s64 word, word, $IDS; mul.lo.u32 t, tid, {groups};",
    ]
    for i in range(groups):
        lines.append(f"mov.b32 base{i}, -1; setp.lt.u32 p, t, {n - i}; @p ld.global.b32 base{i}, [word+{4 * i}];")
    lines.append(clear_ptx(shape))
    for i in range(groups):
        lines.append(
            f"""mul.lo.s32 base{i}, base{i}, {size}; setp.ge.s32 p, base{i}, 0;
mul.wide.s32 word, base{i}, 4; add.s64 word, word, $X;"""
        )
        for u in range(size * i, size * (i + 1), chunk):
            own = [f"v{u + j}" for j in range(chunk)]
            lines += [f"mov.b32 {v}, {INVISIBLE};" for v in own]
            lines.append(f"@p ld.global.v{chunk}.b32 {{{', '.join(own)}}}, [word+{4 * (u - size * i)}];")
    for i in range(groups):
        lines.append(f"sub.s32 t, $LIMIT, base{i};")
        lines += [f"setp.le.s32 p, t, {u}; @p mov.b32 v{size * i + u}, {INVISIBLE};" for u in range(size)]
    lines.append(f"mul.lo.u32 at, tid, {shape.pitch}; add.u32 at, at, $SMEM;")
    for u in range(0, shape.each, _CHUNK):
        four = ", ".join(f"v{u + j}" for j in range(_CHUNK))
        lines.append(f"st.shared.v4.b32 [at+{shape.keys + 4 * u}], {{{four}}};")
    return "\n".join([*lines, sync(shape)])


def _emit(shape: Shape, position: Callable[[], str]) -> str:
    """A thread writes what is chosen of its columns, after what the threads before it choose."""
    k, n = shape.k, shape.n_threads

    def store(j: int) -> str:
        what, keys = f"add.s32 t, base, {j};", ""
        if shape.is_listed or shape.group:
            what = f"mov.b32 t, b{j};"
        if shape.has_sort_keys:
            keys = f"mad.wide.u32 word, slot, 4, $SORT_KEYS; @p st.global.b32 [word], v{j};"
        return f"""{what} mad.wide.u32 word, slot, 4, $O; @p st.global.b32 [word], t; {keys}
@p add.s32 slot, slot, 1;"""

    def count(j: int) -> str:
        return f"setp.gt.s32 p, v{j}, thr; @p add.s32 n, n, 1; setp.eq.s32 p, v{j}, thr; @p add.s32 n, n, 65536;"

    def write(j: int) -> str:
        return f"""setp.eq.s32 q, v{j}, thr; setp.lt.and.s32 s, tie, room, q; setp.gt.s32 p, v{j}, thr; or.pred p, p, s;
{store(j)} @q add.s32 tie, tie, 1;"""

    find = "" if shape.group else position()
    if shape.is_listed:
        # All on their way before the first is stored.
        each = each_key(shape, lambda j: f"setp.ge.s32 p, v{j}, thr; @p ld.global.b32 b{j}, [word+{4 * j}];")
        find = f"mul.wide.u32 word, column, 4; add.s64 word, word, $IDS;\n{each}"
    elif shape.group:
        find = each_key(shape, lambda j: f"add.s32 b{j}, base{j // shape.group}, {j % shape.group};")
    empty = "mul.wide.s32 word, t, 4; add.s64 word, word, $O; @p st.global.b32 [word], u;"
    if shape.has_sort_keys:
        empty += f" mul.wide.s32 word, t, 4; add.s64 word, word, $SORT_KEYS; @p st.global.b32 [word], {INVISIBLE};"

    # Where more than k reach the threshold, the first of those that are at it are chosen, as many as there is room for:
    # both kinds are counted, those above in the low half.
    return f"""mov.b32 n, 0;
{each_key(shape, lambda j: f"setp.ge.s32 p, v{j}, thr; @p add.s32 n, n, 1;")}
{before(shape, 3, "n")}
{find}
mov.b32 slot, e; setp.gt.s32 p, total, {k}; @p bra ties;
{each_key(shape, lambda j: f"setp.ge.s32 p, v{j}, thr; {store(j)}")}
bra fill;
ties: mov.b32 n, 0;
{each_key(shape, count)}
{before(shape, 6, "n")}
and.b32 t, total, 65535; sub.s32 room, {k}, t; shr.u32 tie, e, 16; and.b32 slot, e, 65535; min.s32 t, tie, room;
add.s32 slot, slot, t;
{each_key(shape, write)}
fill: min.s32 c, visible, {k}; setp.eq.u32 p, tid, 0; mov.b64 word, $COUNT; @p st.global.b32 [word], c;
mov.b32 i, 0; mov.b32 u, -1;
more: setp.ge.s32 p, c, {k}; @p bra out; setp.ge.s32 p, i, {k}; @p bra out;
add.s32 t, tid, i; setp.ge.s32 p, t, c; setp.lt.and.s32 p, t, {k}, p;
{empty} add.s32 i, i, {n}; bra more;"""
