"""The PTX of slopes.py: which heads are open at the 32 best of 256 samples of a query, by one warp-group.

Samples are scored as listed tokens are (`listed_loop_text.py`), 64 at a time. A lane keeps a bit for each product,
whether it is positive. The best samples are found as those of a row are (`threshold_text.py`). Then each lane adds up
the bits of those, four heads a word.
"""

import dataclasses

from hisa_jax.kernels_pallas.mosaic_gpu.ptx import threshold_text
from hisa_jax.kernels_pallas.mosaic_gpu.ptx.inline import SORT_KEY, scope
from hisa_jax.kernels_pallas.mosaic_gpu.ptx.listed_loop_text import (
    STEP,
    heads_ptx,
    load_ptx,
    product_ptx,
    rows_ptx,
    sums_ptx,
)
from hisa_jax.kernels_pallas.mosaic_gpu.ptx.listed_loop_text import Shape as Listed
from hisa_jax.kernels_pallas.mosaic_gpu.ptx.threshold_text import before, clear_ptx, registers, sync, threshold_ptx
from hisa_jax.kernels_pallas.scan_samples import N_BEST, N_SAMPLES
from hisa_jax.kernels_pallas.sort_key import INVISIBLE

OPERANDS = ("KEYS", "K_SCALE", "TABLE", "Q", "W", "O", "SMEM", "ROW", "VISIBLE")
_THREADS = 128
_ALIGNED = 1024  # bytes: of what is swizzled
_STEPS = N_SAMPLES // STEP
_CHOSEN = 3  # a place of a sum over threads that no other sum of `threshold_ptx` still has
_WHOLE = 0x4B000000  # 2^23, in float32
_SELECT = threshold_text.Shape(
    width=N_SAMPLES, k=N_BEST, each=N_SAMPLES // _THREADS, n_threads=_THREADS, has_forced=False
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """What the text depends on.

    Attributes:
        listed: how keys are read, in 4 steps.
        is_sample: whether the keys are samples alone, a query's from $ROW on; otherwise they are its sequence.
    """

    listed: Listed
    is_sample: bool

    # Bytes of shared memory, from the heads on.
    @property
    def scores(self) -> int:
        """Sort keys of the samples."""
        return self.listed.rows_at + 4 * _STEPS * STEP

    @property
    def best(self) -> int:
        """Bits, whether a sample is one of the best: of even ones, then of odd ones."""
        return self.scores + 4 * N_SAMPLES

    @property
    def counts(self) -> int:
        """Bytes, how often each head is open, in the order of lanes."""
        return self.best + N_SAMPLES // 8

    @property
    def smem_bytes(self) -> int:
        return _SELECT.smem_bytes + self.counts + self.listed.H + _ALIGNED


def slopes_ptx(shape: Shape) -> str:
    """[H] float32 to $O: at which share of the best samples each head is open."""
    H, listed = shape.listed.H, shape.listed
    words = [f"r{s}_{h}_{j}" for s in range(2) for h in range(2) for j in range(8)]
    words += [name for s in range(_STEPS) for name in _open(H, s)] + [f"count{n}" for n in range(H // 16)]
    floats = [f"d{i}" for i in range(H // 2)] + [f"w{o}_{b}" for o in range(H // 8) for b in range(2)]
    lines = [
        f"""{registers(_SELECT)}
.reg .pred upper, stores; .reg .b64 a, desc, keys;
.reg .b32 v, smem, quad, place, row, other, sort_key, shift, to, i0, i1, {", ".join(words)};
.reg .f32 {", ".join(floats)}, s0, s1, t0, t1, ks0, ks1;
and.b32 quad, lane, 3; shr.u32 place, lane, 2; and.b32 t, lane, 1; setp.ne.u32 upper, t, 0; setp.lt.u32 stores, quad, 2;
mul.wide.u32 keys, quad, 16; add.s64 keys, keys, $KEYS;
add.u32 smem, $SMEM, {_SELECT.smem_bytes + _ALIGNED - 1}; and.b32 smem, smem, {-_ALIGNED};""",
        _samples(shape),
        heads_ptx(listed),
        clear_ptx(_SELECT),
        f"""shl.b32 at, tid, 2; add.u32 at, at, smem; mov.b32 u, 0; setp.lt.u32 p, tid, {H // 4};
@p st.shared.b32 [at+{shape.counts}], u;
fence.proxy.async.shared::cta; {sync(_SELECT)}shr.u32 low, smem, 4; and.b32 low, low, 0x3fff;
shl.b32 t, warp, 4; add.u32 t, t, place; shl.b32 at, t, 2; add.u32 at, at, smem;
and.b32 u, quad, 1; shl.b32 u, u, 5; add.u32 to, at, u;""",
        load_ptx(listed, 0),
        load_ptx(listed, 1),
        *(_step(shape, s) for s in range(_STEPS)),
        sync(_SELECT),
        _own_samples(shape),
        threshold_ptx(_SELECT),
        "emit:",
        _mark(shape),
        _add_up(shape),
        _write(shape),
    ]
    return scope("\n".join(lines), OPERANDS)


def _open(H: int, s: int) -> list[str]:
    """Registers of step s that say which products are positive: of both tokens of a lane in one, if there is room."""
    return [f"open{s}_{r}" for r in range(1 if H <= 64 else 2)]


def _bit(H: int, o: int, r: int, b: int) -> tuple[int, int]:
    """Which of `_open`, and which of its bits, has the product d<4 o + 2 r + b>."""
    return (0, 16 * r + 2 * o + b) if H <= 64 else (r, 2 * o + b)


def _samples(shape: Shape) -> str:
    """Rows of the samples, two a thread: each 2^shift-th token that is seen; of none, any."""
    lines = ["sub.s32 t, $VISIBLE, 1; max.s32 t, t, 0; shr.u32 t, t, 8; bfind.u32 shift, t; add.u32 shift, shift, 1;"]
    for j in range(2):
        row = f"i{j}" if shape.is_sample else "t"
        lines.append(
            f"""add.u32 i{j}, tid, {_THREADS * j}; shl.b32 t, i{j}, shift; setp.lt.s32 p, t, $VISIBLE;
selp.b32 i{j}, {row}, 0, p; add.s32 i{j}, i{j}, $ROW;"""
        )
    return "\n".join([*lines, rows_ptx(shape.listed, range(2))])


def _step(shape: Shape, s: int) -> str:
    """64 samples: their sort keys to shared memory, and which heads are open at them to registers."""
    listed = shape.listed
    H, names = listed.H, _open(listed.H, s)
    lines = [product_ptx(listed, s % 2), *(f"mov.b32 {name}, 0;" for name in names)]
    if listed.has_scale:
        lines.append(f"mov.f32 x, ks{s % 2};")
    if s + 2 < _STEPS:
        lines.append(load_ptx(listed, s % 2))
    for i in range(H // 2):
        word, bit = _bit(H, i // 4, i // 2 % 2, i % 2)
        # The number of a bit that is the sign's, as it is written.
        number = (1 << bit) - (1 << 32 if bit == 31 else 0)
        lines.append(f"setp.gt.f32 p, d{i}, 0f00000000; @p or.b32 {names[word]}, {names[word]}, {number};")
    lines.append(sums_ptx(listed))
    lines.append("mul.f32 x, t0, x;" if listed.has_scale else "mov.f32 x, t0;")
    lines.append(f"{SORT_KEY}\n@stores st.shared.b32 [to+{shape.scores + 4 * STEP * s}], sort_key;")
    return "\n".join(lines)


def _own_samples(shape: Shape) -> str:
    """Two neighbouring samples a thread, as the selection wants them: in registers, and in shared memory, too."""
    lines = [
        f"""shl.b32 t, tid, 3; add.u32 t, t, smem; ld.shared.v2.b32 {{v0, v1}}, [t+{shape.scores}];
mul.lo.u32 at, tid, {_SELECT.pitch}; add.u32 at, at, $SMEM; shl.b32 u, tid, 1;"""
    ]
    for j in range(2):
        lines.append(
            f"""add.u32 t, u, {j}; shl.b32 t, t, shift; setp.lt.s32 p, t, $VISIBLE; selp.b32 v{j}, v{j}, {INVISIBLE}, p;
st.shared.b32 [at+{_SELECT.keys + 4 * j}], v{j};"""
        )
    return "\n".join(lines)


def _mark(shape: Shape) -> str:
    """A bit for each of the best: those above the threshold, and of those that are at it the first."""
    count = "".join(
        f"setp.gt.s32 p, v{j}, thr; @p add.s32 n, n, 1; setp.eq.s32 p, v{j}, thr; @p add.s32 n, n, 65536;\n"
        for j in range(2)
    )
    mark = "".join(
        f"""setp.eq.s32 q, v{j}, thr; setp.lt.and.s32 s, tie, room, q; setp.gt.s32 p, v{j}, thr; or.pred p, p, s;
vote.sync.ballot.b32 b{j}, p, -1; @q add.s32 tie, tie, 1;
"""
        for j in range(2)
    )
    return f"""mov.b32 n, 0;
{count}{before(_SELECT, _CHOSEN, "n")}
and.b32 t, total, 65535; sub.s32 room, {N_BEST}, t; shr.u32 tie, e, 16;
{mark}setp.eq.u32 p, lane, 0; shl.b32 at, warp, 2; add.u32 at, at, smem;
@p st.shared.b32 [at+{shape.best}], b0; @p st.shared.b32 [at+{shape.best + N_SAMPLES // 16}], b1;
{sync(_SELECT)}"""


def _add_up(shape: Shape) -> str:
    """Counts of this lane's heads over all lanes and warps: a byte each, four a word."""
    H = shape.listed.H
    # A lane's tokens of step s are 16 * warp + place and 8 further: bit u of the even or odd ones, and 4 further.
    lines = [
        f"""and.b32 t, place, 1; shl.b32 t, t, 4; add.u32 at, smem, t;
ld.shared.v4.b32 {{h0, h1, h2, h3}}, [at+{shape.best}]; shl.b32 u, warp, 4; add.u32 u, u, place; shr.u32 u, u, 1;"""
    ]
    lines += [f"mov.b32 count{n}, 0;" for n in range(H // 16)]
    for s in range(_STEPS):
        names = _open(H, s)
        lines.append(f"shr.u32 h{s}, h{s}, u;")
        for r in range(2):
            word, shift = names[-1 if r else 0], 16 * r if H <= 64 else 0
            lines.append(f"shr.u32 t, h{s}, {4 * r}; and.b32 t, t, 1; neg.s32 t, t; and.b32 key, {word}, t;")
            for n in range(H // 16):
                # Bit i of four to byte i.
                lines.append(
                    f"""shr.u32 t, key, {shift + 4 * n}; and.b32 t, t, 15; mul.lo.u32 t, t, {0x204081};
and.b32 t, t, {0x01010101}; add.u32 count{n}, count{n}, t;"""
                )
    for n in range(H // 16):
        lines += [
            f"shfl.sync.bfly.b32 t, count{n}, {by}, 0x1f, -1; add.u32 count{n}, count{n}, t;" for by in (4, 8, 16)
        ]
    lines.append(f"setp.lt.u32 p, lane, 4; mul.lo.u32 at, quad, {H // 4}; add.u32 at, at, smem;")
    lines += [f"@p red.shared.add.u32 [at+{shape.counts + 4 * n}], count{n};" for n in range(H // 16)]
    return "\n".join([*lines, sync(_SELECT)])


def _write(shape: Shape) -> str:
    """A head a thread: its count, as a share of the best samples."""
    H = shape.listed.H
    # Head 8 o + 2 quad + b is number 2 o + b of the lanes of its quad.
    return f"""shr.u32 t, tid, 3; shl.b32 t, t, 1; and.b32 u, tid, 1; or.b32 t, t, u; shr.u32 u, tid, 1;
and.b32 u, u, 3; mul.lo.u32 at, u, {H // 4}; shr.u32 u, t, 2; shl.b32 u, u, 2; add.u32 at, at, u; add.u32 at, at, smem;
and.b32 t, t, 3; shl.b32 t, t, 3; setp.lt.u32 p, tid, {H}; mov.b32 u, 0; @p ld.shared.b32 u, [at+{shape.counts}];
shr.u32 u, u, t; and.b32 u, u, 255; or.b32 u, u, {_WHOLE}; mov.b32 x, u; sub.rn.f32 x, x, 0f4B000000;
min.s32 t, visible, {N_BEST}; max.s32 t, t, 1; or.b32 t, t, {_WHOLE}; mov.b32 last, t;
sub.rn.f32 last, last, 0f4B000000;
div.rn.f32 x, x, last; mul.wide.u32 word, tid, 4; add.s64 word, word, $O; @p st.global.f32 [word], x;"""
