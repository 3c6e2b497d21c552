"""The PTX of sketch_loop.py. Names in capitals after a $ are operands: `OPERANDS` lists them.

A code is 4 bits n from 1 to 15, of which 8 stands for 0. A byte that holds n alone is n * 2^-9 in e4m3, so masks of
whole registers are all that unpacking takes; weights make up for the factor. The 8 too many of each number are what
sums begin with, negative: the product of numbers that are all 8, taken once.

Lane 4 g + c of a warp has 16 bytes of token g, those of its group c, and so has them as they are loaded. A product of
the tensor core then sums over four groups at once, which have other scales: so each row of a query is four columns,
one a group, and zero where a number is of another group.
"""

import dataclasses

from hisa_jax.kernels_pallas.mosaic_gpu.ptx.inline import SORT_KEY, scope

OPERANDS = (
    *("CODES", "CODE_SCALES", "K_SCALE", "TABLE", "Q", "W", "O", "SAMPLES"),
    *("SMEM", "ROW", "START", "STEPS", "N_QUERIES"),
)
N_GROUPS, ROW_BYTES = 4, 128  # of heads of 128 numbers in e4m3
STEP = 128  # tokens of a warp-group at a time, 32 a warp: two products of 16
_BARRIER = 8
_ALIGNED = 1024  # bytes: of what is swizzled


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """What the loop's text depends on.

    Attributes:
        queries: of a CTA at most; `rows` of each, of which `n` count and `n_linear` have no relu.
        page_size: tokens of a page, a power of two from 32 on; `n_pages` of them, `table_size` named.
        has_scale: whether tokens have a scale; `out_columns`: sort keys of a row of the result.
        sample_step: every so many tokens' sort keys are written to $SAMPLES, too, a power of two up to 128.
    """

    queries: int
    rows: int
    n: int
    n_linear: int
    page_size: int
    n_pages: int
    table_size: int
    has_scale: bool
    out_columns: int
    sample_step: int

    @property
    def padded(self) -> int:
        """Rows of a query in the product, whole eights."""
        return -(-self.rows // 8) * 8

    @property
    def eights(self) -> int:
        """Of rows, of all queries."""
        return self.queries * self.padded // 8

    @property
    def columns(self) -> int:
        """Of the product: a row and a group each."""
        return 8 * self.eights * N_GROUPS

    @property
    def smem_bytes(self) -> int:
        return self.columns * ROW_BYTES + _ALIGNED


def loop_ptx(shape: Shape) -> str:
    """Sort keys of $STEPS * 128 tokens, from token $START on, of each of $N_QUERIES queries; by one warp-group."""
    octets = N_GROUPS * shape.eights
    own = [(i, b) for i in range(shape.padded // 8) for b in range(2)]  # rows of a query that a lane has
    names = lambda *groups: ", ".join(name for group in groups for name in group)  # noqa: E731
    raw = [f"r{s}_{t}_{j}" for s in range(2) for t in range(4) for j in range(4)]
    scales = [f"z{s}_{t}_{j}" for s in range(2) for t in range(4) for j in range(2)]
    words = names(raw, scales, [f"a{j}_{i}" for j in range(4) for i in range(4)])
    floats = names(
        [f"d{i}" for i in range(4 * octets)],
        [f"e{o}_{b}" for o in range(octets) for b in range(2)],
        [f"w{query}_{i}_{b}" for query in range(shape.queries) for i, b in own],
        [f"f{i}_{b}" for i, b in own],
        [f"s{query}_{t}" for query in range(shape.queries) for t in range(4)],
        [f"g{h}_{j}" for h in range(2) for j in range(N_GROUPS)],
    )
    lines = [
        f""".reg .pred p, is_later, upper1, upper2, is_sample;
.reg .b64 a, desc, o, o_samples, codes, code_scales, k_scale;
.reg .b32 tid, lane, warp, t, u, v, at, smem, low, column, quad, place, index, page, row, done, later, sort_key;
.reg .b32 {words}; .reg .f32 {floats}, x, t0, t1, t2, t3, ks0, ks1;
setp.le.s32 p, $STEPS, 0; @p bra end;
mov.u32 tid, %tid.x; and.b32 tid, tid, 127; and.b32 lane, tid, 31; shr.u32 warp, tid, 5;
and.b32 quad, lane, 3; shr.u32 place, lane, 2; and.b32 t, lane, 1; setp.ne.u32 upper1, t, 0; and.b32 t, lane, 2;
setp.ne.u32 upper2, t, 0;""",
        _first_pages(shape),
        # In the order of what is waited for: page, rows and weights; codes; the next page; its codes.
        _look_up(shape),
        _load_rows(shape),
        _weights(shape, own),
        _found(shape) + _load_codes(0) + _load_scales(shape, 0) + _look_up(shape),
        _place_rows(shape),
        _found(shape) + _load_codes(1) + _load_scales(shape, 1) + _look_up(shape),
        _start(shape, octets),
        f"""mov.b32 done, 0;
again:
{_step(shape, own, 0)}
{_step(shape, own, 1)}
bra again;
end:
""",
    ]
    return scope("\n".join(lines), OPERANDS)


def _first_pages(shape: Shape) -> str:
    """Where a warp's tokens begin, and what its lanes have of them."""
    shift = shape.sample_step.bit_length() - 1
    return f"""shl.b32 t, warp, 5; add.s32 index, $START, t; shl.b32 u, quad, 3; add.u32 u, u, place;
add.s32 t, index, u; mul.wide.u32 o, t, 4; add.s64 o, o, $O; add.s32 index, index, $ROW;
and.b32 v, t, {shape.sample_step - 1}; setp.eq.u32 is_sample, v, 0; shr.u32 v, t, {shift};
mul.wide.u32 o_samples, v, 4; add.s64 o_samples, o_samples, $SAMPLES;
mul.wide.u32 codes, lane, 16; add.s64 codes, codes, $CODES;
mul.wide.u32 code_scales, place, 8; add.s64 code_scales, code_scales, $CODE_SCALES;
mul.wide.u32 k_scale, u, 4; add.s64 k_scale, k_scale, $K_SCALE;"""


def _look_up(shape: Shape) -> str:
    """Asks for the page of the next 32 tokens."""
    shift = shape.page_size.bit_length() - 1
    return f"""shr.u32 t, index, {shift}; min.u32 t, t, {shape.table_size - 1}; mul.wide.u32 a, t, 4;
add.s64 a, a, $TABLE; ld.global.nc.b32 page, [a];"""


def _found(shape: Shape) -> str:
    """The page is there: `row`, where its tokens are; `index` goes on."""
    shift = shape.page_size.bit_length() - 1
    return f"""max.s32 page, page, 0; min.s32 page, page, {shape.n_pages - 1}; and.b32 t, index, {shape.page_size - 1};
shl.b32 row, page, {shift}; add.s32 row, row, t; add.s32 index, index, {STEP};"""


def _load_codes(s: int, guard: str = "") -> str:
    lines = [f"mul.wide.u32 a, row, {N_GROUPS * 16}; add.s64 a, a, codes;"]
    for t in range(4):
        into = ", ".join(f"r{s}_{t}_{j}" for j in range(4))
        lines.append(f"{guard} ld.global.nc.L1::no_allocate.v4.b32 {{{into}}}, [a+{512 * t}];")
    return "\n".join(lines)


def _load_scales(shape: Shape, s: int, guard: str = "") -> str:
    lines = ["mul.wide.u32 a, row, 8; add.s64 a, a, code_scales;"]
    lines += [f"{guard} ld.global.nc.v2.b32 {{z{s}_{t}_0, z{s}_{t}_1}}, [a+{64 * t}];" for t in range(4)]
    if shape.has_scale:
        lines.append(f"mul.wide.u32 a, row, 4; add.s64 a, a, k_scale; {guard} ld.global.nc.f32 ks{s}, [a];")
    return "\n".join(lines)


def _warps_rows(shape: Shape) -> list[tuple[int, int, str]]:
    """Warps take rows in turn: query, first row of four, and PTX for `p`, whether this warp's is there."""
    return [
        (query, i, f"setp.lt.s32 p, warp, {shape.n - i}; setp.gt.and.s32 p, $N_QUERIES, {query}, p;")
        for query in range(shape.queries)
        for i in range(0, shape.n, 4)
    ]


def _load_rows(shape: Shape) -> str:
    """The queries' rows on their way, a word a lane; shared memory is cleared."""
    rows = _warps_rows(shape)
    lines = [
        f""".reg .b32 {", ".join(f"q{query}_{i}" for query, i, _ in rows)};
shl.b32 t, tid, 2; mul.wide.u32 a, t, 1; add.s64 a, a, $Q;"""
    ]
    for query, i, is_there in rows:
        offset = (query * shape.rows + i) * ROW_BYTES
        lines.append(f"{is_there} @p ld.global.nc.b32 q{query}_{i}, [a+{offset}];")
    lines.append(
        f"""add.u32 smem, $SMEM, {_ALIGNED - 1}; and.b32 smem, smem, {-_ALIGNED};
mov.b32 t, 0; shl.b32 at, tid, 4; add.u32 at, at, smem;"""
    )
    lines += [f"st.shared.v4.b32 [at+{i}], {{t, t, t, t}};" for i in range(0, shape.columns * ROW_BYTES, 2048)]
    return "\n".join(lines)


def _place_rows(shape: Shape) -> str:
    """The rows in shared memory: a column for each row and group, zeros where numbers are of other groups.

    Word i of a row is of group c = i / 8, of its low (h = 0) or high bits, word j of 4: it lies in 32 bytes of product
    j, at 16 h + 4 c, where lane c of every four has the codes. Chunks of 16 bytes are swizzled as the tensor core
    reads them.
    """
    # u: the group; v: the chunk of 16 bytes.
    lines = [
        f"""bar.sync {_BARRIER}, 128;
shr.u32 u, lane, 3; and.b32 v, lane, 3; shl.b32 v, v, 1; shr.u32 t, lane, 2; and.b32 t, t, 1; or.b32 v, v, t;"""
    ]
    for query, i, is_there in _warps_rows(shape):
        lines.append(
            f"""mad.lo.u32 column, u, {8 * shape.eights}, warp; add.u32 column, column, {query * shape.padded + i};
and.b32 t, column, 7; xor.b32 t, t, v; shl.b32 t, t, 4; mad.lo.u32 t, column, {ROW_BYTES}, t; mad.lo.u32 t, u, 4, t;
add.u32 t, t, smem; {is_there} @p st.shared.b32 [t], q{query}_{i};"""
        )
    lines.append(
        f"""fence.proxy.async.shared::cta; bar.sync {_BARRIER}, 128;
shr.u32 low, smem, 4; and.b32 low, low, 0x3fff;"""
    )
    return "\n".join(lines)


def _weights(shape: Shape, own: list[tuple[int, int]]) -> str:
    """w: 512 times those of the rows that this lane has, 0 if they do not count; f: what a product is at least."""
    lines = ["shl.b32 u, quad, 1; mul.wide.u32 a, u, 4; add.s64 a, a, $W;"]
    for i, b in own:
        row = 8 * i + b  # and twice the lane's place
        lines.append(f"setp.lt.s32 p, u, {shape.n_linear - row}; selp.f32 f{i}_{b}, 0fFF800000, 0f00000000, p;")
        for query in range(shape.queries):
            lines.append(
                f"""mov.f32 w{query}_{i}_{b}, 0f00000000; setp.lt.s32 p, u, {shape.n - row};
setp.gt.and.s32 p, $N_QUERIES, {query}, p; @p ld.global.nc.f32 w{query}_{i}_{b}, [a+{4 * (query * shape.rows + row)}];
mul.f32 w{query}_{i}_{b}, w{query}_{i}_{b}, 0f44000000;"""
            )
    return "\n".join(lines)


def _start(shape: Shape, octets: int) -> str:
    """What sums begin with."""
    lines = [f"mov.b32 a{j}_{i}, 0x08080808;" for j in range(4) for i in range(4)]
    lines += [f"mov.f32 d{i}, 0f00000000;" for i in range(4 * octets)]
    lines += [_products(shape, octets), "wgmma.wait_group.sync.aligned 0;"]
    lines += [f"neg.f32 e{o}_{b}, d{4 * o + b};" for o in range(octets) for b in range(2)]
    return "\n".join(lines)


def _products(shape: Shape, octets: int) -> str:
    """d += a by the rows, in flight."""
    high = 1 << 30 | 8 * ROW_BYTES >> 4  # 128-byte swizzle, and from eight columns to the next
    d = ", ".join(f"d{i}" for i in range(4 * octets))
    lines = ["setp.eq.b32 p, 0, 0; wgmma.fence.sync.aligned;"]
    for j in range(4):
        a = ", ".join(f"a{j}_{i}" for i in range(4))
        lines.append(
            f"add.u32 t, low, {2 * j}; mov.b64 desc, {{t, {high}}}; wgmma.mma_async.sync.aligned."
            f"m64n{shape.columns}k32.f32.e4m3.e4m3 {{{d}}}, {{{a}}}, desc, p, 1, 1;"
        )
    return "\n".join([*lines, "wgmma.commit_group.sync.aligned;"])


def _step(shape: Shape, own: list[tuple[int, int]], s: int) -> str:
    """128 tokens, of which a warp has 32: those of registers r<s>, which the loads of the step after next then fill."""
    octets = N_GROUPS * shape.eights
    lines = []
    for tile in range(2):
        for j in range(4):
            for h in range(2):
                code = f"r{s}_{2 * tile + h}_{j}"
                lines.append(f"and.b32 a{j}_{h}, {code}, 0x0f0f0f0f; shr.u32 t, {code}, 4;")
                lines.append(f"and.b32 a{j}_{2 + h}, t, 0x0f0f0f0f;")
        lines += [f"mov.f32 d{4 * o + i}, e{o}_{i % 2};" for o in range(octets) for i in range(4)]
        lines.append(_products(shape, octets))
        if tile == 1:
            lines.append("add.s32 later, done, 2; setp.lt.s32 is_later, later, $STEPS;")
            lines += [_found(shape), _load_codes(s, "@is_later"), _look_up(shape)]
        lines += ["wgmma.wait_group.sync.aligned 0;", _sums(shape, own, s, tile)]
    lines.append(_store(shape, s))
    # The scales of this step have been read.
    lines.append(_load_scales(shape, s, "@is_later"))
    lines.append(
        f"""add.s64 o, o, {4 * STEP}; add.s64 o_samples, o_samples, {4 * STEP // shape.sample_step};
add.s32 done, done, 1; setp.ge.s32 p, done, $STEPS; @p bra end;"""
    )
    return "\n".join(lines)


def _sums(shape: Shape, own: list[tuple[int, int]], s: int, tile: int) -> str:
    """s<query>_<t> = sum of w * relu(sum over groups of scale * product), over the rows that this lane has."""
    lines = []
    for h in range(2):
        for j in range(N_GROUPS):
            word = f"z{s}_{2 * tile + h}_{j // 2}"
            bits = f"and.b32 t, {word}, 0xffff0000;" if j % 2 else f"shl.b32 t, {word}, 16;"
            lines.append(f"{bits} mov.b32 g{h}_{j}, t;")
    for query in range(shape.queries):
        for h in range(2):
            total = f"s{query}_{2 * tile + h}"
            for i, b in own:
                for j in range(N_GROUPS):
                    octet = j * shape.eights + query * shape.padded // 8 + i
                    product = f"d{4 * octet + 2 * h + b}, g{h}_{j}"
                    lines.append(f"fma.rn.f32 x, {product}, x;" if j else f"mul.f32 x, {product};")
                lines.append(f"max.NaN.f32 x, x, f{i}_{b};")
                weighted = f"x, w{query}_{i}_{b}"
                is_first = (i, b) == own[0]
                lines.append(
                    f"mul.f32 {total}, {weighted};" if is_first else f"fma.rn.f32 {total}, {weighted}, {total};"
                )
    return "\n".join(lines)


def _store(shape: Shape, s: int) -> str:
    """Sums over the four lanes of a token, each of which keeps one; scale, sort key, store."""
    lines = []
    for query in range(shape.queries):
        v = [f"s{query}_{t}" for t in range(4)]
        lines.append(
            f"""selp.f32 t0, {v[1]}, {v[0]}, upper1; selp.f32 t1, {v[0]}, {v[1]}, upper1;
selp.f32 t2, {v[3]}, {v[2]}, upper1; selp.f32 t3, {v[2]}, {v[3]}, upper1;
shfl.sync.bfly.b32 t1, t1, 1, 0x1f, -1; shfl.sync.bfly.b32 t3, t3, 1, 0x1f, -1;
add.f32 t0, t0, t1; add.f32 t2, t2, t3; selp.f32 t1, t2, t0, upper2; selp.f32 t3, t0, t2, upper2;
shfl.sync.bfly.b32 t3, t3, 2, 0x1f, -1; add.f32 x, t1, t3;"""
        )
        if shape.has_scale:
            lines.append(f"mul.f32 x, x, ks{s};")
        lines.append(SORT_KEY)
        at = 4 * query * shape.out_columns
        lines.append(
            f"""setp.gt.s32 p, $N_QUERIES, {query}; @p st.global.b32 [o+{at}], sort_key;
setp.gt.and.s32 p, $N_QUERIES, {query}, is_sample; @p st.global.b32 [o_samples+{at // shape.sample_step}], sort_key;"""
        )
    return "\n".join(lines)
