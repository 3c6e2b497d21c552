"""FlashInfer-Bench's rules for its DSA indexers, in NumPy, and what its definition computes, in float64.

Written from `DsaTopkIndexerEvaluator` of its repository (bench/evaluators/dsa_topk_indexer.py, at 40e6ca7; releases to
0.1.2 do not have it yet): ids must be of the request's own tokens and differ, and their scores, sorted, must be those
of the reference to 0.01, relative or absolute. Which of equal scores are chosen, and in what order, does not matter.
"""

from typing import NamedTuple

import ml_dtypes
import numpy as np

TOLERANCE = 1e-2


class Inputs(NamedTuple):
    """The definition's five, in its order."""

    q_index_fp8: np.ndarray
    k_index_cache_fp8: np.ndarray
    weights: np.ndarray
    seq_lens: np.ndarray
    block_table: np.ndarray


def draw(lengths, n_pages, *, H=64, D=128, size=64, seed=0, drift=0.0):
    """Random inputs for requests of these lengths; with `drift`, neighbouring keys are alike, as those of text are."""
    rng = np.random.default_rng(seed)
    P = max(-(-max(lengths) // size), 1)
    table = np.full((len(lengths), P), n_pages + 7, np.int32)  # not to be read past the last token
    free = rng.permutation(n_pages)
    for row, length in zip(table, lengths, strict=True):
        need = -(-length // size)
        row[:need], free = free[:need], free[need:]
    k = rng.standard_normal((n_pages, size, D)).astype(np.float32)
    common = rng.standard_normal((n_pages, 1, D)).astype(np.float32)
    k = k + np.float32(drift) * common
    scale = np.maximum(np.abs(k).max(-1, keepdims=True), 1e-4) / 448
    values = (k / scale).astype(ml_dtypes.float8_e4m3fn)
    parts = values.view(np.int8).reshape(n_pages, -1), scale.astype(np.float32).view(np.int8).reshape(n_pages, -1)
    cache = np.concatenate(parts, axis=1).reshape(n_pages, size, 1, D + 4)
    q = np.clip(rng.standard_normal((len(lengths), H, D)), -2, 2).astype(ml_dtypes.float8_e4m3fn)
    weights = rng.standard_normal((len(lengths), H)).astype(np.float32)
    return Inputs(q, cache, weights, np.array(lengths, np.int32), table)


def scores_of(inputs):
    """For each request the score of each of its tokens, float64, in order."""
    n, size, _, width = inputs.k_index_cache_fp8.shape
    D = width - 4
    pages = inputs.k_index_cache_fp8.reshape(n, size * width)
    values = np.ascontiguousarray(pages[:, : size * D]).view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    scales = np.ascontiguousarray(pages[:, size * D :]).view(np.float32).astype(np.float64)
    keys = values.reshape(n, size, D) * scales[..., None]
    found = []
    for q, w, length, row in zip(inputs.q_index_fp8, inputs.weights, inputs.seq_lens, inputs.block_table, strict=True):
        own = keys[row[: -(-length // size)]].reshape(-1, D)[:length]
        found.append(w.astype(np.float64) @ np.maximum(q.astype(np.float64) @ own.T, 0))
    return found


def positions_of(ids, inputs):
    """For each request the positions of its chosen tokens; raises AssertionError for an id that breaks the rules."""
    size = inputs.k_index_cache_fp8.shape[1]
    found = []
    for b, (row, length, chosen) in enumerate(zip(inputs.block_table, inputs.seq_lens, np.asarray(ids), strict=True)):
        place = {page: i for i, page in enumerate(row[: -(-length // size)].tolist())}
        real = chosen[chosen >= 0]
        positions = [place.get(id // size, 10**9) * size + id % size for id in real.tolist()]
        assert all(position < length for position in positions), f"request {b}: an id of none of its tokens"
        assert len(set(real.tolist())) == len(real), f"request {b}: an id twice"
        found.append(np.array(positions, np.int64))
    return found


def judge(ids, inputs, topk):
    """Raises AssertionError unless the flat indexer's tokens are chosen, by the rules of the benchmark."""
    ids = np.asarray(ids)
    assert ids.shape == (len(inputs.seq_lens), topk) and ids.dtype == np.int32
    for b, (scores, positions) in enumerate(zip(scores_of(inputs), positions_of(ids, inputs), strict=True)):
        best, chosen = -np.sort(-scores)[:topk], -np.sort(-scores[positions])
        assert len(chosen) == len(best), f"request {b}: {len(chosen)} tokens, wanted {len(best)}"
        error = np.abs(chosen - best)
        is_bad = (error > TOLERANCE) & (error > TOLERANCE * np.abs(best))
        assert not is_bad.any(), f"request {b}: scores differ by {error.max():.3g}"


def recall(ids, inputs, topk):
    """The share of the best tokens by the reference that were chosen, over all requests."""
    hits = total = 0
    for scores, positions in zip(scores_of(inputs), positions_of(ids, inputs), strict=True):
        best = np.argsort(-scores, kind="stable")[:topk]
        hits, total = hits + np.isin(best, positions).sum(), total + len(best)
    return hits / total
