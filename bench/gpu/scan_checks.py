"""Results of the scan's rows against NumPy and XLA, for a few queries of each."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import hisa_jax as hj
from bench.gpu.checks import TOKENS, check_tokens, checked_rows, scores_of
from bench.gpu.inputs import Inputs
from hisa_jax.kernels_pallas.flat_call import flatten
from hisa_jax.kernels_pallas.mosaic_gpu import stages
from hisa_jax.kernels_pallas.operands import ScanHeads
from hisa_jax.kernels_pallas.sort_key import score_of
from hisa_jax.layout import Call, Contiguous, Keys, Queries
from hisa_jax.xla import scan

_SURE = 0.98  # of the candidates: near their threshold Hopper's sums of e4m3 products may keep others
_SPREAD = 4096  # keys that tell how far a query's scores spread
_SLOPES = 0.05  # of the virtual head's largest number: a head that is barely open may count at one sample fewer


def check_scan(out: Any, inputs: Inputs, method: hj.Scan) -> None:
    """`out`: indices and count, [B, T, ...]: the best of a set that holds the best of hardly fewer by the scan.

    By the kernel's own heads, which `check_scan_heads` compares: where rounding makes another sample the 32nd best,
    slopes differ, and with them which tokens are near the threshold.
    """
    # Only the first and the last sequence are compared. `call` below is a constant of a compiled program: 4 GB, if it
    # had all of 128 sequences of a million tokens.
    ends = np.asarray(sorted({0, len(inputs.k) - 1}))
    inputs, out = jax.tree.map(lambda x: x[ends], inputs), [x[ends] for x in out]
    q, k, k_scale, w, visible = inputs
    T, n_kept = visible.shape[1], max(int(_SURE * method.block_topk), method.topk)
    call = flatten(Call(q=q, w=w, visible=visible, k=Keys(k, k_scale)), 1)
    heads = jax.jit(lambda *x: stages.scan_heads(dataclasses.replace(call, q=x[0], w=x[1]), method))(call.q, call.w)
    for b, t in checked_rows(*visible.shape):
        chosen, seen = np.asarray(out[0][b, t]), int(visible[b, t])
        if method.sketch is None:
            scores = scan_scores(heads, inputs, b, t, b * T + t)
            # The ends are always kept.
            kept = np.argsort(-np.r_[np.inf, scores[1:-1], np.inf], kind="stable")[:n_kept]
        else:
            kept = _kept_by_xla(inputs, b, t, dataclasses.replace(method, candidates=n_kept))
        tokens = np.union1d(kept, chosen[chosen >= 0])
        assert (tokens < seen).all()
        scores, some = (
            scores_of(q[b, t], k[b, at], None if k_scale is None else k_scale[b, at], w[b, t])
            for at in (tokens, np.arange(0, seen, max(seen // _SPREAD, 1)))
        )
        check_tokens(chosen, out[1][b, t], scores, tokens, method.topk, float(some.std()))


def _kept_by_xla(inputs: Inputs, b: int, t: int, method: hj.Scan) -> np.ndarray:
    q, k, k_scale, w, visible = inputs
    keys = k[b : b + 1] if k_scale is None else hj.QuantizedKeys(k[b : b + 1], k_scale[b : b + 1])
    at = slice(b, b + 1), slice(t, t + 1)
    options: Any = dict(query_positions=visible[at] - 1, implementation="xla", return_blocks=True)
    kept = np.asarray(hj.select(q[at], keys, w[at], method, **options).blocks).ravel()
    return kept[kept >= 0]


def check_scan_heads(heads: ScanHeads, inputs: Inputs, method: hj.Scan) -> None:
    """Of a batch of one sequence, as those below."""
    q, k, k_scale, w, visible = inputs
    keys = Keys(k[0], None if k_scale is None else k_scale[0])
    heads_of = jax.jit(lambda own, keys: scan.heads_of(own, Contiguous(keys, jnp.int32(0), k.shape[1]), method))
    for t in queries_of(inputs):
        wanted = heads_of(Queries(q[0, t][None], w[0, t][None], visible[0, t][None]), keys)
        rows, weights = np.asarray(heads.q[t], np.float32), np.asarray(heads.w[t])
        n, virtual = heads.n_linear, np.asarray(wanted.virtual[0])
        assert np.abs(weights[:n] @ rows[:n] - virtual).max() <= _SLOPES * np.abs(virtual).max()
        np.testing.assert_array_equal(rows[n : heads.n], np.asarray(wanted.exact[0], np.float32))
        np.testing.assert_array_equal(weights[n : heads.n], wanted.w[0])
        assert not rows[heads.n :].any() and not weights[heads.n :].any()


def check_thresholds(threshold: Array, heads: ScanHeads, inputs: Inputs, step: int, rank: int) -> None:
    """About `rank` of every `step`-th key reach it."""
    for t in queries_of(inputs):
        scores = scan_scores(heads, inputs, 0, t, t)[::step]
        count = int((scores >= float(score_of(jnp.asarray(threshold[t])))).sum())
        assert abs(count - rank) <= 2 + rank // 50, (count, rank)


def check_masks(masks: Array, threshold: Array, heads: ScanHeads, inputs: Inputs) -> None:
    """A bit says whether a key reaches the threshold, but for those near it; those of the two ends are set."""
    for t in queries_of(inputs):
        scores, least = scan_scores(heads, inputs, 0, t, t), float(score_of(jnp.asarray(threshold[t])))
        got = bits_of(masks[t])[: len(scores)]
        assert got[0] and got[-1]
        differs = np.flatnonzero(got != (scores >= least))
        differs = differs[(differs > 0) & (differs < len(scores) - 1)]
        assert (np.abs(scores[differs] - least) < TOKENS * scores.std()).all()


def check_lists(out: Any, masks: Array, visible: Array) -> None:
    tokens, count = (np.asarray(x) for x in out)
    for t in np.linspace(0, len(count) - 1, 6, dtype=int):
        wanted = np.flatnonzero(bits_of(masks[t])[: int(visible[0, t])])
        assert count[t] == len(wanted) <= tokens.shape[1]
        np.testing.assert_array_equal(tokens[t, : len(wanted)], wanted)
        assert (tokens[t, len(wanted) :] == -1).all()


def check_refined(out: Any, tokens: Array, inputs: Inputs, topk: int) -> None:
    q, k, k_scale, w, _ = inputs
    for t in queries_of(inputs):
        own = np.asarray(tokens[t])
        scores = scores_of(q[0, t], k[0, own], None if k_scale is None else k_scale[0, own], w[0, t])
        check_tokens(out[0][t], out[1][t], scores, own, topk)


def queries_of(inputs: Inputs) -> list[int]:
    return [t for b, t in checked_rows(*inputs.visible.shape) if b == 0]


def scan_scores(heads: ScanHeads, inputs: Inputs, b: int, t: int, row: int) -> np.ndarray:
    """[visible] float32: the scores of the keys that query t of sequence b sees, by its row of `heads`."""
    seen, rows = int(inputs.visible[b, t]), np.asarray(heads.q[row], np.float32)
    products = np.asarray(inputs.k[b, :seen], np.float32) @ rows.T
    products[:, heads.n_linear :] = np.maximum(products[:, heads.n_linear :], 0)
    scores = products @ np.asarray(heads.w[row])
    return scores if inputs.k_scale is None else scores * np.asarray(inputs.k_scale[b, :seen])


def bits_of(words: Array) -> np.ndarray:
    """[n] int32 -> [32 n] bool, the lowest bit of the first word first."""
    return np.unpackbits(np.asarray(words).astype("<i4").view(np.uint8), bitorder="little").astype(bool)
