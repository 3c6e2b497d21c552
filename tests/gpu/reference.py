"""The contract in NumPy, written for these tests: scores and selections in float64, sequence by sequence."""

import numpy as np


def token_scores(q, k, k_scale, w):
    """[T, H, D], [S, D], [S] or None, [T, H] -> [T, S]."""
    q, k, w = (np.asarray(x, np.float64) for x in (q, k, w))
    scores = np.stack([w[t] @ np.maximum(q[t] @ k.T, 0) for t in range(len(q))])
    return scores if k_scale is None else scores * np.asarray(k_scale, np.float64)


def side_by_side(x, passed, rest):
    """[W], [W] -> [W]: of each 32 those that passed, in order, then `rest`, as a filter leaves sort keys."""
    rows = [np.pad(x[i : i + 32][passed[i : i + 32]], (0, 32)) for i in range(0, len(x), 32)]
    n = np.add.reduceat(passed.astype(int), np.arange(0, len(x), 32))
    rows = [np.where(np.arange(32) < k, row[:32], rest) for row, k in zip(rows, n, strict=True)]
    return np.concatenate(rows)[: len(x)]


def block_means(k, k_scale, block_size, length):
    """[S, D] -> [ceil(S / block_size), D]; means over the tokens before `length`."""
    k = np.asarray(k, np.float64)
    k = k if k_scale is None else k * np.asarray(k_scale, np.float64)[:, None]
    n = -(-len(k) // block_size)
    blocks = [k[b * block_size : min((b + 1) * block_size, length)] for b in range(n)]
    return np.stack([b.mean(0) if len(b) else np.zeros(k.shape[1]) for b in blocks])


def best(scores, candidates, k):
    """The k best of `candidates` (ascending), lower ones first among equals; NaN counts as -inf. Ascending."""
    values = np.nan_to_num(scores[candidates], nan=-np.inf, posinf=np.inf, neginf=-np.inf)
    order = np.argsort(-values, kind="stable")
    return np.sort(candidates[order[:k]])


def kept_blocks(scores, visible, block_size, block_topk, keep_first, keep_last):
    """[n] block scores of one query -> ascending block ids."""
    eligible = -(-visible // block_size)
    ids = np.arange(eligible)
    forced = (ids < keep_first) | (ids >= eligible - keep_last)
    rest = best(scores, ids[~forced], max(block_topk - forced.sum(), 0))
    return ids if eligible <= block_topk else np.sort(np.concatenate([ids[forced], rest]))


def tokens_of(blocks, visible, block_size):
    tokens = [np.arange(b * block_size, min((b + 1) * block_size, visible)) for b in blocks]
    return np.concatenate([*tokens, np.zeros(0, np.int64)]).astype(np.int64)


def assert_selection(got, count, scores, candidates, k, tolerance, what=""):
    """`got` [k] and `count` are the k best candidates, but for those within `tolerance` of the threshold."""
    want = best(scores, candidates, k)
    assert count == len(want), f"{what}: count {count}, wanted {len(want)}"
    chosen, rest = got[:count], got[count:]
    assert (rest == -1).all(), f"{what}: {rest} after the chosen"
    assert (np.diff(chosen) > 0).all(), f"{what}: not ascending"
    assert np.isin(chosen, candidates).all(), f"{what}: chose what is no candidate"
    if len(want):
        threshold = scores[want].min()
        for token in np.setxor1d(chosen, want):
            assert abs(scores[token] - threshold) <= tolerance, (
                f"{what}: {token} scores {scores[token]}, threshold {threshold}"
            )
