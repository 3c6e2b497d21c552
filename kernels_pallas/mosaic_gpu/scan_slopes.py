"""Slopes for the virtual head of a scan: at which share of a query's best samples each head is open.
    o[t, h] = #{s in best: q[t, h] . k[s] > 0} / #best,  best: the 32 of 256 samples with the highest exact scores

Floor, 4096 queries of 64 heads of 128 in e4m3 on an H200: 17 GFLOP / 1979 TFLOP/s = 9 us. A product of 64 samples and
all heads is 128 cycles; beside it a warp has 32 products a lane to weigh, add up and look at, twice 64 instructions.
Measured: 53 us, Triton's 123.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from hisa_jax.kernels_pallas.mosaic_gpu.ptx import slopes
from hisa_jax.kernels_pallas.mosaic_gpu.ptx.listed_loop_text import Shape as Listed
from hisa_jax.kernels_pallas.mosaic_gpu.ptx.listed_loop_text import why_not
from hisa_jax.kernels_pallas.mosaic_gpu.ptx.slopes import Inputs
from hisa_jax.kernels_pallas.mosaic_gpu.ptx.slopes_text import Shape
from hisa_jax.kernels_pallas.operands import Operands
from hisa_jax.kernels_pallas.scan_samples import N_BEST, N_SAMPLES, shift_of_samples
from hisa_jax.kernels_pallas.sort_key import INVISIBLE, sort_key_of
from hisa_jax.kernels_pallas.types import Interpret, Ref


@functools.partial(jax.jit, static_argnames=("is_sample", "interpret"))
def scan_slopes(
    operands: Operands, visible: Array, first: Array, *, is_sample: bool = False, interpret: Interpret = False
) -> Array:
    """-> [T, H] float32.

    Args:
        visible: [T] int32, tokens of its sequence that a query sees; `first`: [T] int32, the row of the first of them.
        is_sample: the keys are what is sampled, nothing between them; `first` is then the row of the first sample.
    """
    q, w, k, k_scale, pages = operands
    T, H, D = q.shape
    if reason := why_not(H, D, k.dtype.itemsize):
        raise ValueError(f"scan_slopes: q is [{T}, {H}, {D}]: {reason}")
    shape = Shape(listed=Listed.of(operands, steps=4, capacity=N_SAMPLES), is_sample=is_sample)
    return plgpu.kernel(
        functools.partial(_body, shape, interpret),
        out_type=[jax.ShapeDtypeStruct((T, H), jnp.float32)],
        grid=(T,),
        grid_names=("query",),
        num_threads=1,
        thread_name="warpgroup",
        scratch_types=[plgpu.SMEM((shape.smem_bytes // 4,), jnp.int32)],
        kernel_name="hisa_scan_slopes",
        interpret=interpret,
    )(Inputs(q, w, visible, first, k, k_scale, None if pages is None else pages.table))[0]


def _body(shape: Shape, interpret: Interpret, refs: Inputs, o_gmem: Ref, smem: Ref) -> None:
    # One CTA, one warp-group, one query:   positions -> rows -> 32 bytes a lane -> tensor core -> scores, signs
    #                                       scores -> threshold -> the best -> their signs, added up -> o
    #
    # Nothing waits for device memory twice; several CTAs of a multiprocessor hide each other's waits. out: [T, H].
    t = lax.axis_index("query")
    if interpret:
        o_gmem[t] = _reference(shape, refs, t)
    else:
        slopes.slopes(shape, refs, t, o_gmem, smem)


def _reference(shape: Shape, refs: Inputs, t: Array) -> Array:
    """`slopes.slopes` in jnp, for interpret mode, which cannot run PTX."""
    listed, visible = shape.listed, refs.visible[t]
    sample = jnp.arange(N_SAMPLES, dtype=jnp.int32)
    positions = sample << shift_of_samples(visible)
    there = positions < visible
    rows = refs.first[t] + jnp.where(there, sample if shape.is_sample else positions, 0)
    if refs.table is not None and listed.page_size is not None:
        page = refs.table[...][jnp.minimum(rows // listed.page_size, listed.table_size - 1)]
        rows = jnp.clip(page, 0, listed.n_pages - 1) * listed.page_size + rows % listed.page_size
    rows = jnp.minimum(rows, listed.n_rows - 1)
    q, k = refs.q[t].astype(jnp.float32), refs.k[...][rows].astype(jnp.float32)
    products = jnp.sum(k[:, None, :] * q[None], axis=2)
    x = jnp.sum(jnp.where(products < 0, 0, products) * refs.w[t][None, :], axis=1)
    sort_keys = sort_key_of(x if refs.k_scale is None else x * refs.k_scale[...][rows])
    sort_keys = jnp.where(there, sort_keys, INVISIBLE)
    rank = jnp.zeros((N_SAMPLES,), jnp.int32).at[jnp.argsort(~sort_keys, stable=True)].set(sample)
    is_best = there & (rank < N_BEST)
    n_open = jnp.sum(((products > 0) & is_best[:, None]).astype(jnp.float32), axis=0)
    return n_open / jnp.maximum(jnp.sum(is_best.astype(jnp.float32)), 1)
