"""The PTX of score_loop.py where a slot holds the heads of several queries: how a scan with few heads is summed.

A product's accumulator gives lane 4 * g + c the columns 8 * o + 2 * c and the next, of keys 4 * g to 4 * g + 3. The
heads lie so in a slot that the 16 columns of a lane are those of whole queries (`columns_of`): a lane sums without
shuffles, and ends with 4 keys of each of its 16 / rows queries.

Beside its weights a slot holds what each of its queries compares with: words H .. are thresholds, words 3 H / 2 .. are
limits. A threshold is a score, not a sort key, so that no score has to be turned into one; NaN counts as -inf.
"""

import numpy as np
from jax import Array

from hisa_jax.kernels_pallas.mosaic_gpu.ptx.score_shape import Shape
from hisa_jax.kernels_pallas.sort_key import INVISIBLE

_COLUMNS_OF_LANE = 16
_KEYS_OF_LANE = 4


def columns_of(H: int, rows: int) -> np.ndarray:
    """[H] int32: which of a group's rows, query by query, each column of the product is."""
    column = np.arange(H, dtype=np.int32)
    lane, nth = column % 8 // 2, column // 8 * 2 + column % 2
    return (nth // rows * 4 + lane) * rows + nth % rows


def by_query_of(shape: Shape, columns: Array) -> Array:
    """[n, H] in the order of `columns_of` -> [n, group, rows]; in jnp, for interpret mode."""
    assert shape.rows is not None
    by_lane = columns.reshape(-1, shape.H // 8, 4, 2).transpose(0, 2, 1, 3)
    return by_lane.reshape(len(columns), 4, -1, shape.rows).swapaxes(1, 2).reshape(len(columns), -1, shape.rows)


def queries_of_lane(shape: Shape) -> range:
    assert shape.rows is not None
    return range(_COLUMNS_OF_LANE // shape.rows)


def sums(shape: Shape) -> list[str]:
    """Registers of the sums: key `half + 2 * r` of this lane's keys, by its query i."""
    return [f"s{half}_{r}_{i}" for half in range(2) for r in range(2) for i in queries_of_lane(shape)]


def scales(shape: Shape) -> list[str]:
    return [f"scale{key}" for key in range(_KEYS_OF_LANE)] if shape.has_scale else []


def declarations(shape: Shape) -> str:
    each = queries_of_lane(shape)
    floats = [*sums(shape), *scales(shape), *(f"threshold{i}" for i in each), "x"]
    words = [f"{name}{i}" for name in ("limit", "all", "word") for i in each]
    words += [f"{name}{key}" for name in ("b", "turn") for key in range(_KEYS_OF_LANE)]
    words += ["at_query", "first"]
    return f".reg .f32 {', '.join(floats)}; .reg .b32 {', '.join(words)};"


def start(shape: Shape) -> str:
    """What stays the same for all groups: the lane's column, its scales, and where its results go."""
    lines = [
        """mov.u32 j, 0; and.b32 column, lane, 3; mov.u32 u, %tid.x; and.b32 u, u, 127;
shr.u32 t, u, 5; shl.b32 candidate, t, 5; setp.lt.u32 leads, lane, 4;"""
    ]
    if shape.has_scale:
        # Lanes of a quad have the same four keys.
        lines.append("and.b32 t, u, 124; shl.b32 t, t, 2; add.u32 t, t, $SCALES;")
        lines.append(f"ld.shared.v4.f32 {{{', '.join(scales(shape))}}}, [t];")
    if shape.filters:
        lines.append(
            f"""shr.u32 t, u, 5; mad.lo.u32 t, column, {shape.out_columns // 32}, t; mul.wide.u32 out, t, 4;
add.u64 out, out, $MASKS; add.u32 candidate, candidate, $CANDIDATE;"""
        )
        lines += [f"sub.s32 turn{key}, {key}, column;" for key in range(_KEYS_OF_LANE)]
    else:
        lines.append(
            f"""and.b32 t, u, 124; add.u32 candidate, t, $CANDIDATE; mad.lo.u32 t, column, {shape.out_columns}, t;
mul.wide.u32 out, t, 4; add.u64 out, out, $O;"""
        )
    return "\n".join(lines)


def load_queries(shape: Shape) -> str:
    """Thresholds and limits of the lane's queries, 4 apart; `w_slot` is the slot's first weight."""
    lines = [f"shl.b32 t, column, 2; add.u32 at_query, w_slot, t; add.u32 at_query, at_query, {4 * shape.H};"]
    for i in queries_of_lane(shape):
        if shape.filters:
            # NaN, which counts as -inf, reaches no threshold: where all is taken, no vote decides.
            lines.append(
                f"ld.shared.f32 threshold{i}, [at_query+{16 * i}]; "
                f"setp.eq.f32 p, threshold{i}, 0fFF800000; selp.b32 all{i}, -1, 0, p;"
            )
        lines.append(f"ld.shared.b32 limit{i}, [at_query+{2 * shape.H + 16 * i}];")
    return "\n".join(lines)


def loaded_of_queries(shape: Shape) -> list[str]:
    """The registers that `load_queries` loads."""
    names = ("threshold", "limit") if shape.filters else ("limit",)
    return [f"{name}{i}" for name in names for i in queries_of_lane(shape)]


def sum_half(shape: Shape, acc: list[str], half: int) -> str:
    """s<half>_<r>_<i> = the sum over the rows of query i of weight * product, relu but for the first `n_linear`."""
    assert shape.rows is not None
    lines = []
    for register_index, register in enumerate(acc):
        octet, r, b = register_index // 4, register_index // 2 % 2, register_index % 2
        nth = 2 * octet + b
        i, row = divmod(nth, shape.rows)
        if row >= shape.n_rows:
            continue
        weight, total, x = f"w{nth}", f"s{half}_{r}_{i}", register
        if row >= shape.n_linear:
            # Into a register of its own: writing to an accumulator would serialize all products.
            lines.append(f"max.NaN.f32 x, {register}, 0f00000000;")
            x = "x"
        lines.append(f"mul.f32 {total}, {x}, {weight};" if row == 0 else f"fma.rn.f32 {total}, {x}, {weight}, {total};")
    return "\n".join(lines)


def store(shape: Shape) -> str:
    """Bits or sort keys of the lane's queries."""
    each = shape.out_columns // 8 if shape.filters else 4 * shape.out_columns  # bytes of a query
    text = _masks(shape) if shape.filters else "\n".join(_sort_keys(shape, i) for i in queries_of_lane(shape))
    return f"{text}\nadd.u64 out, out, {shape.group * each};"


def _scaled(shape: Shape, key: int, i: int) -> str:
    """x = the score of one of the lane's keys."""
    total = f"s{key % 2}_{key // 2}_{i}"
    return f"mul.f32 x, {total}, scale{key};" if shape.has_scale else f"mov.f32 x, {total};"


def _masks(shape: Shape) -> str:
    """Which of the warp's 32 keys each query of a lane takes; only tiles at an end of what it sees need its limits."""
    queries = queries_of_lane(shape)
    # Of all that this lane's queries see, whether the warp's keys are neither among the first nor beyond.
    least = "mov.b32 t, limit0; " + " ".join(f"min.s32 t, t, limit{i};" for i in queries[1:])
    lines = [_votes(shape, i) for i in queries]
    lines.append(
        f"""{least} sub.s32 t, t, {shape.keep_last + 32}; setp.lt.s32 p, t, candidate;
setp.lt.or.s32 p, candidate, {shape.keep_first}, p; vote.sync.any.pred p, p, -1; @!p bra inside;"""
    )
    lines += [_within(shape, i) for i in queries]
    lines.append("inside:")
    lines += [f"@leads st.global.b32 [out+{4 * i * shape.out_columns // 8}], word{i};" for i in queries]
    return "\n".join(lines)


def _votes(shape: Shape, i: int) -> str:
    """word<i> = which keys reach the threshold of query i of each lane: four votes have a bit of each quad."""
    lines = [
        f"{_scaled(shape, key, i)} setp.ge.f32 p, x, threshold{i}; vote.sync.ballot.b32 b{key}, p, -1;"
        for key in range(_KEYS_OF_LANE)
    ]
    # Lane 4 * g + c has key 4 * g + `key` of the queries c: bit 4 * g + c of a vote goes to bit 4 * g + `key`.
    lines.append(f"mov.b32 word{i}, all{i};")
    for key in range(_KEYS_OF_LANE):
        lines.append(
            f"shf.l.wrap.b32 t, b{key}, b{key}, turn{key}; and.b32 t, t, {0x11111111 << key}; "
            f"or.b32 word{i}, word{i}, t;"
        )
    return "\n".join(lines)


def _within(shape: Shape, i: int) -> str:
    """word<i> with what is always kept, and without what query i does not see. Shifts by 32 and more give 0."""
    lines = [f"sub.s32 first, limit{i}, candidate;"]
    if shape.keep_first:
        lines.append(
            f"""sub.s32 t, {shape.keep_first}, candidate; max.s32 t, t, 0; shl.b32 t, 1, t; sub.u32 t, t, 1;
or.b32 word{i}, word{i}, t;"""
        )
    if shape.keep_last:
        lines.append(
            f"""sub.s32 t, first, {shape.keep_last}; max.s32 t, t, 0; shl.b32 t, 1, t; neg.s32 t, t;
or.b32 word{i}, word{i}, t;"""
        )
    lines.append(
        f"max.s32 first, first, 0; shl.b32 first, 1, first; sub.u32 first, first, 1; and.b32 word{i}, word{i}, first;"
    )
    return "\n".join(lines)


def _sort_keys(shape: Shape, i: int) -> str:
    lines = []
    for key in range(_KEYS_OF_LANE):
        # The maximum drops NaN; the addition makes -0.0, which must tie with 0.0, positive.
        lines.append(
            f"""{_scaled(shape, key, i)} max.f32 x, x, 0fFF800000; add.f32 x, x, 0f00000000; mov.b32 b{key}, x;
shr.s32 t, b{key}, 31; and.b32 t, t, {2**31 - 1}; xor.b32 b{key}, b{key}, t;
add.s32 t, candidate, {key}; setp.lt.s32 p, t, limit{i}; selp.b32 b{key}, b{key}, {INVISIBLE}, p;"""
        )
    lines.append(f"st.global.v4.b32 [out+{16 * i * shape.out_columns}], {{b0, b1, b2, b3}};")
    return "\n".join(lines)
