"""How far a list of tokens reaches, for a warp by itself: in PTX."""

import functools

from jax import Array
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu

from hisa_jax.kernels_pallas.mosaic_gpu.ptx.inline import REF, SCALAR, SPLAT, address_of, i32, scalar, scope
from hisa_jax.kernels_pallas.types import Ref

_LOADS = 8  # on their way together: 256 indices, so that a full list takes one wait for memory

OPERANDS = ("TILES", "INDICES", "FIRST", "END")


def count_tiles(indices: Ref, t: Array, first: Array, end: Array, keys: int, pair: int) -> Array:
    """Tiles from indices[t, first] to the last of indices[t, :end] that names one of `keys` rows, in pairs, not 0.

    Args:
        pair: tokens of a pair of tiles, a power of two.
    """
    K = indices.shape[1]

    @plgpu.inline_mgpu(arg_types=(REF,) + (SPLAT,) * 3, return_type=SCALAR)
    def count(_ctx, indices, t, first, end):
        row, limits = address_of(indices, t.registers.item(), K), (first.registers.item(), end.registers.item())
        ptx = scope(tiles_text(keys, pair), OPERANDS)
        word = utils.inline_ptx(ptx, row, *limits, result_types=i32(), has_side_effects=True, convergent=True)
        return scalar(word)

    return count(indices, t, first, end)


@functools.cache
def tiles_text(keys: int, pair: int) -> str:
    """$INDICES: a row in device memory, $FIRST, $END: columns of it; $TILES: the result, the same in all lanes."""
    lines = [
        f""".reg .pred p, q; .reg .b32 lane, at, i, last, x<{_LOADS}>; .reg .b64 a; mov.u32 lane, %laneid;
mov.b32 last, -1; add.s32 at, $END, lane; sub.s32 at, at, {32 * _LOADS}; again:"""
    ]
    # From the end backwards: as a rule the last index is real. What lies before the first column is not looked at.
    for j in range(_LOADS):
        lines.append(f"""add.s32 i, at, {32 * j}; setp.ge.s32 p, i, $FIRST; mul.wide.s32 a, i, 4;
add.s64 a, a, $INDICES; mov.b32 x{j}, -1; @p ld.global.nc.b32 x{j}, [a];""")
    for j in range(_LOADS):
        lines.append(f"setp.lt.u32 p, x{j}, {keys}; add.s32 i, at, {32 * j}; selp.b32 last, i, last, p;")
    # The second reduction hides from ptxas that the result is even: it would make two loops' bodies of each role's.
    lines.append(f"""redux.sync.max.s32 last, last, -1; sub.s32 i, at, lane; setp.gt.s32 q, i, $FIRST;
setp.lt.and.s32 p, last, 0, q; sub.s32 at, at, {32 * _LOADS}; @p bra.uni again;
sub.s32 last, last, $FIRST; max.s32 last, last, 0; shr.u32 last, last, {pair.bit_length() - 1};
shl.b32 last, last, 1; add.u32 last, last, 2; redux.sync.max.u32 $TILES, last, -1;""")
    return "\n".join(lines) + "\n"
