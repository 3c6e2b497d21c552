"""The indexers of a backend of kernels on arrays as the tests draw them: batches, packed batches and pages."""

from typing import NamedTuple

from hisa_jax.layout import Call, Keys


class Method(NamedTuple):
    """As `hj.Hisa`, of any numbers: kernels take a topk above the kept blocks' tokens, too."""

    block_size: int
    block_topk: int
    topk: int = 1
    keep_first: int = 1
    keep_last: int = 1


def call_of(q, k, k_scale, w, visible, *, lengths=None, cu_seqlens=None):
    """A batch; or a packed one, by the offsets of its queries and its keys."""
    if cu_seqlens is None:
        return Call(q=q, w=w, visible=visible, k=Keys(k, k_scale), lengths=lengths)
    offsets = dict(zip(("query_offsets", "key_offsets"), cu_seqlens, strict=True))
    return Call(
        q=q, w=w, visible=visible, k=Keys(k, k_scale), lengths=cu_seqlens[1][1:] - cu_seqlens[1][:-1], **offsets
    )


def select_hisa(backend, *arrays, lengths=None, cu_seqlens=None, interpret=False, **method):
    """[B, T, topk], [B, T] and [B, T, block_topk], or without B if packed."""
    call = call_of(*arrays, lengths=lengths, cu_seqlens=cu_seqlens)
    return call.unflatten(backend.select_hisa(call, Method(**method), interpret))


def select_flat(backend, *arrays, topk, cu_seqlens=None, interpret=False):
    """[B, T, topk] and [B, T], or without B if packed."""
    call = call_of(*arrays, cu_seqlens=cu_seqlens)
    return call.unflatten(backend.select_flat(call, topk, interpret))


def select_blocks(backend, *arrays, lengths=None, cu_seqlens=None, interpret=False, **method):
    """[B, T, block_topk], or without B if packed."""
    call = call_of(*arrays, lengths=lengths, cu_seqlens=cu_seqlens)
    return call.unflatten(backend.select_blocks(call, Method(**method), interpret))
