"""The PTX of score_loop.py. Names in capitals after a $ are operands: `OPERANDS` lists them.

Text of one query, in order: wait for its slot; load its weights; products of half 0 and of half 1, in flight together;
relu, weigh and sum half 0 meanwhile; hand the slot back; sum half 1; shuffle, scale, compare, store. With 128 heads
there are four products, two at a time. Of 32 heads a slot holds those of two queries, which share all this but the
shuffles and what follows them. Where a slot holds the few heads of a group, score_groups_text.py sums and stores.
"""

from hisa_jax.kernels_pallas.mosaic_gpu.ptx import score_groups_text as groups
from hisa_jax.kernels_pallas.mosaic_gpu.ptx.inline import SORT_KEY
from hisa_jax.kernels_pallas.mosaic_gpu.ptx.score_shape import KEYS_PER_WARPGROUP, Shape
from hisa_jax.kernels_pallas.sort_key import FORCED, INVISIBLE

# What the loop's $NAMEs stand for: shared-memory addresses, then counts, then addresses in device memory.
OPERANDS = (
    *("KEYS", "K_FREE", "SCALES", "Q", "W", "FULL", "FREE", "PIN"),
    *("COUNT", "BEFORE", "CANDIDATE"),
    *("LIMITS", "O", "THRESHOLDS", "MASKS", "MAXIMA"),
)


def loop_ptx(shape: Shape) -> str:
    """The loop over COUNT >= 1 queries, or groups of them; BEFORE counts slots.

    Two products of a query are in flight at a time, none from one query to the next: ptxas serializes all products
    where an accumulator in flight crosses the loop's end (or takes two dummy products a query to be talked out of it,
    which was no faster).
    """
    # Registers: a<half>_ are keys, d<half>_ accumulators, w weights of this thread's columns, s<half>_<row> sums.
    a = [[f"a{half}_{i}" for i in range(4 * shape.steps * shape.n_parts)] for half in range(2)]
    acc = [[f"d{half}_{i}" for i in range(shape.n // 2)] for half in range(2)]
    weights = [f"w{i}" for i in range(shape.n // 4)]
    is_grouped = shape.rows is not None
    lines = [
        f"""{{.reg .pred p, more, leads; .reg .b64 desc, out; .reg .b32 {", ".join(a[0] + a[1])};
.reg .f32 {", ".join(acc[0] + acc[1] + weights)};
.reg .b32 lane, t, u, at, swizzled, j, slot, parity, q_lo, w_slot, w_at, full, free, candidate, column, pin, zero;
{groups.declarations(shape) if is_grouped else _declarations(shape)}""",
        # 0 on every device, but ptxas does not know: else it would leave out what is multiplied by it.
        "mov.u32 zero, %smid; shr.u32 zero, zero, 16;",
        f"mov.u32 pin, %tid.x; and.b32 pin, pin, 127; mad.lo.u32 pin, pin, {4 * shape.pin_words}, $PIN;",
        _load_keys(shape, a),
        groups.start(shape) if is_grouped else _start(shape),
        _hand_back(shape, a),
        f"again: {_next_query(shape)}",
        _weights(shape, 0),
        *(_product(shape, a, acc, unit) for unit in shape.units[:2]),
    ]
    for i, (half, heads) in enumerate(shape.units):
        if half == 0 and heads > 0:
            lines.append(_weights(shape, heads))
        is_final = i + 1 == len(shape.units)
        if is_final:
            lines += [groups.load_queries(shape)] if is_grouped else []
            lines.append(_pin(shape))
        lines.append(f"wgmma.wait_group.sync.aligned {0 if is_final else 1};")
        if is_final:
            # The tensor core has read all heads, and the rest is in registers: the slot may be filled again. Weights
            # are, or the sums before this would not be there.
            lines.append(_arrive("free", groups.loaded_of_queries(shape) if is_grouped else []))
        lines.append(groups.sum_half(shape, acc[half], half) if is_grouped else _sum(shape, acc[half], half, heads))
        if i + 2 < len(shape.units):
            lines.append(_product(shape, a, acc, shape.units[i + 2]))
    lines.append(f"add.s32 j, j, {shape.together}; setp.lt.s32 more, j, $COUNT;")
    lines += [groups.store(shape) if is_grouped else _store(shape), "@more bra again;}"]
    return "\n".join(lines)


def _sums(shape: Shape) -> list[str]:
    """Registers of the sums: row r of a half of the keys, by query i of the slot."""
    return [f"s{half}_{r}_{i}" for half in range(2) for r in range(2) for i in range(shape.together)]


def _declarations(shape: Shape) -> str:
    each = range(shape.together)
    words = [f"{name}{i}" for name in ("limit", "threshold") for i in each]
    predicates = ["upper1", "upper2", *(f"there{i}" for i in each if i > 0)]
    return f""".reg .pred {", ".join(predicates)}; .reg .b64 limits, o, thresholds, masks, maxima;
.reg .f32 {", ".join(_sums(shape))}, t0, t1, t2, t3, x, scale;
.reg .b32 {", ".join(words)}, sort_key, below;"""


def _load_keys(shape: Shape, a: list[list[str]]) -> str:
    """Keys to registers: matrix row (half, warp, 8 * r + g) is key 32 * warp + 4 * g + half + 2 * r."""
    # Lane i gives the address of row i % 8 of matrix i // 8: r is bit 3, the 16-byte half of the step bit 4.
    lines = [
        """mov.u32 lane, %laneid; mov.u32 t, %tid.x; shr.u32 t, t, 5; and.b32 t, t, 3; shl.b32 t, t, 5;
and.b32 u, lane, 7; shl.b32 u, u, 2; add.u32 t, t, u; shr.u32 u, lane, 2; and.b32 u, u, 2; add.u32 t, t, u;"""
    ]
    for half in range(2):
        if half:
            lines.append("add.u32 t, t, 1;")
        if shape.pitch:
            lines.append(f"mad.lo.u32 at, t, {shape.pitch}, $KEYS; shr.u32 u, lane, 4; mad.lo.u32 at, u, 16, at;")
            lines += [_load_matrices(a[half], i, f"at+{32 * i}") for i in range(shape.steps * shape.n_parts)]
            continue
        swizzle = "and.b32 u, t, 7;" if shape.line == 128 else "shr.u32 u, t, 1; and.b32 u, u, 3;"
        lines.append(
            f"""shr.u32 at, t, 3; mul.lo.u32 at, at, {8 * shape.row_bytes}; add.u32 at, at, $KEYS;
and.b32 u, t, 7; mad.lo.u32 at, u, {shape.line}, at;
{swizzle} shr.u32 swizzled, lane, 4; xor.b32 swizzled, swizzled, u; shl.b32 swizzled, swizzled, 4;"""
        )
        for part in range(shape.n_parts):
            for step in range(shape.steps):
                column, within = divmod(32 * step, shape.line)
                offset = part * KEYS_PER_WARPGROUP * shape.row_bytes + column * 8 * shape.line
                lines.append(f"xor.b32 u, swizzled, {within}; add.u32 u, u, at;")
                lines.append(_load_matrices(a[half], part * shape.steps + step, f"u+{offset}"))
    return "\n".join(lines)


def _load_matrices(a: list[str], i: int, address: str) -> str:
    return f"ldmatrix.sync.aligned.m8n8.x4.shared.b16 {{{', '.join(a[4 * i : 4 * i + 4])}}}, [{address}];"


def _start(shape: Shape) -> str:
    """What stays the same for all queries, and the limits (and thresholds) of the first slot."""
    # What passes of a warp's 32 columns is written side by side: no lane has a place of its own.
    lines = [
        f"""mov.u32 j, 0;
and.b32 t, lane, 1; setp.ne.u32 upper1, t, 0; and.b32 t, lane, 2; setp.ne.u32 upper2, t, 0;
mov.u32 u, %tid.x; and.b32 u, u, {KEYS_PER_WARPGROUP - 1}; add.u32 candidate, u, $CANDIDATE;
{"and.b32 t, u, -32;" if shape.filters else "mov.b32 t, u;"} mul.wide.u32 o, t, 4; add.u64 o, o, $O;
mov.b64 limits, $LIMITS; ld.global.b32 limit0, [limits];"""
    ]
    if shape.has_scale:
        lines.append("shl.b32 t, u, 2; add.u32 t, t, $SCALES; ld.shared.f32 scale, [t];")
    if shape.filters:
        lines.append(
            """mov.b64 thresholds, $THRESHOLDS; ld.global.b32 threshold0, [thresholds]; setp.eq.u32 leads, lane, 0;
shr.u32 t, u, 5; mul.wide.u32 masks, t, 4; add.u64 masks, masks, $MASKS; mov.u32 below, %lanemask_lt;"""
        )
    if n := shape.maxima_of:
        lines.append(
            f"""and.b32 t, lane, {n - 1}; setp.eq.u32 leads, t, 0; shr.u32 t, u, {n.bit_length() - 1};
mul.wide.u32 maxima, t, 4; add.u64 maxima, maxima, $MAXIMA;"""
        )
    return "\n".join([*lines, _ask_others(shape)])


def _ask_others(shape: Shape) -> str:
    """Limits and thresholds of the slot's queries after the first, as far as there are any."""
    lines = []
    for i in range(1, shape.together):
        lines.append(f"add.s32 t, j, {i}; setp.lt.s32 p, t, $COUNT;")
        names = ("limit", "threshold") if shape.filters else ("limit",)
        lines += [f"@p ld.global.b32 {name}{i}, [{name}s+{4 * i}];" for name in names]
    return "\n".join(lines)


def _hand_back(shape: Shape, a: list[list[str]]) -> str:
    """The tile goes back once all of it is in registers."""
    loaded = [*a[0], *a[1]]
    if shape.has_scale:
        loaded += ["scale"] if shape.rows is None else groups.scales(shape)
    return _arrive("$K_FREE", loaded)


def _arrive(barrier: str, loaded: list[str]) -> str:
    """Arrives when what was loaded from shared memory is in registers: the copy engine may write there next.

    An arrival is not ordered after the thread's own loads. A load that waits for a burst of copies then reads what
    is written next: at 1M, with 8 rows a query, 1 word in 100 of the last seven slots before a new tile of keys. So
    the barrier's address takes all that was loaded, times `zero`. (A shift of COUNT once stood for it, which is 1 where
    a call has one query: ptxas left all of it out, and a query of 256K keys in one sequence got wrong scores.)
    """
    # In four chains: one of 65 operations would be a fifth of the time that few queries take with a tile.
    chains = ("t", "u", "at", "swizzled")[: len(loaded)]
    lines = [f"mov.b32 {chain}, {register};" for chain, register in zip(chains, loaded, strict=False)]
    lines += [f"xor.b32 {chains[i % 4]}, {chains[i % 4]}, {register};" for i, register in enumerate(loaded) if i > 3]
    lines += [f"xor.b32 t, t, {chain};" for chain in chains[1:]]
    lines.append(f"and.b32 t, t, zero; add.u32 t, t, {barrier};" if loaded else f"mov.b32 t, {barrier};")
    # 128 a warp-group, as Pallas counts arrivals.
    return "\n".join([*lines, "mbarrier.arrive.release.cta.shared::cta.b64 _, [t], 1;"])


def _next_query(shape: Shape) -> str:
    """Slot, phase and descriptor of query j; then waits for it."""
    # The ring is a power of two: slot and parity of a phase are bits of how many slots this warp-group has met.
    laps = shape.ring.bit_length() - 1
    nth = "add.u32 t, j, $BEFORE;"
    if shape.together > 1:
        nth = f"shr.u32 t, j, {shape.together.bit_length() - 1}; add.u32 t, t, $BEFORE;"
    return f"""{nth}
and.b32 slot, t, {shape.ring - 1}; shr.u32 parity, t, {laps}; and.b32 parity, parity, 1;
mad.lo.u32 q_lo, slot, {shape.columns * shape.row_bytes}, $Q; shr.u32 q_lo, q_lo, 4; and.b32 q_lo, q_lo, 0x3fff;
shl.b32 t, slot, 3; add.u32 full, t, $FULL; add.u32 free, t, $FREE;
wait: mbarrier.try_wait.parity.shared::cta.b64 p, [full], parity, 10000000; @p bra ready; bra wait;
ready: mad.lo.u32 w_slot, slot, {4 * shape.w_words}, $W;
and.b32 t, lane, 3; shl.b32 t, t, 3; add.u32 w_at, w_slot, t;"""


def _weights(shape: Shape, heads: int) -> str:
    return "\n".join(
        f"ld.shared.v2.f32 {{w{2 * o}, w{2 * o + 1}}}, [w_at+{32 * o + 4 * shape.n * heads}];"
        for o in range(shape.n // 8)
    )


def _product(shape: Shape, a: list[list[str]], acc: list[list[str]], unit: tuple[int, int]) -> str:
    """acc[half] = half of the keys by a run of heads, in flight."""
    half, heads = unit
    # The heads are a matrix descriptor: the swizzle's code, the stride of groups of eight rows, the address / 16.
    swizzle = {128: 1, 64: 2}[shape.line]
    high = swizzle << 30 | 8 * shape.row_bytes >> 4  # of the descriptor: from eight rows to the next
    kind = f"m64n{shape.n}k32.f32.e4m3.e4m3" if shape.is_e4m3 else f"m64n{shape.n}k16.f32.bf16.bf16"
    ends = "1, 1" if shape.is_e4m3 else "1, 1, 0"
    lines = ["wgmma.fence.sync.aligned;"]
    for part in range(shape.n_parts):
        for step in range(shape.steps):
            column, within = divmod(32 * step, shape.line)
            offset = heads * shape.n * shape.row_bytes + column * 8 * shape.line + within
            first = 4 * (part * shape.steps + step)
            # The first product of a sum overwrites the accumulator: p says whether to add.
            adds = f"setp.{'ne' if part == step == 0 else 'eq'}.b32 p, 0, 0;"
            lines.append(
                f"add.u32 t, q_lo, {offset >> 4}; mov.b64 desc, {{t, {high}}}; {adds} "
                f"wgmma.mma_async.sync.aligned.{kind} {{{', '.join(acc[half])}}}, "
                f"{{{', '.join(a[half][first : first + 4])}}}, desc, p, {ends};"
            )
    return "\n".join([*lines, "wgmma.commit_group.sync.aligned;"])


def _sum(shape: Shape, acc: list[str], half: int, heads: int) -> str:
    """s<half>_<r>_<i> (+)= sum_h w[h] * relu(acc): a thread has rows g and g + 8, columns 8 * o + 2 * c (+ 1)."""
    lines = []
    for nth, register in enumerate(acc):
        octet, r, column = nth // 4, nth // 2 % 2, nth % 2
        i, head = divmod(shape.n * heads + 8 * octet + column, shape.H)
        weight, total = f"w{2 * octet + column}", f"s{half}_{r}_{i}"
        # Into a register of its own: writing to an accumulator would serialize all products, too.
        lines.append(f"max.NaN.f32 x, {register}, 0f00000000;")
        lines.append(f"mul.f32 {total}, x, {weight};" if head == 0 else f"fma.rn.f32 {total}, x, {weight}, {total};")
    return "\n".join(lines)


def _pin(shape: Shape) -> str:
    """Keeps the wait for the last product after the sums before it.

    ptxas moves the wait up to the one before, so that hardly any sum is taken while a product is in flight. It does not
    move a store over a wait: what is stored is never read.
    """
    totals = groups.sums(shape) if shape.rows else _sums(shape)
    totals = totals[: len(totals) // 2]  # of the first half
    n = min(len(totals), 4)
    return "".join(
        f"st.shared.v{n}.f32 [pin+{4 * i}], {{{', '.join(totals[i : i + n])}}};\n" for i in range(0, len(totals), n)
    )


def _store(shape: Shape) -> str:
    """Sums over the four lanes of a row, each keeping one key; scale, sort key, store."""
    lines = []
    for i in range(shape.together):
        if i > 0:
            # j is of the next slot's first query already.
            lines.append(f"sub.s32 t, j, {shape.together - i}; setp.lt.s32 there{i}, t, $COUNT;")
        lines += [_sort_key(shape, i), _write(shape, i)]
    rows = shape.together * shape.out_columns
    if shape.filters:
        lines.append(f"add.u64 masks, masks, {rows // 8};")
    if shape.maxima_of:
        lines.append(f"add.u64 maxima, maxima, {4 * rows // shape.maxima_of};")
    # The next queries' limits and thresholds arrive while their products are in flight: nothing before needs them.
    for name in ("limit", "threshold") if shape.filters else ("limit",):
        lines.append(f"@more add.u64 {name}s, {name}s, {4 * shape.together}; @more ld.global.b32 {name}0, [{name}s];")
    lines.append(_ask_others(shape))
    return "\n".join([*lines, f"add.u64 o, o, {4 * rows};"])


def _sort_key(shape: Shape, i: int) -> str:
    """sort_key = that of this lane's key for query i of the slot."""
    a, b, c, d = (f"s{half}_{r}_{i}" for half in range(2) for r in range(2))
    lines = [
        f"""selp.f32 t0, {a}, {c}, upper1; selp.f32 t1, {b}, {d}, upper1; selp.f32 t2, {c}, {a}, upper1;
selp.f32 t3, {d}, {b}, upper1; shfl.sync.bfly.b32 t0, t0, 1, 0x1f, -1; shfl.sync.bfly.b32 t1, t1, 1, 0x1f, -1;
add.f32 t2, t2, t0; add.f32 t3, t3, t1; selp.f32 t0, t2, t3, upper2; selp.f32 t1, t3, t2, upper2;
shfl.sync.bfly.b32 t0, t0, 2, 0x1f, -1; add.f32 x, t1, t0;""",
    ]
    if shape.has_scale:
        lines.append("mul.f32 x, x, scale;")
    lines.append(SORT_KEY)
    if shape.keep_first:
        lines.append(f"setp.lt.s32 p, candidate, {shape.keep_first}; selp.b32 sort_key, {FORCED}, sort_key, p;")
    if shape.keep_last:
        lines.append(
            f"sub.s32 t, limit{i}, {shape.keep_last}; setp.ge.s32 p, candidate, t; "
            f"selp.b32 sort_key, {FORCED}, sort_key, p;"
        )
    # The limit, and a zero of the sort key: ptxas would compare as soon as it may, and wait for the limit before the
    # products.
    lines.append(
        f"lop3.b32 t, sort_key, zero, limit{i}, 0x6a; "
        f"setp.lt.s32 p, candidate, t; selp.b32 sort_key, sort_key, {INVISIBLE}, p;"
    )
    return "\n".join(lines)


def _write(shape: Shape, i: int) -> str:
    """What query i of the slot, if it is there, leaves in device memory."""
    row, there = 4 * i * shape.out_columns, f"@there{i} " if i else ""
    leads = f"and.pred p, leads, there{i}; @p" if i else "@leads"
    if shape.filters:
        passes = (
            f"setp.gt.and.s32 p, sort_key, threshold{i}, there{i};" if i else "setp.gt.s32 p, sort_key, threshold0;"
        )
        return f"""{passes} vote.sync.ballot.b32 t, p, -1; and.b32 u, t, below; popc.b32 u, u;
mad.wide.u32 out, u, 4, o; @p st.global.b32 [out+{row}], sort_key;
{leads} st.global.b32 [masks+{row // 32}], t;"""
    lines = [f"{there}st.global.b32 [o+{row}], sort_key;"]
    if n := shape.maxima_of:
        steps = [f"shfl.sync.bfly.b32 t, sort_key, {1 << i}, 0x1f, -1;" for i in range(n.bit_length() - 1)]
        lines += [f"{step} max.s32 sort_key, sort_key, t;" for step in steps]
        lines.append(f"{leads} st.global.b32 [maxima+{row // n}], sort_key;")
    return "\n".join(lines)
