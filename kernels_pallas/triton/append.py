"""New tokens into the pages of a cache, in place, and what each page keeps of its keys: a touched page a program.
    sums[page] = sum of the dequantised keys that the page now holds, by pairs of neighbours (see `tree`)

Floor, a token each for 128 requests in pages of 64, 8-bit keys of 128: 1.2 MB / 4.3 TB/s = 0.3 us. A launch and four
loads that wait for each other (offsets, table, page, and back) are what it takes.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jax.typing import DTypeLike

from hisa_jax.kernels_pallas.bits import in_32_bits
from hisa_jax.kernels_pallas.triton import capability
from hisa_jax.kernels_pallas.triton.append_body import append_body
from hisa_jax.kernels_pallas.triton.launch import whole
from hisa_jax.kernels_pallas.triton.pool import is_addressable
from hisa_jax.latents import QuantizedLatents
from hisa_jax.layout import IndexCache

_MAX_REQUESTS = 4096
_MIN_PAGE, _MAX_D = 16, 512
# Mostly 10 to 16 us with 2 to 16 warps, whatever the page; one of 128 does not fit the registers of one warp: 44.
_NUM_WARPS = 8

New = tuple[Array, Array | None, Array | QuantizedLatents | None]  # keys [T, D], scales [T], latents [T, E]


def why_not(
    compute_capability: str, *, n_requests: int, n_pages: int, page_size: int, D: int, dtype: DTypeLike,
    latent_values: int = 0,
) -> str | None:  # fmt: skip
    """None if the kernel can append to such pages, or the sentence that says why not.

    Args:
        latent_values: features of latents that are kept in 8 bits.
    """
    for kind in (dtype, jnp.float8_e4m3fn) if latent_values else (dtype,):
        if reason := capability.why_not(compute_capability, kind):
            return reason
    if not 16 <= D <= _MAX_D or D & (D - 1):
        return f"needs keys of 16 to {_MAX_D} features, a power of two, not {D}"
    if page_size < _MIN_PAGE:
        return f"needs pages of {_MIN_PAGE} tokens or more, not {page_size}"
    if n_requests > _MAX_REQUESTS:
        return f"needs at most {_MAX_REQUESTS} requests, not {n_requests}"
    if not is_addressable(size := n_pages * page_size * latent_values, jnp.float8_e4m3fn):
        return f"needs at most {2**31} bytes of 8-bit latents, not {size}"
    size = n_pages * page_size * D
    return None if is_addressable(size, dtype) else f"needs at most {2**31} bytes of 8-bit keys, not {size}"


@in_32_bits
@functools.partial(jax.jit, static_argnames=("interpret",))
def append(
    cache: IndexCache, new: New, block_tables: Array, cu_seqlens: Array, lengths: Array, *, interpret: bool = False
) -> IndexCache:
    """Appends new tokens to R requests of `lengths` [R]; what has no page is dropped.

    Args:
        new: T tokens of all requests; scales and latents are None where the cache has none.
        block_tables: [R, P] int32; `cu_seqlens`: [R + 1] int32, where each request's tokens begin in `new`.
    """
    T, (R, _), size = new[0].shape[0], block_tables.shape, cache.keys.shape[1]
    news, olds = jax.tree.leaves(new), jax.tree.leaves(cache)
    operands = [cu_seqlens, lengths, block_tables, *news, *olds]
    out = pl.pallas_call(
        functools.partial(append_body, treedef=jax.tree.structure((new, cache))),
        # Full pages of new tokens, and at most two partial ones a request.
        grid=(min(T, T // size + 2 * R),),
        in_specs=whole(operands),
        out_specs=whole(olds),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in olds],
        # In place: a page that no program touches is neither read nor written.
        input_output_aliases={len(operands) - len(olds) + i: i for i in range(len(olds))},
        compiler_params=plt.CompilerParams(num_warps=_NUM_WARPS, num_stages=1),
        name="hisa_append",
        interpret=interpret,
    )(*operands)
    return jax.tree.unflatten(jax.tree.structure(cache), out)
