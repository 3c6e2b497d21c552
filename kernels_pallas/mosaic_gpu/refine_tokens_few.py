"""Sort keys of the exact scores of listed tokens, for a few queries: each list is split over CTAs, a top-k follows.
    x[t, c] = sort_key(k_scale[s] * sum_h w[t, h] * relu(q[t, h] . k[s])),  s = tokens[t, c]

Floor, 32 and 128 queries with 9,500 tokens each in e4m3 on an H200: 132 bytes a token, scattered, 40 and 160 MB / 4.3
TB/s = 9 and 37 us. Measured: 21 and 69; a scale costs 32 bytes or 64 where it is 4.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from hisa_jax.kernels_pallas.mosaic_gpu.ptx import listed_loop
from hisa_jax.kernels_pallas.mosaic_gpu.ptx.listed_loop import Inputs, Part
from hisa_jax.kernels_pallas.mosaic_gpu.ptx.listed_loop_text import STEP, Shape, why_not
from hisa_jax.kernels_pallas.operands import Operands
from hisa_jax.kernels_pallas.sort_key import sort_key_of
from hisa_jax.kernels_pallas.types import Interpret, Ref

COLUMNS = 2 * STEP  # lists are multiples of this
_RESIDENT = 4  # CTAs of a multiprocessor at a time
_MOST_STEPS = 16  # of a CTA: rows of all its tokens are looked up at once


def heuristic(T: int, capacity: int, n_ctas: int) -> int:
    """Steps of 64 tokens a CTA, an even number: as many CTAs as run at a time, where lists are full."""
    parts = max(_RESIDENT * n_ctas // T, 1)
    return min(max(-(-capacity // (COLUMNS * parts)), 1) * 2, _MOST_STEPS)


@functools.partial(jax.jit, static_argnames=("steps", "interpret"))
def refine_tokens_scores(
    operands: Operands, tokens: Array, count: Array, first: Array, *, steps: int, interpret: Interpret = False
) -> Array:
    """[T, capacity] int32 tokens, [T] int32 -> [T, capacity] int32 sort keys; from `count` on they may be anything.

    `capacity` is a multiple of 128, `steps` even; `first` [T] int32 is the row of token 0 of each query's sequence.
    """
    q, w, k, k_scale, pages = operands
    (T, H, D), capacity = q.shape, tokens.shape[1]
    if reason := why_not(H, D, k.dtype.itemsize):
        raise ValueError(f"refine_tokens: q is [{T}, {H}, {D}]: {reason}")
    if capacity % COLUMNS or steps % 2:
        raise ValueError(f"refine_tokens: lists of {capacity}, {steps} steps, wanted multiples of {COLUMNS} and 2")
    shape = Shape.of(operands, steps, capacity)
    inputs = Inputs(q, w, k, k_scale, None if pages is None else pages.table, tokens, count, first)
    return plgpu.kernel(
        functools.partial(_body, shape, interpret),
        out_type=[jax.ShapeDtypeStruct((T, capacity), jnp.int32)],
        grid=(T, -(-capacity // (STEP * steps))),
        grid_names=("query", "part"),
        num_threads=1,
        thread_name="warpgroup",
        scratch_types=[plgpu.SMEM((shape.smem_bytes // 4,), jnp.int32)],
        kernel_name="hisa_refine_tokens",
        interpret=interpret,
    )(inputs)[0]


def _body(shape: Shape, interpret: Interpret, refs: Inputs, o_gmem: Ref, smem: Ref) -> None:
    # One CTA, one warp-group, some of a query's list:   tokens -> pages -> rows, in shared memory
    #                                                    rows -> 32 bytes a lane -> tensor core -> relu -> sort keys
    #
    # Keys are never in shared memory; two steps are on their way while one is multiplied. out: [T, capacity].
    query, part = lax.axis_index("query"), lax.axis_index("part")
    slot = part * (shape.steps * STEP)
    end = jnp.minimum(refs.count[query], shape.capacity)
    steps = jnp.clip((end - slot + (STEP - 1)) // STEP, 0, shape.steps)
    work = Part(query, refs.first[query], slot, steps)
    if interpret:
        lax.fori_loop(0, work.steps, functools.partial(_reference, shape, refs, work, o_gmem), None)
    else:
        listed_loop.score(shape, refs, work, o_gmem, smem)


def _reference(shape: Shape, refs: Inputs, part: Part, o_gmem: Ref, step: Array, _: None) -> None:
    """A step of `listed_loop.score` in jnp, for interpret mode, which cannot run PTX."""
    slots = pl.ds(part.slot + step * STEP, STEP)
    rows = part.row + jnp.maximum(refs.tokens[part.query, slots], 0)
    if refs.table is not None and shape.page_size is not None:
        page = refs.table[...][jnp.minimum(rows // shape.page_size, shape.table_size - 1)]
        rows = jnp.clip(page, 0, shape.n_pages - 1) * shape.page_size + rows % shape.page_size
    rows = jnp.minimum(rows, shape.n_rows - 1)
    k, q = refs.k[...][rows].astype(jnp.float32), refs.q[part.query].astype(jnp.float32)
    x = jnp.sum(k[:, None, :] * q[None], axis=2)
    x = jnp.sum(jnp.where(x < 0, 0, x) * refs.w[part.query][None, :], axis=1)
    o_gmem[part.query, slots] = sort_key_of(x if refs.k_scale is None else x * refs.k_scale[...][rows])
