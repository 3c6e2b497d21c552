"""What dispatch calls: arrays as callers have them to what the stages take, for batches, packed batches and pages."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from hisa_jax.kernels_pallas.mosaic_tpu import config, flat, select, select_ragged
from hisa_jax.kernels_pallas.mosaic_tpu.config import GROUP, LANES
from hisa_jax.kernels_pallas.mosaic_tpu.ragged import Ragged
from hisa_jax.kernels_pallas.mosaic_tpu.select_ragged import Queries
from hisa_jax.kernels_pallas.mosaic_tpu.topk import MAX_K
from hisa_jax.kernels_pallas.sequences import whole_blocks
from hisa_jax.kernels_pallas.types import Interpret
from hisa_jax.layout import Call
from hisa_jax.methods import BlockSparse, Hisa

MAX_PAGES = 65536


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


def select_hisa(call: Call, method: Hisa, interpret: Interpret = False) -> tuple[Array, Array, Array]:
    """The hierarchical indexer: [T, topk] int32 positions, ascending, then -1; [T] count; [T, block_topk] block ids."""
    with jax.enable_x64(False):
        options: dict[str, Any] = dict(topk=method.topk, **_filter_options(method, interpret))
        if call.query_offsets is None:
            (q, k, k_scale, w, visible), n_tokens = _batch(call, method.block_size)
            return _in_rows(call, select.hisa(q, k, k_scale, w, visible, n_tokens, **options))
        ragged, sums = _ragged(call, method.block_size)
        return _first(call, select_ragged.hisa(Queries.padded(*call.queries), ragged, sums, **options))


def select_blocks(call: Call, method: Hisa | BlockSparse, interpret: Interpret = False) -> Array:
    """The block filter alone: [T, block_topk] int32 block ids, ascending, then -1."""
    with jax.enable_x64(False):
        options = _filter_options(method, interpret)
        if call.query_offsets is None:
            (q, k, k_scale, w, visible), n_tokens = _batch(call, method.block_size)
            eligible = -(-visible // method.block_size)
            return _in_rows(call, (select.kept_blocks(q, k, k_scale, w, eligible, n_tokens, None, **options),))[0]
        ragged, sums = _ragged(call, method.block_size)
        return _first(call, (select_ragged.kept_blocks(Queries.padded(*call.queries), ragged, sums, **options),))[0]


def select_flat(call: Call, topk: int, interpret: Interpret = False) -> tuple[Array, Array]:
    """The flat indexer: [T, topk] and [T], as `select_hisa`."""
    with jax.enable_x64(False):
        if call.query_offsets is None:
            assert call.k is not None
            found = flat.select_flat(call.q, *call.k, call.w, call.visible, topk=topk, interpret=interpret)
            return _in_rows(call, found)
        ragged, _ = _ragged(call, LANES if call.cache is None else max(LANES, call.cache.page_size))
        options: dict[str, Any] = dict(topk=topk, chip=config.chip(), interpret=interpret)
        return _first(call, select_ragged.select_flat(Queries.padded(*call.queries), ragged, **options))


def _filter_options(method: Hisa | BlockSparse, interpret: Interpret) -> dict[str, Any]:
    return dict(
        block_topk=method.block_topk,
        keep_first=method.keep_first,
        keep_last=method.keep_last,
        chip=config.chip(),
        interpret=interpret,
    )


def _ragged(call: Call, block_size: int) -> tuple[Ragged, Array | None]:
    """A packed call, or one in pages, and then the sums of its pages."""
    if call.cache is None:
        assert call.query_offsets is not None and call.key_offsets is not None
        return select_ragged.packed(*call.keys, call.query_offsets, call.key_offsets, block_size), None
    cache = call.cache
    assert call.table is not None and call.query_offsets is not None
    where = call.visible, call.table, call.query_offsets
    return select_ragged.paged(cache.keys, cache.scales, *where, block_size), cache.sums


def _batch(call: Call, block_size: int) -> tuple[tuple[Array, Array, Array | None, Array, Array], Array]:
    """q, keys in blocks, their scales, w and visible of a batch; and [B] tokens present."""
    assert call.k is not None
    k, k_scale, visible, n_tokens = _blocks(*call.k, call.visible, call.lengths, block_size)
    return (call.q, k, k_scale, call.w, visible), n_tokens


def _blocks(
    k: Array, k_scale: Array | None, visible: Array, lengths: Array | None, block_size: int
) -> tuple[Array, Array | None, Array, Array]:
    """A batch's keys in blocks, whole groups of them; what queries see of them; and [B] tokens present."""
    B, S, D = k.shape
    n_tokens = jnp.full((B,), S, jnp.int32) if lengths is None else jnp.clip(lengths, 0, S)
    k, k_scale = whole_blocks(k, k_scale, GROUP * block_size)
    return (
        k.reshape(B, -1, block_size, D),
        None if k_scale is None else k_scale.reshape(B, -1, block_size),
        jnp.minimum(visible, n_tokens[:, None]),
        n_tokens,
    )


def _first(call: Call, results: tuple[Array, ...]) -> tuple[Any, ...]:
    """Of results with rows for queries that were padded, those of the call."""
    return tuple(x[: call.shape[0]] for x in results)


def _in_rows(call: Call, results: tuple[Array, ...]) -> tuple[Any, ...]:
    """[B, T, ...] -> [B * T, ...]."""
    B, T = call.shape
    return tuple(x.reshape(B * T, *x.shape[2:]) for x in results)
