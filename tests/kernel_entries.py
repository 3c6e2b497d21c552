"""Keys that are entries, by kernels: in one piece, packed and in pages, against the oracle."""

import jax.numpy as jnp
import numpy as np

import hisa_jax as hj
from hisa_jax import dispatch
from hisa_jax.pallas import Kernels
from tests import draw, oracle


def methods(size):
    return {
        "dsa": hj.Dsa(topk=40, entry_size=4, tail="open"),
        "hisa": hj.Hisa(topk=40, block_size=size, block_topk=3, entry_size=4, tail="open"),
        "block_sparse": hj.BlockSparse(topk=3 * size, block_size=size, entry_size=4, returns="entries"),
    }


def check(monkeypatch, name, size, method, interpret):
    """Two sequences of which one ends with an entry's third token; blocks of `size` entries, and pages."""
    kernels = Kernels(lambda: dispatch.backend(name), flat_if_all_kept=name == "mosaic_tpu", interpret=interpret)
    own = dispatch.Implementation(why_not=lambda device, problem: None, select=kernels.select)
    monkeypatch.setitem(dispatch.IMPLEMENTATIONS, name, own)
    method, r, n = methods(size)[method], 4, np.array([3 * size + 8, 3 * size + 5])
    q, k, w = (x[0] for x in draw.inputs(1, 5, n.sum(), 16, 64, dtype="bfloat16"))
    cu_q, cu_k = np.array([0, 2, 5], np.int32), np.array([0, *np.cumsum(n)], np.int32)
    lengths = (n * r + [3, 0]).astype(np.int32)
    wanted = oracle.select_packed(q, k, w, cu_q, cu_k, method, lengths=lengths)
    options = dict(implementation=name)
    q, w, cu_q, lengths = map(jnp.asarray, (q, w, cu_q, lengths))

    packed = hj.select_packed(q, jnp.asarray(k), w, cu_q, jnp.asarray(cu_k), method, lengths=lengths, **options)
    alone = hj.select(q[None, :2], jnp.asarray(k)[None, : n[0]], w[None, :2], method, lengths=lengths[:1], **options)
    table = jnp.asarray(np.random.default_rng(0).permutation(10).reshape(2, 5), jnp.int32)
    cache, starts = hj.init_cache(10, size, 64, jnp.bfloat16, entry_size=r), jnp.asarray(cu_k * r)
    cache = hj.append(cache, jnp.asarray(np.repeat(k, r, axis=0)), table, starts, jnp.array([0, 0]))
    pages = hj.select_paged(q, w, cache, table, cu_q, lengths, method, **options)
    for got in (packed, pages):
        oracle.assert_same_selection(got.indices, got.count, wanted, 2e-2)
    np.testing.assert_array_equal(alone.count[0], wanted.count[:2])
