"""What both backends promise, checked for one call: shared by the interpreted, the soaked and the device tests."""

import numpy as np

from tests.gpu import reference


def check_hisa(got, q, k, k_scale, w, visible, *, topk, block_size, block_topk, token_tolerance, block_tolerance):
    """`got` is what select_hisa returned; tolerances are relative to the spread of the scores of a query."""
    indices, count, blocks = (np.asarray(x) for x in got)
    for b in range(q.shape[0]):
        scale = None if k_scale is None else k_scale[b]
        scores = reference.token_scores(q[b], k[b], scale, w[b])
        means = reference.block_means(k[b], scale, block_size, k.shape[1])
        block_scores = reference.token_scores(q[b], means, None, w[b])
        for t in range(q.shape[1]):
            what, seen = f"sequence {b}, query {t}", int(visible[b, t])
            kept = blocks[b, t][blocks[b, t] >= 0]
            check_blocks(kept, block_scores[t], seen, block_size, block_topk, block_tolerance, what)
            tokens = reference.tokens_of(kept, seen, block_size)
            tolerance = token_tolerance * spread(scores[t])
            reference.assert_selection(indices[b, t], count[b, t], scores[t], tokens, topk, tolerance, what)


def check_flat(got, q, k, k_scale, w, visible, *, topk, token_tolerance):
    indices, count = (np.asarray(x) for x in got)
    for b in range(q.shape[0]):
        scores = reference.token_scores(q[b], k[b], None if k_scale is None else k_scale[b], w[b])
        for t in range(q.shape[1]):
            tolerance, tokens = token_tolerance * spread(scores[t]), np.arange(visible[b, t])
            what = f"sequence {b}, query {t}"
            reference.assert_selection(indices[b, t], count[b, t], scores[t], tokens, topk, tolerance, what)


def check_blocks(kept, scores, visible, block_size, block_topk, tolerance, what):
    """The forced blocks and the best of the rest, but for those within `tolerance` of the threshold."""
    wanted = reference.kept_blocks(scores, visible, block_size, block_topk, 1, 1)
    assert len(kept) == len(wanted) and (np.diff(kept) > 0).all(), f"{what}: blocks {kept}, wanted {wanted}"
    if len(wanted):
        assert kept[0] == 0 and kept[-1] == wanted[-1], f"{what}: blocks {kept} lack a forced one of {wanted}"
    ranked = scores[wanted[1:-1]]
    for block in np.setxor1d(kept, wanted):
        off = abs(scores[block] - ranked.min()) / spread(scores)
        assert off <= tolerance, f"{what}: block {block} scores {scores[block]}, threshold {ranked.min()}"


def spread(scores):
    return max(float(np.std(scores[np.isfinite(scores)])), 1e-30)
