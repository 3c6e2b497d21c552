"""Small valid arguments of the public calls, by name; tests change one of them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

import hisa_jax as hj

F32 = jnp.float32
DSA = hj.Dsa(topk=4)
MESH_OF_ONE = functools.cache(lambda: jax.make_mesh((1,), ("context",)))


def ints(*values):
    return np.array(values, np.int32)


def batch():
    return dict(q=np.ones((2, 3, 4, 16), np.float32), k=np.ones((2, 40, 16), np.float32),
                w=np.ones((2, 3, 4), np.float32), method=DSA)  # fmt: skip


def pages(latent_dim=None):
    return hj.init_cache(4, 16, 8, F32, latent_dim=latent_dim, latent_dtype=F32)


def paged():
    return dict(q=np.ones((3, 4, 8), np.float32), w=np.ones((3, 4), np.float32), cache=pages(),
                block_tables=ints([0, 1], [2, -1]), cu_seqlens_q=ints(0, 2, 3), lengths=ints(0, 0),
                budget=ints(1, 1, 1), method=DSA)  # fmt: skip


def mla():
    return dict(q=np.ones((2, 3, 4, 24), np.float32), kv=np.ones((2, 40, 24), np.float32),
                indices=np.zeros((2, 3, 5), np.int32), scale=0.1, value_dim=16)  # fmt: skip


def mla_paged():
    return dict(q=np.ones((3, 4, 24), np.float32), cache=pages(24), indices=np.zeros((3, 5), np.int32),
                block_tables=ints([0, 1], [2, -1]), cu_seqlens_q=ints(0, 2, 3), scale=0.1, value_dim=16)  # fmt: skip


def grouped():
    kv = np.ones((2, 40, 2, 16), np.float32)
    return dict(q=np.ones((2, 3, 4, 16), np.float32), k=kv, v=kv, indices=np.zeros((2, 3, 5), np.int32), scale=0.1,
                query_positions=np.zeros((2, 3), np.int32))  # fmt: skip


def grouped_paged():
    pages = np.ones((4, 16, 2, 16), np.float32)
    return dict(q=np.ones((3, 4, 16), np.float32), k=pages, v=pages, indices=np.zeros((3, 5), np.int32), scale=0.1,
                query_positions=ints(0, 1, 2), block_tables=ints([0, 1], [2, -1]),
                cu_seqlens_q=ints(0, 2, 3))  # fmt: skip


def new_tokens():
    return dict(cache=pages(), k=np.ones((5, 8), np.float32), block_tables=ints([0, 1], [2, -1]),
                cu_seqlens=ints(0, 2, 5), lengths=ints(0, 0))  # fmt: skip


def lost_tokens():
    return dict(cache=pages(), block_tables=ints([0, 1], [2, -1]), lengths=ints(0, 0), new_lengths=ints(0, 0),
                max_tokens=4)  # fmt: skip


def copies():
    return dict(cache=pages(), source=ints(0, 1), target=ints(2, 3))


def over_context(**more):
    return dict(mesh=MESH_OF_ONE(), context_axis="context", **more)
