"""Selection from one row of sort keys by a whole CTA, in PTX: for rows so few that each has a CTA.

A row's passes wait for each other, and each takes the time of a few instructions, a sum over the CTA and a barrier. So
there are few passes: scores go to 1024 bins of equal width between the least and the greatest, the bin that holds the
threshold is listed (some twenty of 8192 normal scores), and ranks of the listed ones say the threshold. Then each
thread, which has neighbouring columns, writes the chosen of them after those of the threads before it. Sort keys stay
in registers from the first pass to the last. A bin that is too long to be listed is halved until it is not.
"""

from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir.dialects import arith

from hisa_jax.kernels_pallas.mosaic_gpu.ptx.inline import REF, SPLAT, Row, address_of
from hisa_jax.kernels_pallas.mosaic_gpu.ptx.lanes import LANES, element, key_of_lane
from hisa_jax.kernels_pallas.mosaic_gpu.ptx.select_few_text import row_ptx, select_ptx
from hisa_jax.kernels_pallas.mosaic_gpu.ptx.select_row import Output
from hisa_jax.kernels_pallas.mosaic_gpu.ptx.threshold_text import Shape
from hisa_jax.kernels_pallas.types import Interpret, Ref


def shape_of(width: int, k: int) -> Shape:
    """A thread has as few columns as make its own work less than what it waits for the others."""
    each = 8 if width <= 2048 else 16 if width <= 16384 else 32
    n_threads = next((n for n in (128, 256, 512) if n * each >= width), 1024)
    return Shape(width=width, k=k, each=each, n_threads=n_threads)


def block_position(block_size: int, n_ids: int) -> str:
    """PTX: the token that a thread's first column stands for; all its columns are of one block."""
    shift = block_size.bit_length() - 1
    return f"""shr.u32 t, column, {shift}; min.u32 t, t, {n_ids - 1}; mul.wide.u32 word, t, 4; add.s64 word, word, $IDS;
ld.global.b32 base, [word]; shl.b32 base, base, {shift}; and.b32 t, column, {block_size - 1}; add.s32 base, base, t;"""


def own_position() -> str:
    """PTX: columns stand for themselves."""
    return "mov.b32 base, column;"


def store(
    shape: Shape, smem: Ref, first: Array, n_keys: int, sort_keys: Array, *, n_ctas: int, interpret: Interpret
) -> None:
    """Puts sort keys in lane order, from column `first` on, where `choose` finds them if shape.is_there.

    Args:
        smem: as of `choose`; of `n_ctas` that share a row it is the first one's.
    """
    if interpret:
        smem[pl.ds(first, n_keys)] = sort_keys
        return
    ptx = row_ptx(shape, n_ctas)

    @plgpu.inline_mgpu(arg_types=(REF, SPLAT, LANES))
    def run(_ctx, smem, first, sort_keys):
        column = arith.addi(first.registers.item(), key_of_lane(n_keys))
        value = element(sort_keys.registers.flat[0], 0)
        utils.inline_ptx(ptx, column, utils.memref_ptr(smem), value, has_side_effects=True)

    run(smem, first, sort_keys)


def choose(shape: Shape, x: Row | None, limit: Array, ids: Row | None, block_size: int, smem: Ref, out: Output) -> None:
    """Writes the best of the first `limit` sort keys of a row; runs on all threads of the CTA, or the first so many.

    Args:
        x: of shape.width sort keys, or of groups of which so many are listed; None if shape.is_there.
        ids: blocks that columns are of; if shape.is_listed, what each stands for; with shape.group the listed groups.
        smem: [shape.smem_bytes / 4] int32.
    """
    position = own_position
    if ids is not None:
        n_ids = ids.width
        position = lambda: block_position(block_size, n_ids)  # noqa: E731
    ptx, ids, x = select_ptx(shape, position), ids or x, x or ids
    assert x is not None and ids is not None
    refs = [x.ref, ids.ref, out.positions, out.count, smem] + ([] if out.sort_keys is None else [out.sort_keys])
    scalars = [x.row, ids.row, limit, out.t]

    @plgpu.inline_mgpu(arg_types=(*(REF for _ in refs), *(SPLAT for _ in scalars)))
    def run(_ctx, keys, listed, o, count, smem, *rest):
        *o_sort_keys, row, ids_row, limit, t = rest
        row, ids_row, limit, t = (x.registers.item() for x in (row, ids_row, limit, t))
        utils.inline_ptx(
            ptx,
            address_of(keys, row, x.width),
            limit,
            address_of(listed, ids_row, ids.width),
            address_of(o, t, shape.k),
            address_of(count, t, 1),
            utils.memref_ptr(smem),
            *(address_of(each, t, shape.k) for each in o_sort_keys),
            has_side_effects=True,
            convergent=True,
        )

    run(*refs, *scalars)
