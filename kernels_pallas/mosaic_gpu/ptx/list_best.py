"""The tokens of the best sort keys of a row in device memory, listed by a whole CTA, in PTX: see list_best_text.py."""

from jax import Array
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu

from hisa_jax.kernels_pallas.mosaic_gpu.ptx import inline
from hisa_jax.kernels_pallas.mosaic_gpu.ptx.inline import REF, SPLAT, address_of
from hisa_jax.kernels_pallas.mosaic_gpu.ptx.list_best_text import Row, list_ptx
from hisa_jax.kernels_pallas.mosaic_gpu.ptx.threshold_text import Shape
from hisa_jax.kernels_pallas.types import Ref


def sample_of(n: int, rank: int) -> Shape:
    """Of n samples: few a thread, since what a thread does by itself waits for nobody."""
    n_threads = next((threads for threads in (128, 256, 512) if threads * 8 >= n), 1024)
    return Shape(width=n, k=rank, each=8 if n_threads * 8 >= n else 16, n_threads=n_threads, has_forced=False)


def list_best(row: Row, x: inline.Row, samples: inline.Row, limit: Array, tokens: Ref, count: Ref, smem: Ref) -> None:
    """Lists the best of the first `limit` sort keys of a row of x; runs on all threads of the CTA.

    Args:
        samples: as row.apart says; the row itself, if they are not side by side.
        tokens: [T, row.most] int32; count: [T] int32; smem: [row.smem_bytes / 4] int32.
    """
    refs = [x.ref, samples.ref, tokens, count, smem]

    @plgpu.inline_mgpu(arg_types=(*(REF for _ in refs), SPLAT, SPLAT))
    def run(_ctx, keys, sampled, tokens, count, smem, t, limit):
        t, limit = t.registers.item(), limit.registers.item()
        utils.inline_ptx(
            list_ptx(row),
            address_of(keys, t, x.width),
            address_of(sampled, t, samples.width),
            limit,
            address_of(tokens, t, row.most),
            address_of(count, t, 1),
            utils.memref_ptr(smem),
            has_side_effects=True,
            convergent=True,
        )

    run(*refs, x.row, limit)
