"""Whether the right tokens were chosen: those of the best scores, but for scores that lie near the threshold.

Random data has some blocks near every cut: of 1024 blocks with 64 kept, 5 lie within `NEAR`. Each holds 1.6 % of the
tokens, so a share of tokens that two implementations have in common tells little.
"""

import numpy as np

# Of the spread of a query's scores. Block means carry 8 bits, and queries made by another program may round otherwise.
NEAR = 2e-2


class WrongError(AssertionError):
    """A result that is not what NumPy or XLA find."""


def check_best(own: np.ndarray, scores: np.ndarray, at: object) -> None:
    """Raises WrongError unless `own` are the best by these scores, -inf for those that are not to be chosen."""
    near = NEAR * scores[np.isfinite(scores)].std()
    cut = np.sort(scores)[::-1][len(own) - 1]
    left_out = np.delete(scores, own).max(initial=-np.inf)
    if (off := max(cut - scores[own].min(), left_out - cut)) > near:
        raise WrongError(
            f"query {at}: a token is chosen or left out that is {off / near * NEAR:.2g} from the threshold"
        )


def check_best_of_blocks(
    own: np.ndarray, scores: np.ndarray, block_scores: np.ndarray, block_size: int, block_topk: int, at: object
) -> None:
    """Raises WrongError unless `own` are the best of tokens in the best blocks, the first and the last among them.

    Args:
        own: tokens that were chosen, ascending.
        scores: [S] of all tokens that the query sees.
        block_scores: [n] of block means.
        block_size, block_topk: tokens of a block, blocks that are kept.
        at: which query it is.
    """
    n, blocks = len(block_scores), np.arange(len(scores)) // block_size
    is_kept = np.isin(np.arange(n), own // block_size)
    if n > block_topk:
        inner = block_scores[1:-1]
        cut, near = np.sort(inner)[::-1][block_topk - 3], NEAR * inner.std()
        forced = np.isin(np.arange(n), (0, n - 1))
        if (is_kept & ~forced & (block_scores < cut - near)).any():
            raise WrongError(f"query {at} chooses tokens of a block that is not among the best")
        is_certain = forced | (block_scores > cut + near)
        is_open = ~is_certain & ~is_kept & (block_scores >= cut - near)
        is_kept |= is_certain
    else:
        is_kept[:], is_open = True, np.zeros(n, bool)
    check_best(own, np.where(is_kept[blocks], scores, -np.inf), at)
    # The other blocks that are kept are some near the threshold without a token that is better than those chosen.
    worst, missing = scores[own].min(), min(n, block_topk) - is_kept.sum()
    best = [scores[blocks == block].max() for block in np.flatnonzero(is_open)]
    if not 0 <= missing <= np.sum(np.array(best) <= worst + NEAR * scores.std()):
        raise WrongError(f"query {at} chooses tokens of {is_kept.sum()} blocks, wanted the best {block_topk}")
