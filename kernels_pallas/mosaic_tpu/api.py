"""What dispatch calls: arrays as callers have them to what the stages take, for batches, packed batches and pages."""

import math
from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from hisa_jax.kernels_pallas.bits import in_32_bits
from hisa_jax.kernels_pallas.mosaic_tpu import config, flat, ragged, select
from hisa_jax.kernels_pallas.mosaic_tpu.config import LANES, Choice
from hisa_jax.kernels_pallas.mosaic_tpu.ragged import Keys, Queries, Ragged
from hisa_jax.kernels_pallas.mosaic_tpu.topk import MAX_K
from hisa_jax.kernels_pallas.types import Interpret

MAX_PAGES = 65536
CuSeqlens = tuple[Array, Array]  # [R + 1] int32 each: offsets of each sequence's queries, and of its keys


def why_not(
    device_kind: str,
    H: int,
    D: int,
    q_dtype: DTypeLike,
    k_dtype: DTypeLike,
    *,
    topk: int,
    block_size: int | None = None,
    block_topk: int | None = None,
    page_size: int | None = None,
    n_keys: int = 0,
) -> str | None:
    """None if a TPU kernel can run this, or the sentence that says why not.

    Args:
        device_kind: as JAX reports it, "TPU v5 lite" for instance.
        block_size, block_topk: None for the flat indexer.
        page_size: of keys in pages; n_keys: most of a sequence, or of a packed batch.
    """
    if topk > MAX_K:
        return f"needs topk at most {MAX_K}, not {topk}"
    if block_topk is not None and block_topk > MAX_K:
        return f"needs block_topk at most {MAX_K}, not {block_topk}"
    if block_size is None and flat.why_not(n_keys):
        return flat.why_not(n_keys)
    if page_size is not None:
        if n_keys > page_size * MAX_PAGES:
            return f"needs at most {MAX_PAGES} pages a request, whose table is in SMEM, not {n_keys // page_size}"
        if (block_size or page_size) % page_size:
            return f"needs blocks of whole pages, not blocks of {block_size} tokens and pages of {page_size}"
    return config.why_not(device_kind, H, D, q_dtype, k_dtype, block_size=block_size or LANES)


@in_32_bits
def select_hisa(
    q: Array,
    k: Array,
    k_scale: Array | None,
    w: Array,
    visible: Array,
    *,
    topk: int,
    block_size: int,
    block_topk: int,
    keep_first: int = 1,
    keep_last: int = 1,
    lengths: Array | None = None,
    cu_seqlens: CuSeqlens | None = None,
    interpret: Interpret = False,
) -> tuple[Array, Array, Array]:
    """The hierarchical indexer.

    Args:
        q: [B, T, H, D]; k: [B, S, D], both bfloat16, int8 or float8_e4m3fn; k_scale: [B, S] float32 or None.
        w: [B, T, H] float32; visible: [B, T] int32, tokens each query sees, 0 for padding.
        lengths: [B] int32, tokens present in each sequence; S if None.
        cu_seqlens: of a packed batch, whose arrays have no B.

    Returns: [B, T, topk] int32 positions, ascending, then -1; [B, T] int32 count; [B, T, block_topk] block ids.
    """
    call = _ragged(Queries(q, w, visible), Keys(k, k_scale), block_size, lengths, cu_seqlens)
    of_blocks = Choice(k=block_topk, keep_first=keep_first, keep_last=keep_last, interpret=interpret)
    return _as(visible.shape, *select.hisa(*call, of_blocks, Choice(k=topk, interpret=interpret)))


@in_32_bits
def select_blocks(
    q: Array,
    k: Array,
    k_scale: Array | None,
    w: Array,
    visible: Array,
    *,
    block_size: int,
    block_topk: int,
    keep_first: int = 1,
    keep_last: int = 1,
    lengths: Array | None = None,
    cu_seqlens: CuSeqlens | None = None,
    interpret: Interpret = False,
) -> Array:
    """The block filter alone: [B, T, block_topk] int32 block ids, ascending, then -1; arguments as `select_hisa`."""
    call = _ragged(Queries(q, w, visible), Keys(k, k_scale), block_size, lengths, cu_seqlens)
    choice = Choice(k=block_topk, keep_first=keep_first, keep_last=keep_last, interpret=interpret)
    return _as(visible.shape, select.kept_blocks(*call, choice))[0]


@in_32_bits
def select_flat(
    q: Array,
    k: Array,
    k_scale: Array | None,
    w: Array,
    visible: Array,
    *,
    topk: int,
    cu_seqlens: CuSeqlens | None = None,
    interpret: Interpret = False,
) -> tuple[Array, Array]:
    """The flat indexer: indices [B, T, topk] and count [B, T]; arguments as `select_hisa`."""
    queries, keys, choice = Queries(q, w, visible), Keys(k, k_scale), Choice(k=topk, interpret=interpret)
    if cu_seqlens is None:
        return flat.flat(queries, keys, choice=choice)[0], jnp.clip(visible, 0, min(topk, k.shape[1]))
    return _as(visible.shape, *select.select_flat(*ragged.of_packed(queries, keys, cu_seqlens, LANES), choice))


@in_32_bits
def select_hisa_paged(
    q: Array,
    k: Array,
    k_scale: Array | None,
    w: Array,
    visible: Array,
    *,
    topk: int,
    block_size: int,
    block_topk: int,
    keep_first: int = 1,
    keep_last: int = 1,
    block_tables: Array,
    cu_seqlens_q: Array,
    page_sums: Array,
    page_counts: Array,
    interpret: Interpret = False,
) -> tuple[Array, Array, Array]:
    """The hierarchical indexer over pages.

    Args:
        q: [T, H, D], w: [T, H], visible: [T]: the queries of each request after the other's, the last of its tokens.
        k: [N, page_size, D]; k_scale: [N, page_size] float32 or None.
        block_tables: [R, P] int32, pages of each request; cu_seqlens_q: [R + 1] int32, where its queries begin.
        page_sums: [N, D] float32, the dequantised keys of each page added up; page_counts: not looked at, since only
            blocks of full pages are chosen by their mean.

    Returns: [T, topk] int32 positions, ascending, then -1; [T] int32 count; [T, block_topk] block ids.
    """
    del page_counts
    queries, keys = Queries(q, w, visible), Keys(k, k_scale)
    call = ragged.of_pages(queries, keys, block_tables, cu_seqlens_q, block_size, page_sums)
    of_blocks = Choice(k=block_topk, keep_first=keep_first, keep_last=keep_last, interpret=interpret)
    return _as(visible.shape, *select.hisa(*call, of_blocks, Choice(k=topk, interpret=interpret)))


@in_32_bits
def select_blocks_paged(
    q: Array,
    k: Array,
    k_scale: Array | None,
    w: Array,
    visible: Array,
    *,
    block_size: int,
    block_topk: int,
    keep_first: int = 1,
    keep_last: int = 1,
    block_tables: Array,
    cu_seqlens_q: Array,
    page_sums: Array,
    page_counts: Array,
    interpret: Interpret = False,
) -> Array:
    """The block filter alone over pages: [T, block_topk] int32; arguments as `select_hisa_paged`."""
    del page_counts
    queries, keys = Queries(q, w, visible), Keys(k, k_scale)
    call = ragged.of_pages(queries, keys, block_tables, cu_seqlens_q, block_size, page_sums)
    choice = Choice(k=block_topk, keep_first=keep_first, keep_last=keep_last, interpret=interpret)
    return _as(visible.shape, select.kept_blocks(*call, choice))[0]


@in_32_bits
def select_flat_paged(
    q: Array,
    k: Array,
    k_scale: Array | None,
    w: Array,
    visible: Array,
    *,
    topk: int,
    block_tables: Array,
    cu_seqlens_q: Array,
    interpret: Interpret = False,
) -> tuple[Array, Array]:
    """The flat indexer over pages: [T, topk] and [T]; arguments as `select_hisa_paged`."""
    unit = max(LANES, k.shape[1])
    call = ragged.of_pages(Queries(q, w, visible), Keys(k, k_scale), block_tables, cu_seqlens_q, unit, None)
    return _as(visible.shape, *select.select_flat(*call, Choice(k=topk, interpret=interpret)))


def _ragged(
    queries: Queries, keys: Keys, block_size: int, lengths: Array | None, cu_seqlens: CuSeqlens | None
) -> tuple[Queries, Ragged]:
    """A batch or a packed batch, its keys in blocks."""
    if cu_seqlens is not None:
        return ragged.of_packed(queries, keys, cu_seqlens, block_size)
    B, S, _ = keys.values.shape
    n_tokens = jnp.full((B,), S, jnp.int32) if lengths is None else jnp.clip(lengths, 0, S)
    return ragged.of_batch(queries, ragged.in_blocks(*keys, block_size), n_tokens)


def _as(shape: tuple[int, ...], *results: Array) -> tuple[Any, ...]:
    """Of results [rows, ...], those of real queries in place of padding: [*shape, ...]."""
    T = math.prod(shape)
    return tuple(x[:T].reshape(*shape, *x.shape[1:]) for x in results)
