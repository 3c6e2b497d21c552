"""Which tokens each method chooses: flat (Dsa), hierarchical (Hisa), block-sparse (BlockSparse) and scanned (Scan).

A method is told by the name of its class and read by attribute, so that nothing of hisa_jax is imported here.
"""

import dataclasses
from typing import Any, NamedTuple

import numpy as np

from . import entries
from .scan import Scanned, scan_query, unit_scores
from .scores import block_means, float64, token_scores


@dataclasses.dataclass(frozen=True, kw_only=True)
class OracleSelection:
    """What the contract says is chosen, and what a comparison has to know. `..` is [B, T], or [T] if packed.

    Where keys are entries, read "entry" for "token", but for `indices`, `tokens` and `positions`.

    Attributes:
        indices: [.., topk] int32 positions in the sequence, ascending, then -1. With entries as the method hands out.
        count: [..] int32, how many are real.
        scores: [.., topk] float64, the score of each chosen token, or of its entry, infinity for those of the tail,
            -inf where `indices` is -1.
        blocks: [..] arrays [kept] int32, the kept blocks, ascending; empty for Dsa.
        token_scores: [..] arrays [visible] float64, NaN as -inf.
        block_scores: [..] arrays [eligible] float64, NaN as -inf; empty for Dsa.
        token_scale, block_scale: [..] float64, what a tolerance is relative to; see `score_scale`.
        scanned: [..] objects, a `Scanned` of each query for Scan, else None.
        visible: [..] int32, how many tokens the query sees, up to which it may choose.
        tokens: [..] int32, how many tokens it sees, of entries or not.
        limit: [..] int32, how many it chooses at most; `kept_limit`: how many blocks it keeps at most.
        listed: [..] arrays of the tokens to choose from, None where all are.
        positions: [..] int32, of the query itself, -1 for padding.
        method: the method asked for.
    """

    indices: np.ndarray
    count: np.ndarray
    scores: np.ndarray
    blocks: np.ndarray
    token_scores: np.ndarray
    block_scores: np.ndarray
    token_scale: np.ndarray
    block_scale: np.ndarray
    scanned: np.ndarray
    visible: np.ndarray
    tokens: np.ndarray
    limit: np.ndarray
    kept_limit: np.ndarray
    listed: np.ndarray
    positions: np.ndarray
    method: Any


class Row(NamedTuple):
    """One query's part of an `OracleSelection`; `chosen` [count] are its tokens."""

    chosen: np.ndarray
    blocks: np.ndarray
    token_scores: np.ndarray
    block_scores: np.ndarray
    token_scale: float
    block_scale: float
    scanned: Scanned | None
    position: int
    tokens: int
    limit: int
    kept_limit: int
    listed: np.ndarray | None


class Limits(NamedTuple):
    """What limits the queries of a sequence: [T] lists of the tokens to choose from, or None; [T] budgets, or None."""

    listed: list[np.ndarray] | None = None
    budget: np.ndarray | None = None


def select(
    q, k, w, method, query_positions=None, lengths=None, candidates=None, candidate_size=1, budget=None
) -> OracleSelection:
    """[B, T, H, D], [B, S, D] or an object with .values [B, S, D] and .scales [B, S], [B, T, H] -> the selection.

    `lengths` [B] are clipped to [0, S]. `query_positions` [B, T]: below -1 counts as -1; by default the T queries are
    the last T of the tokens, and those before the start are padding. `candidates` [B, T, m], or [B, T, H, m]: blocks of
    `candidate_size`; `budget` [B, T]. `w` None: ones. Where the method chooses for each head, heads are the last axis.
    """
    values, scales = keys_and_scales(k)
    (B, T), (S, r) = np.shape(q)[:2], (values.shape[1], entries.size_of(method))
    if lengths is None:
        lengths = np.full(B, S * r if query_positions is None else S * r + r - 1)
    lengths = np.clip(np.asarray(lengths), 0, S * r + r - 1)
    rows = []
    for b in range(B):
        positions = last_positions(T, lengths[b]) if query_positions is None else np.asarray(query_positions)[b]
        limits = _limits(candidates, candidate_size, budget, b, S)
        weights = None if w is None else np.asarray(w)[b]
        rows += choose_rows(np.asarray(q)[b], values[b], scales[b], weights, positions, lengths[b], method, limits)
    return _collect(rows, (B, T, *_heads(q, method)), method)


def select_packed(
    q, k, w, cu_seqlens_q, cu_seqlens_k, method, query_positions=None, lengths=None, candidates=None, candidate_size=1,
    budget=None,
) -> OracleSelection:  # fmt: skip
    """[T, H, D], [N, D] (or .values, .scales), [T, H], [R + 1], [R + 1] -> the selection, indices within each sequence.

    By default each request's queries are its last tokens, of `lengths` [R]; `query_positions` [T] are within the
    sequence. Queries that belong to no request are padding. The rest as `select`, without B.
    """
    q, w, (values, scales) = np.asarray(q), None if w is None else np.asarray(w), keys_and_scales(k)
    (T, N), size = (len(q), len(values)), entries.size_of(method)
    cu_q, cu_k = np.clip(np.asarray(cu_seqlens_q), 0, T), np.clip(np.asarray(cu_seqlens_k), 0, N)
    nothing = choose_rows(q[:1], values[:0], scales[:0], None if w is None else w[:1], [-1], 0, method)
    rows = nothing * T
    for r in range(len(cu_q) - 1):
        mine, its_keys = slice(cu_q[r], cu_q[r + 1]), slice(cu_k[r], cu_k[r + 1])
        own, n_keys = len(q[mine]), len(values[its_keys])
        length = n_keys * size if lengths is None else np.clip(lengths[r], 0, n_keys * size + size - 1)
        positions = last_positions(own, length) if query_positions is None else np.asarray(query_positions)[mine]
        limits, weights = _limits(candidates, candidate_size, budget, mine, n_keys), None if w is None else w[mine]
        heads = len(nothing)
        rows[mine.start * heads : mine.stop * heads] = choose_rows(
            q[mine], values[its_keys], scales[its_keys], weights, positions, length, method, limits
        )
    return _collect(rows, (T, *_heads(q, method)), method)


def _heads(q, method) -> tuple[int, ...]:
    return np.shape(q)[-2:-1] if getattr(method, "per_head", False) else ()


def _limits(candidates, size: int, budget, at, S: int) -> Limits:
    """Those of the queries `at`, of a sequence of S keys; a list a query, or a list a query and head."""
    listed = None
    if candidates is not None:
        of_queries = np.asarray(candidates)[at].astype(np.int64)
        listed = [
            np.flatnonzero(np.isin(np.arange(S) // size, ids)) if ids.ndim == 1 else
            [np.flatnonzero(np.isin(np.arange(S) // size, of_head)) for of_head in ids]
            for ids in of_queries
        ]  # fmt: skip
    return Limits(listed, None if budget is None else np.asarray(budget)[at])


def choose_rows(q, k, k_scale, w, positions, length: int, method, limits: Limits = Limits()) -> list[Row]:  # noqa: B008
    """One sequence of so many tokens: [T, H, D], [S, D], [S], [T, H] or None, [T] -> T rows, or T * H for each head."""
    (T, H, D), (listed, budget) = np.shape(q), limits
    if getattr(method, "per_head", False):
        # Each head by itself: a query of one head, of weight 1.
        q, w, positions = np.reshape(q, (T * H, 1, D)), None, np.repeat(positions, H)
        budget = None if budget is None else np.repeat(budget, H)
        if listed is not None:
            listed = [of_head for ids in listed for of_head in (ids if isinstance(ids, list) else [ids] * H)]
    w = np.ones(np.shape(q)[:2]) if w is None else w
    positions = np.maximum(np.asarray(positions, np.int64), -1)
    n_tokens, activation = np.minimum(positions + 1, length), getattr(method, "activation", "relu")
    visible, length = n_tokens // entries.size_of(method), length // entries.size_of(method)
    has_means = has_blocks(method) and not is_scan(method) and not is_max(method)
    means = block_means(k, k_scale, method.block_size, length) if has_means else k[:0]
    blocks = _nan_is_worst(token_scores(q, means, w, activation=activation))
    k, k_scale = k[: visible.max(initial=0)], k_scale[: visible.max(initial=0)]
    tokens = _nan_is_worst(token_scores(q, k, w, k_scale, activation))
    token_bounds, block_bounds = _score_bounds(q, k, k_scale, w), _score_bounds(q, means, 1, w)
    rows = []
    for t, v in enumerate(visible):
        seen, eligible, bounds = tokens[t, :v], blocks[t, : eligible_blocks(v, method)], block_bounds[t]
        bounds, scanned = bounds[: len(eligible)], None
        if is_max(method):
            eligible = np.array([seen[i : i + method.block_size].max() for i in range(0, v, method.block_size)])
            bounds = token_bounds[t, :v]
        if is_scan(method):
            scanned = scan_query(q[t], k, k_scale, w[t], int(v), seen, method)
            eligible, bounds = unit_scores(scanned, method.unit), scanned.bounds
        limit, kept_limit = method.topk, most_blocks(method) if has_blocks(method) else 0
        if budget is not None and type(method).__name__ == "BlockSparse":
            kept_limit = min(kept_limit, max(int(budget[t]) // method.block_size, method.keep_first + method.keep_last))
        elif budget is not None:
            limit = min(limit, max(int(budget[t]), 0))
        own_list = None if listed is None else listed[t]
        kept = kept_blocks(eligible, method, kept_limit)
        chosen = best_of(candidates(kept, v, method, own_list), seen, limit)
        token_scale, block_scale = score_scale(seen, token_bounds[t, :v]), score_scale(eligible, bounds)
        rows.append(
            Row(
                chosen, kept, seen, eligible, token_scale, block_scale, scanned, int(positions[t]), int(n_tokens[t]),
                limit, kept_limit, own_list,
            )
        )  # fmt: skip
    return rows


def last_positions(T: int, length: int) -> np.ndarray:
    """[T]: the last T positions before `length`; negative, so padding, where there are not that many."""
    return int(length) - T + np.arange(T)


def has_blocks(method) -> bool:
    name = type(method).__name__
    if name not in ("Hisa", "Dsa", "BlockSparse", "Scan"):
        raise ValueError(f"oracle: method is a {name}, wanted Hisa, Dsa, BlockSparse or Scan")
    if name != "Dsa" and method.keep_last < 1 and not is_max(method):
        raise ValueError(f"oracle: {name}(keep_last={method.keep_last}): the query's own mean would decide")
    if name != "Dsa" and method.keep_first + method.keep_last > most_blocks(method):
        raise ValueError(f"oracle: {name} always keeps more blocks than its budget of {most_blocks(method)}")
    return name != "Dsa"


def is_scan(method) -> bool:
    return type(method).__name__ == "Scan"


def is_max(method) -> bool:
    """Whether a block scores what the best of its visible tokens does."""
    return getattr(method, "scored_by", "mean") == "max"


def block_size_of(method) -> int:
    """Tokens of a block, or of a unit of the scan."""
    return method.unit if is_scan(method) else method.block_size


def block_budget(method, eligible: int, limit: int | None = None) -> int:
    """How many of the `eligible` blocks a query keeps, of at most `limit`.

    With a ratio r it is one in r, rounded up, but so many that topk tokens can be had even if the last block holds one,
    and all that are forced.
    """
    limit = most_blocks(method) if limit is None else limit
    most, ratio = min(limit, eligible), getattr(method, "block_ratio", 1)
    if ratio == 1:
        return most
    for_topk = 1
    while (for_topk - 1) * method.block_size + 1 < method.topk:
        for_topk += 1
    return min(most, max(-(-eligible // ratio), for_topk, method.keep_first + method.keep_last))


def most_blocks(method) -> int:
    """How many blocks a query keeps at most: m in the paper."""
    if is_scan(method):
        return method.candidates // method.unit
    return method.topk // method.block_size if type(method).__name__ == "BlockSparse" else method.block_topk


def eligible_blocks(visible: int, method) -> int:
    """Blocks up to the one that holds the last visible token."""
    return -(-int(visible) // block_size_of(method)) if has_blocks(method) else 0


def forced_blocks(eligible: int, method) -> set[int]:
    """The first and the last blocks, always kept."""
    blocks = range(eligible)
    return set(blocks[: method.keep_first]) | set(blocks[max(0, eligible - method.keep_last) :])


def kept_blocks(block_scores, method, limit: int | None = None) -> np.ndarray:
    """[eligible] -> [kept] int32 ascending: the forced ones, then the best of the others, a tie to the lower block."""
    if not has_blocks(method):
        return np.zeros(0, np.int32)
    forced = forced_blocks(len(block_scores), method)
    others = np.array([j for j in range(len(block_scores)) if j not in forced], np.int32)
    best = best_of(others, block_scores, block_budget(method, len(block_scores), limit) - len(forced))
    return np.array(sorted(forced | set(best.tolist())), np.int32)


def candidates(kept, visible: int, method, listed=None) -> np.ndarray:
    """The visible tokens of the kept blocks, ascending int32; for Dsa every visible token, or those listed of them."""
    positions = np.arange(visible, dtype=np.int32)
    if listed is not None:
        return positions[np.isin(positions, listed)]
    return positions[np.isin(positions // block_size_of(method), kept)] if has_blocks(method) else positions


def best_of(items, scores, limit: int) -> np.ndarray:
    """The `limit` items (ascending ids) of highest scores[item], ascending; a tie goes to the lower id."""
    order = np.argsort(-scores[items], kind="stable")[:limit]
    return np.sort(items[order])


def score_scale(scores, bounds) -> float:
    """What a tolerance is relative to: the query's largest finite |score|, but at least 1/64 of its largest bound.

    bounds[s] = k_scale[s] |k[s]| * sum_h |w[h]| |q[h]|, which no |score| can exceed. A float32 sum errs in proportion
    to it, not to what is left after cancellation: without the floor a query whose scores all cancel (weights 0.1 and
    -0.1 on equal heads) would be judged by digits it does not have. There is no absolute floor: scaling w scales all.
    """
    return max(_largest(np.abs(scores)), _largest(bounds) / 64)


def keys_and_scales(k) -> tuple[np.ndarray, np.ndarray]:
    """[.., D] keys, or an object with .values and .scales -> the keys and their scales [..], 1 if there are none."""
    if hasattr(k, "scales"):
        return np.asarray(k.values), np.asarray(k.scales)
    return np.asarray(k), np.ones(np.shape(k)[:-1])


def _score_bounds(q, k, k_scale, w) -> np.ndarray:
    """[T, S]: what |I[t, s]| can be at most, by Cauchy-Schwarz."""
    with np.errstate(invalid="ignore", over="ignore"):
        sizes = (np.abs(float64(w)) * np.linalg.norm(float64(q), axis=-1)).sum(axis=-1)
        return sizes[:, None] * (np.abs(float64(k_scale)) * np.linalg.norm(float64(k), axis=-1))


def _largest(sizes) -> float:
    return float(sizes[np.isfinite(sizes)].max(initial=0.0))


def _nan_is_worst(scores) -> np.ndarray:
    return np.where(np.isnan(scores), -np.inf, scores)


def _collect(rows: list[Row], shape: tuple[int, ...], method) -> OracleSelection:
    indices = np.full((len(rows), entries.width(method)), -1, np.int32)
    scores, counts = np.full(indices.shape, -np.inf), []
    for i, row in enumerate(rows):
        chosen, tail = entries.members(row.chosen, method), entries.tail(row.tokens, method)
        n = len(chosen)
        counts.append(n + len(tail))
        indices[i, : counts[-1]] = [*chosen, *tail]
        scores[i, :n] = np.repeat(row.token_scores[row.chosen], n // max(len(row.chosen), 1))
        scores[i, n : counts[-1]] = np.inf

    def ragged(name):
        out = np.empty(len(rows), object)
        for i, row in enumerate(rows):
            out[i] = getattr(row, name)
        return out.reshape(shape)

    def dense(values, dtype):
        return np.array(values, dtype).reshape(shape)

    return OracleSelection(
        indices=indices.reshape(*shape, -1),
        count=dense(counts, np.int32),
        scores=scores.reshape(*shape, -1),
        blocks=ragged("blocks"),
        scanned=ragged("scanned"),
        token_scores=ragged("token_scores"),
        block_scores=ragged("block_scores"),
        token_scale=dense([row.token_scale for row in rows], np.float64),
        block_scale=dense([row.block_scale for row in rows], np.float64),
        visible=dense([len(row.token_scores) for row in rows], np.int32),
        tokens=dense([row.tokens for row in rows], np.int32),
        limit=dense([row.limit for row in rows], np.int32),
        kept_limit=dense([row.kept_limit for row in rows], np.int32),
        listed=ragged("listed"),
        positions=dense([row.position for row in rows], np.int32),
        method=method,
    )
