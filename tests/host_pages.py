"""Requests whose keys lie in another program's pages, packed here byte by byte, and what the oracle chooses of them."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

import hisa_jax as hj
from hisa_jax.integrations.streamindex import streamindex_topk
from hisa_jax.testing.oracle import methods as oracle
from hisa_jax.testing.oracle.compare import assert_same_selection
from tests import draw

D, PAGE, P = 64, 64, 5


class Request(NamedTuple):
    """`length` tokens, of which the last `n_queries` are queries."""

    length: int
    n_queries: int


# A decode step, one with nothing, a prefill chunk; then what the distribution says is none.
REQUESTS = (Request(250, 1), Request(0, 0), Request(301, 7), Request(90, 2))
N_REAL = 3


class Batch(NamedTuple):
    """Arguments of the hosts' calls, and for the oracle the keys of each request."""

    arguments: dict
    keys: list
    ratio: int
    requests: tuple = REQUESTS

    def expected(self, method, visible=None):
        """The oracle's selection: query at p sees entries s with s * ratio <= p and s < length // ratio."""
        rows, q, w = [], *(np.asarray(self.arguments[name]) for name in ("q", "indexer_weights"))
        starts = np.asarray(self.arguments["cu_q_lens"])
        lengths = [len(keys.values) for keys in self.keys]
        for r, (length, n) in enumerate(self.requests[:N_REAL]):
            positions = np.arange(length - n, length) // self.ratio
            rows.append(np.minimum(positions, lengths[r] - 1))
        rows.append(np.full(len(q) - sum(map(len, rows)), -1))
        offsets = np.append(starts[: N_REAL + 1], [len(q)])
        every = hj.QuantizedKeys(*(np.concatenate([getattr(keys, part) for keys in self.keys]) for part in PARTS))
        ends = np.cumsum([0, *lengths[:N_REAL], 0])
        return oracle.select_packed(q, every, w.astype(np.float32), offsets, ends, method, np.concatenate(rows))


PARTS = ("values", "scales")


def packed(values, scales, layout):
    """[pages, PAGE, D] e4m3 and [pages, PAGE] powers of two -> the bytes of a host."""
    records = np.zeros((*values.shape[:2], 256), np.uint8)
    records[..., :D] = values.view(np.uint8)
    records[..., 128] = np.log2(scales) + 127
    if layout == "records":
        return records.reshape(-1, PAGE // 4, 4, 256)
    # Of the 256 bytes the first 132, down the rows.
    return records[..., :132].swapaxes(1, 2).reshape(-1, 33, 4, PAGE)


@functools.cache
def batch(layout="records", ratio=1, q_dtype="float32", H=4):
    """Pages in random order, normal data."""
    rng = np.random.default_rng(3)
    R, T = len(REQUESTS), sum(request.n_queries for request in REQUESTS) + 2  # two rows of padding
    table = rng.permutation(R * P).astype(np.int32).reshape(R, P)
    keys = rng.normal(size=(R * P, PAGE, D)).astype(np.float32)
    if layout == "bfloat16":
        values, scales = keys.astype(ml_dtypes.bfloat16), np.ones((R * P, PAGE), np.float32)
        cache = np.pad(values, ((0, 0), (0, 0), (0, 128 - D))).reshape(-1, PAGE // 2, 2, 128)
    else:
        values, scales = map(np.asarray, jax.tree.leaves(hj.quantize_keys(jnp.asarray(keys), scale="ue8m0")))
        cache = packed(values, scales, layout)
    of_requests = [
        hj.QuantizedKeys(
            *(x[table[r]].reshape(P * PAGE, *x.shape[2:])[: request.length // ratio] for x in (values, scales))
        )
        for r, request in enumerate(REQUESTS)
    ]
    arguments = dict(
        q=draw.cast(rng.normal(size=(T, H, D)), q_dtype),
        indexer_weights=rng.normal(size=(T, H)).astype(np.float32),
        cache_kv=cache,
        seq_lens=np.array([request.length for request in REQUESTS], np.int32),
        page_indices=table.reshape(-1),
        cu_q_lens=np.cumsum([0, *(request.n_queries for request in REQUESTS)]).astype(np.int32),
        distribution=np.array([1, 1, N_REAL], np.int32),
    )
    return Batch(jax.tree.map(jnp.asarray, arguments), of_requests, ratio)


def chosen(result):
    return dict(indices=result, count=np.sum(np.asarray(result) >= 0, axis=-1, dtype=np.int32))


def check(some, method, run=streamindex_topk, tolerance=1e-5, **options):
    """Runs a host's call and compares it with the oracle."""
    got = run(**some.arguments, k=method.topk, compression_ratio=some.ratio, method=method, **options)
    assert got.dtype == jnp.int32
    assert_same_selection(**chosen(got), reference=some.expected(method), tolerance=tolerance)
