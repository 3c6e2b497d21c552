"""Which inputs the indexer's TPU kernels take."""

import jax.numpy as jnp
from jax.typing import DTypeLike

from hisa_jax.kernels_pallas.mosaic_tpu import flat, units
from hisa_jax.kernels_pallas.mosaic_tpu.config import CHIPS, LANES
from hisa_jax.kernels_pallas.mosaic_tpu.topk import MAX_K

MAX_PAGES = 65536


def why_not(
    device_kind: str,
    H: int,
    D: int,
    q_dtype: DTypeLike,
    k_dtype: DTypeLike,
    *,
    topk: int | None = None,
    block_size: int | None = None,
    block_topk: int | None = None,
    is_by_best_token: bool = False,
    page_size: int | None = None,
    n_keys: int = 0,
) -> str | None:
    """None if a TPU kernel can run this, or the sentence that says why not.

    Args:
        device_kind: as JAX reports it, "TPU v5 lite" for instance.
        topk: tokens that are selected; None: blocks alone.
        block_size, block_topk: None for the flat indexer.
        is_by_best_token: whether blocks are chosen by their best token; then they need not be whole pages.
        page_size: of keys in pages; n_keys: most of a sequence, or of a packed batch.
    """
    if topk is not None and topk > MAX_K:
        return f"needs topk at most {MAX_K}, not {topk}"
    if block_topk is not None and block_topk > MAX_K:
        return f"needs block_topk at most {MAX_K}, not {block_topk}"
    if block_size is None and flat.why_not(n_keys):
        return flat.why_not(n_keys)
    if page_size is not None:
        if n_keys > page_size * MAX_PAGES:
            return f"needs at most {MAX_PAGES} pages a request, whose table is in SMEM, not {n_keys // page_size}"
        if not is_by_best_token and (block_size or page_size) % page_size:
            return f"needs blocks of whole pages, not blocks of {block_size} tokens and pages of {page_size}"
    if device_kind not in CHIPS:
        return f"needs a TPU v5e, v5p, v6e or v7x, this device is {device_kind!r}"
    names = jnp.dtype(q_dtype).name, jnp.dtype(k_dtype).name
    if names[0] != names[1]:
        return f"needs queries and keys of one dtype, not {names[0]} and {names[1]}"
    if names[0] not in ("bfloat16", "int8", "float8_e4m3fn"):
        return f"needs bfloat16, int8 or float8_e4m3fn queries and keys, not {names[0]}"
    if H not in (16, 32, 64, 128) or D not in (64, 128):
        return f"needs 16, 32, 64 or 128 heads of size 64 or 128, not {H} of {D}"
    if is_by_best_token and block_size is not None:
        return units.why_not(block_size, n_keys)
    if (block_size or LANES) not in (64, 128, 256):
        return f"needs blocks of 64, 128 or 256 tokens, not {block_size}"
    return None
