"""Selection from a long row by the greatest of each group of neighbours, by a whole CTA, in PTX.

`select_few` twice would find the k best groups, then the k best of all their tokens. But k tokens reach the least of
what the best groups have as their greatest, and few more do: of normal scores 1.1 k of 8 k. So the best groups need no
exact threshold, a bin of the histogram is enough, and only what reaches that bound is selected from.
"""

from jax import Array
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu

from hisa_jax.kernels_pallas.mosaic_gpu.ptx.groups_shape import Groups
from hisa_jax.kernels_pallas.mosaic_gpu.ptx.inline import REF, SCALAR, SPLAT, Row, address_of, i32, scalar
from hisa_jax.kernels_pallas.mosaic_gpu.ptx.select_groups_text import groups_ptx
from hisa_jax.kernels_pallas.mosaic_gpu.ptx.select_row import Output
from hisa_jax.kernels_pallas.types import Ref


def choose(groups: Groups, x: Row, maxima: Row, limit: Array, smem: Ref, out: Output) -> Array:
    """Writes the best of the first `limit` sort keys of a row; runs on all threads of the CTA.

    Args:
        maxima: the greatest of each groups.size of x.
        smem: [groups.smem_bytes / 4] int32.

    Returns: 1, or 0 if it has written nothing: see `groups_ptx`.
    """
    refs = [x.ref, maxima.ref, out.positions, out.count, smem] + ([] if out.sort_keys is None else [out.sort_keys])
    ptx = groups_ptx(groups)

    @plgpu.inline_mgpu(arg_types=(*(REF for _ in refs), *(SPLAT for _ in range(4))), return_type=SCALAR)
    def run(_ctx, keys, greatest, o, count, smem, *rest):
        *o_sort_keys, row, maxima_row, limit, t = rest
        row, maxima_row, limit, t = (x.registers.item() for x in (row, maxima_row, limit, t))
        done = utils.inline_ptx(
            ptx,
            address_of(keys, row, x.width),
            address_of(greatest, maxima_row, maxima.width),
            limit,
            address_of(o, t, out.k),
            address_of(count, t, 1),
            utils.memref_ptr(smem),
            *(address_of(each, t, out.k) for each in o_sort_keys),
            result_types=i32(),
            has_side_effects=True,
            convergent=True,
        )
        return scalar(done)

    return run(*refs, x.row, maxima.row, limit, out.t)
