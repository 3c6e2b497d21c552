"""Every public call that takes arrays, at a small size: for tests of what must hold for all of them."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import hisa_jax as hj
from tests import draw

METHODS = {
    "dsa": hj.Dsa(topk=6),
    "hisa": hj.Hisa(topk=6, block_size=4, block_topk=5, block_ratio=2),
    "scan": hj.Scan(topk=6, candidates=12, exact_heads=1, sketch="int4"),
    "block_sparse": hj.BlockSparse(topk=12, block_size=4),
}
B, T, S, H, D = 2, 3, 21, 2, 8
N, K, LATENT, VALUE = 2, 5, 8, 6
PAGES, PAGE_SIZE = 12, 4
TILES = hj.Tiles(queries=2, keys=128)


class Call(NamedTuple):
    """A function of arrays alone, and arrays for it."""

    function: Callable[..., Any]
    arrays: tuple[Any, ...]


ON_ONE_DEVICE = (
    *(f"{select}_{method}" for select in ("select", "select_packed", "select_paged") for method in METHODS),
    "select_without_scores", "sparse_mla", "sparse_mla_paged", "sparse_attention",
    "sparse_attention_paged", "indexer_kl", "indexer_kl_of_all", "append", "truncate",
    "copy_pages", "init_cache", "quantize_keys", "quantize_queries", "compare",
)  # fmt: skip
ON_A_MESH = (
    "select_on_a_mesh", "select_paged_on_a_mesh", "sparse_mla_on_a_mesh", "sparse_mla_paged_on_a_mesh",
    "append_on_a_mesh", "truncate_on_a_mesh", "copy_pages_on_a_mesh",
)  # fmt: skip


@functools.cache
def every() -> dict[str, Call]:
    """By name, `ON_ONE_DEVICE` and `ON_A_MESH`; what has a gradient returns that, too."""
    q, k, w = map(jnp.asarray, draw.inputs(B, T, S, H, D))
    packed_q, packed_k, packed_w = q.reshape(-1, H, D), k.reshape(-1, D)[:40], w.reshape(-1, H)
    lengths = jnp.array([S, 0], jnp.int32)  # one sequence has no keys
    positions = jnp.array([[20, 7, -1], [3, 2, 1]], jnp.int32)
    cu_q, cu_k = jnp.array([0, 2, 5], jnp.int32), jnp.array([0, 21, 40], jnp.int32)  # the last query is padding

    rng = np.random.default_rng(0)
    mla_q, latents = (jnp.asarray(rng.normal(size=(B, n, LATENT)), jnp.float32) for n in (T * N, S))
    mla_q = mla_q.reshape(B, T, N, LATENT)
    indices = np.stack([[rng.permutation(S)[:K] for _ in range(T)] for _ in range(B)]).astype(np.int32)
    indices[:, 1, 2:], indices[1, 2] = -1, -1  # lists with an end, and an empty one
    indices, sink = jnp.asarray(indices), jnp.zeros((N,), jnp.float32)

    latent = dict(latent_dim=LATENT, latent_dtype=jnp.float32)
    empty = hj.init_cache(PAGES, PAGE_SIZE, D, jnp.float32, sketch="int4", **latent)
    tables, none = jnp.array([[5, 0, 3, 7, 1, 2], [4, 8, 9, 10, 11, 6]], jnp.int32), jnp.zeros((2,), jnp.int32)
    new = (empty, packed_k, tables, cu_k, none, latents.reshape(-1, LATENT)[:40])
    cache, after, fewer = _append(*new), jnp.diff(cu_k), jnp.array([17, 19], jnp.int32)
    copied = cache, jnp.array([5, 0], jnp.int32), jnp.array([6, -1], jnp.int32)
    paged = packed_q, packed_w, cache, tables, cu_q, after
    mla_paged = mla_q.reshape(-1, N, LATENT), cache, indices.reshape(-1, K), tables, cu_q

    grouped_q, *kv = (jnp.asarray(rng.normal(size=(B, *n, 8)), jnp.float32) for n in ((T, 4), (S, 2), (S, 2)))
    kv_pages = (x[0, : S // PAGE_SIZE * PAGE_SIZE].reshape(-1, PAGE_SIZE, 2, 8) for x in kv)
    grouped_paged = grouped_q.reshape(-1, 4, 8), *kv_pages, indices.reshape(-1, K), positions.reshape(-1), tables, cu_q

    on_mesh = dict(mesh=jax.make_mesh((1,), ("data",)), context_axis="data")
    attend = dict(scale=0.3, value_dim=VALUE, return_lse=True)
    hisa = dict(method=METHODS["hisa"], tiles=TILES, return_scores=True, return_blocks=True)
    calls = {
        "select_without_scores": Call(
            lambda q, k, w: hj.select(q, hj.quantize_keys(k), w, METHODS["hisa"], tiles=TILES), (q, k, w)
        ),
        "sparse_mla": Call(
            _with_gradient(lambda q, kv, at, sink: hj.sparse_mla(q, kv, at, sink=sink, **attend)),
            (mla_q, latents, indices, sink),
        ),
        "sparse_mla_paged": Call(_with_gradient(functools.partial(hj.sparse_mla_paged, **attend)), mla_paged),
        "sparse_attention": Call(_with_gradient(_attend), (grouped_q, *kv, indices, positions, jnp.zeros((4,)))),
        "sparse_attention_paged": Call(_with_gradient(_attend_pages), grouped_paged),
        "indexer_kl": Call(
            _with_gradient(lambda *arrays: hj.indexer_kl(*arrays[:-1], scale=0.3, indices=arrays[-1])),
            (q, k, w, mla_q, latents, indices),
        ),
        "indexer_kl_of_all": Call(
            _with_gradient(functools.partial(hj.indexer_kl, scale=0.3)), (q, k, w, mla_q, latents)
        ),
        "append": Call(_append, new),
        "truncate": Call(functools.partial(hj.truncate, max_tokens=5), (cache, tables, after, fewer)),
        "copy_pages": Call(hj.copy_pages, copied),
        "init_cache": Call(lambda: hj.init_cache(3, 4, 8, jnp.float8_e4m3fn), ()),
        "quantize_keys": Call(lambda k: hj.quantize_keys(k, scale="ue8m0"), (k,)),
        "quantize_queries": Call(lambda q, w: hj.quantize_queries(q, w, jnp.int8), (q, w)),
        "compare": Call(hj.compare, (hj.select(q, k, w, **hisa), hj.select(q, k, w, **hisa | dict(method=hj.Hisa())))),
        "select_on_a_mesh": Call(functools.partial(hj.select, **hisa, **on_mesh), (q, k[:, :20], w)),
        "select_paged_on_a_mesh": Call(functools.partial(hj.select_paged, **hisa, **on_mesh), paged),
        "sparse_mla_on_a_mesh": Call(functools.partial(hj.sparse_mla, **attend, **on_mesh), (mla_q, latents, indices)),
        "sparse_mla_paged_on_a_mesh": Call(functools.partial(hj.sparse_mla_paged, **attend, **on_mesh), mla_paged),
        "append_on_a_mesh": Call(functools.partial(_append, **on_mesh), new),
        "truncate_on_a_mesh": Call(
            functools.partial(hj.truncate, max_tokens=5, **on_mesh), (cache, tables, after, fewer)
        ),
        "copy_pages_on_a_mesh": Call(functools.partial(hj.copy_pages, **on_mesh), copied),
    }
    for name, method in METHODS.items():
        options = dict(method=method, tiles=TILES, return_scores=True, return_blocks=method.has_blocks)
        calls |= {
            f"select_{name}": Call(functools.partial(_select, **options), (q, k, w, lengths, positions)),
            f"select_packed_{name}": Call(
                functools.partial(hj.select_packed, **options), (packed_q, packed_k, packed_w, cu_q, cu_k)
            ),
            f"select_paged_{name}": Call(functools.partial(hj.select_paged, **options), paged),
        }
    return calls


def _select(q, k, w, lengths, query_positions, **options):
    return hj.select(q, k, w, lengths=lengths, query_positions=query_positions, **options)


def _attend(q, k, v, indices, query_positions, sink):
    options = dict(scale=0.3, block_size=2, query_positions=query_positions, sink=sink, return_lse=True)
    return hj.sparse_attention(q, k, v, indices, **options)


def _attend_pages(q, k, v, indices, query_positions, block_tables, cu_seqlens_q):
    options = dict(scale=0.3, block_size=2, query_positions=query_positions, return_lse=True)
    return hj.sparse_attention_paged(q, k, v, indices, block_tables, cu_seqlens_q, **options)


def _append(cache, k, block_tables, cu_seqlens, lengths, latents, **options):
    return hj.append(cache, k, block_tables, cu_seqlens, lengths, latents=latents, **options)


def _with_gradient(function: Callable[..., Any]) -> Callable[..., Any]:
    """What it returns, and the gradients of a sum over it by all float32 arguments."""

    def call(*arrays):
        leaves, structure = jax.tree.flatten(arrays)
        floats = {i: x for i, x in enumerate(leaves) if x.dtype == jnp.float32}

        def total(floats):
            out = function(*jax.tree.unflatten(structure, [floats.get(i, x) for i, x in enumerate(leaves)]))
            # The logsumexp of nothing is -inf, which may not be squared.
            finite = [jnp.where(jnp.isfinite(x), x, 0) for x in jax.tree.leaves(out)]
            return functools.reduce(jnp.add, [jnp.sum(x * x) for x in finite]), out

        gradients, out = jax.grad(total, has_aux=True)(floats)
        return out, gradients

    return call
