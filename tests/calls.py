"""Every public call that takes arrays, at a small size: for tests of what must hold for all of them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import hisa_jax as hj
from tests import draw

METHODS = {
    "dsa": hj.Dsa(topk=6),
    "hisa": hj.Hisa(topk=6, block_size=4, block_topk=3),
    "block_sparse": hj.BlockSparse(topk=12, block_size=4),
}
B, T, S, H, D = 2, 3, 21, 2, 8
N, K, LATENT, VALUE = 2, 5, 8, 6
PAGES, PAGE_SIZE = 12, 4
TILES = hj.Tiles(queries=2, keys=128)


class Call(NamedTuple):
    """A call of arrays alone, and arrays for it; `is_differentiable` by those of them that are float32."""

    function: Callable[..., Any]
    arrays: tuple[Any, ...]
    is_differentiable: bool = False


def every(mesh: jax.sharding.Mesh) -> dict[str, Call]:
    """By name; what runs on a mesh takes its axis "data"."""
    rng = np.random.default_rng(0)
    q, k, w = map(jnp.asarray, draw.inputs(B, T, S, H, D))
    lengths = jnp.array([S, 0], jnp.int32)  # one sequence with padding rows alone
    positions = jnp.array([[20, 7, -1], [3, 2, 1]], jnp.int32)
    cu_q, cu_k = jnp.array([0, 2, 5], jnp.int32), jnp.array([0, 21, 40], jnp.int32)
    packed_q, packed_k, packed_w = q.reshape(-1, H, D), k.reshape(-1, D), w.reshape(-1, H)
    absorbed, latents = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((B, T, N, LATENT), (B, S, LATENT)))
    chosen = np.stack([[rng.permutation(S)[:K] for _ in range(T)] for _ in range(B)]).astype(np.int32)
    chosen[:, 1, 2:], chosen[1, 2] = -1, -1  # a list with an end, and an empty one
    chosen, sink = jnp.asarray(chosen), jnp.zeros((N,), jnp.float32)
    empty = hj.init_cache(PAGES, PAGE_SIZE, D, jnp.float32, latent_dim=LATENT, latent_dtype=jnp.float32)
    tables = jnp.array([[5, 0, 3, 7, 1, 2], [4, 8, 9, 10, 11, 6]], jnp.int32)
    cu_new, none = jnp.array([0, 21, 40], jnp.int32), jnp.zeros((2,), jnp.int32)
    new = packed_k[:40], latents.reshape(-1, LATENT)[:40]
    cache = hj.append(empty, new[0], tables, cu_new, none, latents=new[1])
    after = jnp.array([21, 19], jnp.int32)
    on_mesh = dict(mesh=mesh, context_axis="data")
    attend = dict(scale=0.3, value_dim=VALUE, return_lse=True)
    rows = chosen.reshape(-1, K)
    in_kv = jnp.asarray(chosen)

    calls = {
        "sparse_mla": Call(
            lambda q, kv, at, sink: hj.sparse_mla(q, kv, at, sink=sink, **attend), (absorbed, latents, in_kv, sink), True
        ),
        "sparse_mla_paged": Call(
            lambda q, *rest: hj.sparse_mla_paged(q, *rest, **attend),
            (absorbed.reshape(-1, N, LATENT), cache, rows, tables, cu_q),
            True,
        ),
        "indexer_kl": Call(
            lambda q, k, w, aq, kv, at: hj.indexer_kl(q, k, w, aq, kv, scale=0.3, indices=at),
            (q, k, w, absorbed, latents, in_kv),
            True,
        ),
        "indexer_kl_dense": Call(
            lambda *arrays: hj.indexer_kl(*arrays, scale=0.3), (q, k, w, absorbed, latents), True
        ),
        "append": Call(
            lambda cache, k, *rest: hj.append(cache, k, *rest[:-1], latents=rest[-1]),
            (empty, new[0], tables, cu_new, none, new[1]),
        ),
        "truncate": Call(
            lambda *arrays: hj.truncate(*arrays, max_tokens=5), (cache, tables, after, jnp.array([17, 19], jnp.int32))
        ),
        "copy_pages": Call(hj.copy_pages, (cache, jnp.array([5, 0], jnp.int32), jnp.array([6, -1], jnp.int32))),
        "init_cache": Call(lambda: hj.init_cache(3, 4, 8, jnp.float8_e4m3fn), ()),
        "quantize_keys": Call(lambda k: hj.quantize_keys(k, scale="ue8m0"), (k,)),
        "quantize_queries": Call(lambda q, w: hj.quantize_queries(q, w, jnp.int8), (q, w)),
        "append_sharded": Call(
            lambda cache, k, *rest: hj.append_sharded(cache, k, *rest[:-1], latents=rest[-1], **on_mesh),
            (empty, new[0], tables, cu_new, none, new[1]),
        ),
        "truncate_sharded": Call(
            lambda *arrays: hj.truncate_sharded(*arrays, max_tokens=5, **on_mesh),
            (cache, tables, after, jnp.array([17, 19], jnp.int32)),
        ),
        "copy_pages_sharded": Call(
            lambda *arrays: hj.copy_pages_sharded(*arrays, **on_mesh),
            (cache, jnp.array([5, 0], jnp.int32), jnp.array([6, -1], jnp.int32)),
        ),
        "sparse_mla_sharded": Call(
            lambda *arrays: hj.sparse_mla_sharded(*arrays, **attend, **on_mesh), (absorbed, latents, in_kv)
        ),
        "sparse_mla_paged_sharded": Call(
            lambda q, *rest: hj.sparse_mla_paged_sharded(q, *rest, **attend, **on_mesh),
            (absorbed.reshape(-1, N, LATENT), cache, rows, tables, cu_q),
        ),
    }
    for name, method in METHODS.items():
        options = dict(tiles=TILES, return_scores=True, return_blocks=method.has_blocks)

        def select(q, k, w, lengths, positions, method=method, options=options):
            return hj.select(q, k, w, method, lengths=lengths, query_positions=positions, **options)

        def fewer(q, k, w, method=method):  # a program of other branches: scores are not asked for
            return hj.select(q, hj.quantize_keys(k), w, method, tiles=TILES)

        def select_packed(q, k, w, cu_q, cu_k, method=method, options=options):
            return hj.select_packed(q, k, w, cu_q, cu_k, method, **options)

        def select_paged(q, w, *rest, method=method, options=options):
            return hj.select_paged(q, w, *rest, method, **options)

        def select_sharded(q, k, w, method=method, options=options):
            return hj.select_sharded(q, k, w, method, **options, **on_mesh)

        def select_paged_sharded(q, w, *rest, method=method, options=options):
            return hj.select_paged_sharded(q, w, *rest, method, **options, **on_mesh)

        paged = (packed_q, packed_w, cache, tables, cu_q, after)
        calls |= {
            f"select_{name}": Call(select, (q, k, w, lengths, positions)),
            f"select_quantized_{name}": Call(fewer, (q, k, w)),
            f"select_packed_{name}": Call(select_packed, (packed_q, packed_k, packed_w, cu_q, cu_k)),
            f"select_paged_{name}": Call(select_paged, paged),
            f"select_sharded_{name}": Call(select_sharded, (q, k[:, :20], w)),
            f"select_paged_sharded_{name}": Call(select_paged_sharded, paged),
        }
    selection = select(q, k, w, None, None)
    return calls | {"compare": Call(hj.compare, (selection, selection))}
