"""Mistakes in functions of somebody else's: each breaks the promise of its name, and the inputs become small."""

import functools

import numpy as np
import pytest

import hisa_jax as hj
from hisa_jax import testing

FLAT = hj.Dsa(topk=3)


def scores_of(q, k, w):
    """[T, H, D], [S, D], [T, H] -> [T, S] float32."""
    with np.errstate(invalid="ignore", over="ignore"):
        return np.einsum("th,ths->ts", w, np.maximum(np.einsum("thd,sd->ths", q, k), 0))


def flat(q, k, w, query_positions=None, lengths=None, *, topk=3, mistake=""):
    """The flat indexer in NumPy, right but for the mistake."""
    q, k = q.astype(np.float32), k.astype(np.float32)
    (B, T), S = q.shape[:2], k.shape[1]
    lengths = np.full(B, S) if lengths is None else np.clip(lengths, 0, S)
    indices, count = np.full((B, T, topk), -1, np.int32), np.zeros((B, T), np.int32)
    for b in range(B):
        if mistake == "other sequences":
            k[b] += k[:, :1].mean()
        positions = lengths[b] - T + np.arange(T) if query_positions is None else query_positions[b].astype(int)
        if mistake == "first queries":
            positions = np.arange(T) if query_positions is None else positions
        w_b = np.abs(w[b]) if mistake == "magnitude of weights" else w[b]
        keys = np.where(np.isinf(k[b]), 0, k[b]) if mistake == "no infinity" else k[b]
        keys = keys - keys[: max(1, lengths[b])].mean(0) * 1e-3 if mistake == "mean of all keys" else keys
        keys = keys - keys[lengths[b] :].sum(0) * 1e-3 if mistake == "what was there before" else keys
        if mistake == "by capacity":
            keys = keys * (1 + np.arange(S)[:, None] % 7 * (S > 20))
        scores = scores_of(q[b], keys, w_b)
        if mistake == "by number of queries":
            scores += np.arange(S) % 3 * 0.3 * (T % 2)
        for t in range(T):
            position = max(positions[t], -1)
            position = abs(positions[t]) if mistake == "padding" else position
            visible = max(0, min(position + (2 if mistake == "one more" else 1), lengths[b]))
            visible = min(position + 1, S) if mistake == "no lengths" else visible
            visible = 0 if mistake == "clipping" and positions[t] >= S else visible
            row = scores[t, :visible]
            row = row if mistake == "nan first" else np.where(np.isnan(row), -np.inf, row)
            order = np.argsort(row if mistake == "lowest" else -row, kind="stable")
            if mistake == "higher position":
                order = len(row) - 1 - np.argsort(-row[::-1], kind="stable")
            if mistake == "nan first":
                order = np.argsort(~np.isnan(row)[order], kind="stable") if np.isnan(row).any() else order
            chosen = order[:topk] if mistake == "by score" else np.sort(order[:topk])
            if mistake == "one too few" and visible > topk:
                chosen = chosen[1:]
            if mistake == "last ones" and visible <= topk:
                chosen = chosen[1:]
            if mistake == "twice" and len(chosen) > 1:
                chosen[1] = chosen[0]
            n = len(chosen)
            at = slice(topk - n, topk) if mistake == "right aligned" else slice(n)
            indices[b, t, at], count[b, t] = chosen, n
    return (indices.astype(np.int64), count) if mistake == "int64" else (indices, count)


MISTAKES = {
    "int64": "int32", "one more": "causality", "no lengths": "bounds", "twice": "no_duplicates", "by score": "order",
    "right aligned": "padding", "padding": "padding_queries", "one too few": "count", "last ones": "count",
    "mean of all keys": "future", "what was there before": "missing", "by capacity": "capacity",
    "other sequences": "batch", "by number of queries": "chunks", "lowest": "best", "magnitude of weights": "best",
    "higher position": "ties", "nan first": "nan", "no infinity": "infinity", "clipping": "clipping",
}  # fmt: skip
LONG = ("by capacity", "by number of queries", "what was there before")  # as two of their own numbers are compared


def test_a_function_that_keeps_the_contract_passes():
    testing.check_contract(flat, FLAT)
    outcomes = {verdict.promise: verdict.outcome for verdict in testing.check_promises(flat, FLAT)}
    assert list(outcomes) == list(testing.PROMISES)
    assert {name for name, outcome in outcomes.items() if outcome != "kept"} == {"kept_blocks", "flat_if_all_fits"}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_broken_promise_is_named(mistake):
    with pytest.raises(testing.ContractError) as caught:
        testing.check_contract(functools.partial(flat, mistake=mistake), FLAT, seconds=2)
    case = caught.value.case
    assert caught.value.promise == MISTAKES[mistake]
    assert case.q.shape[0] <= 2 and case.q.shape[2] <= 2, caught.value
    assert case.k.shape[1] <= 8 or mistake in LONG, caught.value
