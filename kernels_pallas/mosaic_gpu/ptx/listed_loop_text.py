"""The PTX of listed_loop.py. Names in capitals after a $ are operands: `OPERANDS` lists them.

Which byte of a key the tensor core multiplies first is free, as long as heads lie in the same order. So lanes load 16
bytes of a row twice, and these are the operand as they are: step s of four takes word s of both. Heads are put into
shared memory in that order, once.
"""

import dataclasses

from hisa_jax.kernels_pallas.mosaic_gpu.ptx.inline import SORT_KEY, scope
from hisa_jax.kernels_pallas.operands import Operands

OPERANDS = (
    *("KEYS", "K_SCALE", "TABLE", "TOKENS", "Q", "W", "O"),
    *("SMEM", "ROW", "START", "STEPS"),
)
ROW_BYTES = 128  # of a key or a head
STEP = 64  # tokens of a warp-group at a time
_THREADS = 128
_BARRIER = 8
_ALIGNED = 1024  # bytes: of what is swizzled


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """What the loop's text depends on.

    Attributes:
        H: heads, a multiple of 16; `steps`: of 64 tokens at most, an even number.
        page_size: rows of a page, a power of two, `n_pages` of them, `table_size` named; None: rows as they come.
        n_rows: of keys; `capacity`: tokens of a list; `has_scale`: whether keys have one.
    """

    H: int
    steps: int
    page_size: int | None
    n_pages: int
    table_size: int
    n_rows: int
    capacity: int
    has_scale: bool

    @classmethod
    def of(cls, operands: Operands, steps: int, capacity: int) -> "Shape":
        """For these queries and keys."""
        _, _, k, k_scale, pages = operands
        return cls(
            H=operands.q.shape[1],
            steps=steps,
            page_size=None if pages is None else pages.size,
            n_pages=0 if pages is None else pages.n_pages,
            table_size=0 if pages is None else pages.table.shape[0],
            n_rows=k.shape[0],
            capacity=capacity,
            has_scale=k_scale is not None,
        )

    @property
    def rows_at(self) -> int:
        """Where in shared memory the rows of the tokens are, after the heads."""
        return self.H * ROW_BYTES

    @property
    def smem_bytes(self) -> int:
        # Two steps beyond the last are read, and not used.
        return self.rows_at + 4 * (self.steps + 2) * STEP + _ALIGNED


def why_not(H: int, D: int, itemsize: int) -> str | None:
    """None, or why it cannot score H heads of D numbers."""
    if itemsize != 1 or D != ROW_BYTES:
        return f"needs heads of {ROW_BYTES} numbers in 8 bits, not {D} of {8 * itemsize} bits"
    return None if H % 16 == 0 and H <= 128 else f"needs a multiple of 16 heads up to 128, not {H}"


def loop_ptx(shape: Shape) -> str:
    """Sort keys of the tokens that are listed from $START on, $STEPS * 64 of them, by one warp-group."""
    n = range(shape.H // 8)
    words = [f"r{s}_{h}_{j}" for s in range(2) for h in range(2) for j in range(8)]
    floats = [f"d{i}" for i in range(shape.H // 2)] + [f"w{o}_{b}" for o in n for b in range(2)]
    lines = [
        f""".reg .pred p, q, is_later, upper, stores; .reg .b64 a, desc, o, keys;
.reg .b32 tid, lane, warp, t, u, v, at, smem, low, quad, place, row, other, done, later, sort_key, {", ".join(words)};
.reg .f32 {", ".join(floats)}, s0, s1, x, t0, t1, ks0, ks1;
setp.le.s32 p, $STEPS, 0; @p bra end;
mov.u32 tid, %tid.x; and.b32 tid, tid, 127; and.b32 lane, tid, 31; shr.u32 warp, tid, 5;
and.b32 quad, lane, 3; shr.u32 place, lane, 2; and.b32 t, lane, 1; setp.ne.u32 upper, t, 0; setp.lt.u32 stores, quad, 2;
mul.wide.u32 keys, quad, 16; add.s64 keys, keys, $KEYS;
add.u32 smem, $SMEM, {_ALIGNED - 1}; and.b32 smem, smem, {-_ALIGNED};""",
        _rows(shape),
        heads_ptx(shape),
        f"""fence.proxy.async.shared::cta; bar.sync {_BARRIER}, {_THREADS};
shr.u32 low, smem, 4; and.b32 low, low, 0x3fff;
shl.b32 t, warp, 4; add.u32 t, t, place; shl.b32 at, t, 2; add.u32 at, at, smem;
and.b32 u, quad, 1; shl.b32 u, u, 3; add.u32 t, t, u; add.s32 t, t, $START; mul.wide.u32 o, t, 4; add.s64 o, o, $O;
mov.b32 done, 0; setp.gt.s32 is_later, $STEPS, 1;""",
        load_ptx(shape, 0),
        load_ptx(shape, 1, "@is_later"),
        "again:",
        _step(shape, 0),
        _step(shape, 1),
        "bra again;\nend:\n",
    ]
    return scope("\n".join(lines), OPERANDS)


def _rows(shape: Shape) -> str:
    """Where the tokens' keys are, a token a thread, to shared memory: all waits for lists and tables at once."""
    each = range(-(-shape.steps * STEP // _THREADS))
    names = ", ".join(f"i{j}" for j in each)
    lines = [f".reg .b32 {names};"]
    for j in each:
        lines.append(
            f"""add.s32 t, $START, tid; add.s32 t, t, {_THREADS * j}; min.s32 t, t, {shape.capacity - 1};
mul.wide.u32 a, t, 4; add.s64 a, a, $TOKENS; ld.global.nc.b32 i{j}, [a];"""
        )
    # Beyond the end of a list is no token: any row will do.
    lines += [f"max.s32 i{j}, i{j}, 0; add.s32 i{j}, i{j}, $ROW;" for j in each]
    lines.append(rows_ptx(shape, each))
    return "\n".join(lines)


def rows_ptx(shape: Shape, each: range) -> str:
    """Rows of all sequences in registers i<j>, a token a thread -> where they are in k, to shared memory."""
    lines = []
    if shape.page_size is not None:
        shift = shape.page_size.bit_length() - 1
        lines.append(f".reg .b32 {', '.join(f'g{j}' for j in each)};")
        for j in each:
            lines.append(
                f"""shr.u32 t, i{j}, {shift}; min.u32 t, t, {shape.table_size - 1}; mul.wide.u32 a, t, 4;
add.s64 a, a, $TABLE; ld.global.nc.b32 g{j}, [a];"""
            )
        for j in each:
            lines.append(
                f"""max.s32 g{j}, g{j}, 0; min.s32 g{j}, g{j}, {shape.n_pages - 1}; shl.b32 g{j}, g{j}, {shift};
and.b32 i{j}, i{j}, {shape.page_size - 1}; add.s32 i{j}, i{j}, g{j};"""
            )
    lines += [f"min.s32 i{j}, i{j}, {shape.n_rows - 1};" for j in each]
    lines.append("shl.b32 at, tid, 2; add.u32 at, at, smem;")
    lines += [f"st.shared.b32 [at+{shape.rows_at + 4 * _THREADS * j}], i{j};" for j in each]
    return "\n".join(lines)


def heads_ptx(shape: Shape) -> str:
    """Heads to shared memory, 16 bytes a lane, and the weights of this lane's columns to registers.

    Chunk c of the low (h = 0) or high 64 bytes of a row: its word s goes to 32 bytes of step s, at 16 h + 4 c, in
    chunks of 16 bytes that are swizzled as the tensor core reads them.
    """
    each = range(shape.H // 16)
    names = [[f"q{i}_{s}" for s in range(4)] for i in each]
    lines = [
        f""".reg .b32 {", ".join(name for four in names for name in four)};
shl.b32 t, tid, 4; mul.wide.u32 a, t, 1; add.s64 a, a, $Q;"""
    ]
    lines += [f"ld.global.nc.v4.b32 {{{', '.join(names[i])}}}, [a+{16 * ROW_BYTES * i}];" for i in each]
    lines.append("shl.b32 t, quad, 3; mul.wide.u32 a, t, 1; add.s64 a, a, $W;")
    lines += [f"ld.global.nc.v2.f32 {{w{o}_0, w{o}_1}}, [a+{32 * o}];" for o in range(shape.H // 8)]
    # A thread's head is tid / 8, its chunk tid % 8; u: the swizzled half of a chunk's place, v: the rest.
    lines.append(
        f"""shr.u32 t, tid, 3; mul.lo.u32 v, t, {ROW_BYTES}; add.u32 v, v, smem; shl.b32 u, quad, 2; add.u32 v, v, u;
and.b32 u, t, 7; shr.u32 t, tid, 2; and.b32 t, t, 1; xor.b32 u, u, t; shl.b32 u, u, 4;"""
    )
    for s in range(4):
        lines.append(f"xor.b32 t, u, {32 * s}; add.u32 t, t, v;")
        lines += [f"st.shared.b32 [t+{16 * ROW_BYTES * i}], {names[i][s]};" for i in each]
    return "\n".join(lines)


def load_ptx(shape: Shape, s: int, guard: str = "") -> str:
    """The next step's keys on their way: of rows `place` and 8 further, and the scale of the row that is stored."""
    lines = [f"ld.shared.b32 row, [at+{shape.rows_at}]; ld.shared.b32 other, [at+{shape.rows_at + 32}];"]
    for h, name in enumerate(("row", "other")):
        lines.append(f"mul.wide.u32 a, {name}, {ROW_BYTES}; add.s64 a, a, keys;")
        for half in range(2):
            into = ", ".join(f"r{s}_{h}_{4 * half + j}" for j in range(4))
            lines.append(f"{guard} ld.global.nc.L1::no_allocate.v4.b32 {{{into}}}, [a+{64 * half}];")
    if shape.has_scale:
        lines.append(
            f"selp.b32 row, other, row, upper; mul.wide.u32 a, row, 4; add.s64 a, a, $K_SCALE; "
            f"{guard} ld.global.nc.f32 ks{s}, [a];"
        )
    lines.append(f"add.u32 at, at, {4 * STEP};")
    return "\n".join(lines)


def _step(shape: Shape, s: int) -> str:
    """64 tokens, of which a warp has 16: those of registers r<s>, which then take those of the step after next."""
    scale = f"mov.f32 x, ks{s};" if shape.has_scale else ""
    return f"""{product_ptx(shape, s)}
{scale} add.s32 later, done, 2; setp.lt.s32 is_later, later, $STEPS;
{load_ptx(shape, s, "@is_later")}
{sums_ptx(shape)}
{"mul.f32 x, t0, x;" if shape.has_scale else "mov.f32 x, t0;"}
{SORT_KEY}
@stores st.global.b32 [o], sort_key; add.s64 o, o, {4 * STEP};
add.s32 done, done, 1; setp.ge.s32 p, done, $STEPS; @p bra end;"""


def product_ptx(shape: Shape, s: int) -> str:
    """PTX: registers d, the products of the tokens in registers r<s> and all heads.

    Of tokens `place` and 8 further, of heads 2 * quad and the next in each eight: d<4 * eighth + 2 * later + b>.
    """
    d = ", ".join(f"d{i}" for i in range(shape.H // 2))
    high = 1 << 30 | 8 * ROW_BYTES >> 4  # 128-byte swizzle, and from eight heads to the next
    lines = ["wgmma.fence.sync.aligned;"]
    for j in range(4):
        a = ", ".join((f"r{s}_0_{j}", f"r{s}_1_{j}", f"r{s}_0_{4 + j}", f"r{s}_1_{4 + j}"))
        # The first product overwrites the sums: p says whether to add.
        lines.append(
            f"add.u32 t, low, {2 * j}; mov.b64 desc, {{t, {high}}}; setp.{'eq' if j else 'ne'}.b32 p, 0, 0; "
            f"wgmma.mma_async.sync.aligned.m64n{shape.H}k32.f32.e4m3.e4m3 {{{d}}}, {{{a}}}, desc, p, 1, 1;"
        )
    lines.append("wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;")
    return "\n".join(lines)


def sums_ptx(shape: Shape) -> str:
    """PTX: `t0`, the sum over the heads: in lanes 0 and 2 of a quad of the first token, in 1 and 3 of the other."""
    lines = []
    for o in range(shape.H // 8):
        for r in range(2):
            for b in range(2):
                total, product = f"s{r}", f"t0, w{o}_{b}"
                lines.append(f"max.NaN.f32 t0, d{4 * o + 2 * r + b}, 0f00000000;")
                is_first = o == b == 0
                lines.append(f"mul.f32 {total}, {product};" if is_first else f"fma.rn.f32 {total}, {product}, {total};")
    lines.append(
        """selp.f32 t0, s1, s0, upper; selp.f32 t1, s0, s1, upper; shfl.sync.bfly.b32 t1, t1, 1, 0x1f, -1;
add.f32 t0, t0, t1; shfl.sync.bfly.b32 t1, t0, 2, 0x1f, -1; add.f32 t0, t0, t1;"""
    )
    return "\n".join(lines)
