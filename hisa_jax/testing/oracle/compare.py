"""Whether a selection is the contract's, up to near-ties.

Two selections agree if they differ only in tokens whose oracle score lies within the tolerance of the threshold, the
score of the last token chosen. Hisa, BlockSparse and Scan choose twice: a block whose score lies within the tolerance
of the block threshold may be kept or not, which swaps all its tokens at once; the tokens are then judged given the
blocks that were kept.

`tolerance` is relative to the scale of the query's scores (`methods.score_scale`): for each query it allows
tolerance * token_scale between tokens and tolerance * block_scale between blocks. 0 demands the same tokens and the
same blocks, exact ties included; above 0 an exact tie may be broken either way.
"""

import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from . import entries
from .methods import OracleSelection, best_of, block_budget, block_size_of, candidates, forced_blocks, has_blocks
from .scan import slack

GUESSES = 1000  # sets of kept blocks tried for one query whose implementation does not report its own


class Query(NamedTuple):
    """One query of the reference, with the tolerances in units of its scores. Where keys are entries, so are tokens.

    Attributes: `tokens`: that it sees; `topk`, `kept_limit`: how many it chooses at most, and how many blocks it keeps.
    """

    topk: int
    kept_limit: int
    visible: int
    tokens: int
    listed: np.ndarray | None
    token_scores: np.ndarray
    block_scores: np.ndarray
    blocks: np.ndarray
    token_slack: float
    block_slack: float
    method: object
    may_keep_more: bool


def assert_same_selection(
    indices,
    count,
    reference: OracleSelection,
    tolerance: float,
    *,
    scores=None,
    blocks=None,
    may_keep_more: bool = False,
) -> None:
    """Raises AssertionError at the first query whose selection is not the reference's.

    Args:
        indices, count: [.., topk] and [..] int32, as an implementation returned them; entries as the method hands out.
        reference: the oracle's answer to the same input.
        tolerance: relative to each query's scores; float32 sums need about 1e-5, exact data 0.0.
        scores: [.., topk], the implementation's scores of its tokens, if it gave them; held to the same tolerance.
        blocks: [.., m] the blocks that it kept, ascending, then -1. Without it they are inferred from the tokens: a set
            that explains the tokens is looked for, in at most `GUESSES` tries. No broken selection passes for that; a
            right one could fail only where very many block scores tie, and would say so with `blocks`.
        may_keep_more: of a Scan without `blocks`: whether it may have kept more units than the reference does. The
            chosen are then the best of these and any others.
    """
    arrays = {"indices": indices, "count": count, "scores": scores, "blocks": blocks}
    arrays = {name: np.asarray(array) for name, array in arrays.items() if array is not None}
    _assert_shapes(arrays, reference)
    for why in judge(reference, tolerance, may_keep_more=may_keep_more, **arrays):
        if why:
            raise AssertionError(why)


def judge(
    reference: OracleSelection, tolerance: float, *, may_keep_more: bool = False, **arrays: np.ndarray
) -> Iterator[str | None]:
    """Of each query in turn: None, or what is wrong with its selection. Arguments are `assert_same_selection`'s."""
    if not tolerance >= 0:
        raise ValueError(f"assert_same_selection: tolerance={tolerance}: must be at least 0")
    for at in np.ndindex(reference.visible.shape):
        query = _query(reference, at, tolerance, may_keep_more)
        why = _why_broken(query, **{name: array[at] for name, array in arrays.items()})
        yield why and f"{_heading(reference, at, arrays['count'][at], query, tolerance)}\n{why}"


def _assert_shapes(arrays: dict, reference: OracleSelection) -> None:
    leading, width = reference.visible.shape, entries.width(reference.method)
    for name, wanted in {"indices": (*leading, width), "count": leading, "scores": (*leading, width)}.items():
        if name in arrays and arrays[name].shape != wanted:
            raise AssertionError(f"{name} is {list(arrays[name].shape)}, wanted {list(wanted)}")
    for name in {"indices", "count", "blocks"} & set(arrays):
        if arrays[name].dtype != np.int32:
            raise AssertionError(f"{name} is {arrays[name].dtype}, wanted int32")
    if "blocks" in arrays and arrays["blocks"].shape[:-1] != leading:
        raise AssertionError(f"blocks is {list(arrays['blocks'].shape)}, wanted {list(leading)} and one axis more")


def _query(reference: OracleSelection, at: tuple, tolerance: float, may_keep_more: bool) -> Query:
    scanned = reference.scanned[at]
    unsure = 0.0 if scanned is None else slack(scanned, tolerance, reference.token_scale[at])
    return Query(
        topk=int(reference.limit[at]),
        kept_limit=int(reference.kept_limit[at]),
        visible=int(reference.visible[at]),
        tokens=int(reference.tokens[at]),
        listed=reference.listed[at],
        token_scores=reference.token_scores[at],
        block_scores=reference.block_scores[at],
        blocks=reference.blocks[at],
        token_slack=tolerance * reference.token_scale[at],
        block_slack=tolerance * reference.block_scale[at] + unsure,
        method=reference.method,
        may_keep_more=may_keep_more,
    )


def _heading(reference: OracleSelection, at: tuple, count, query: Query, tolerance: float) -> str:
    axes = "bth" if getattr(query.method, "per_head", False) else "bt"
    where = ", ".join(f"{axis}={i}" for axis, i in zip(axes[-len(at) :], at, strict=True))
    return (
        f"query ({where}): position {reference.positions[at]}, {query.visible} visible tokens, count {count}; "
        f"{query.method}\ntolerance {tolerance:g}: tokens may lie {query.token_slack:.3g} from the threshold"
        + (f", blocks {query.block_slack:.3g}" if has_blocks(query.method) else "")
    )


# Each function below returns None, or the sentence that says what is wrong.


def _why_broken(query: Query, indices, count, scores=None, blocks=None) -> str | None:
    wanted = min(query.topk, len(candidates(query.blocks, query.visible, query.method, query.listed)))
    by_tokens = entries.by_tokens(query.method)
    why = _why_not_a_list("token", indices, int(count), query.tokens if by_tokens else query.visible)
    why = why or entries.why_not_whole(indices, int(count), query.tokens, query.method)
    if why:
        return why
    indices, count, scores, why = entries.folded(indices, int(count), scores, query.tokens, query.method)
    if why:
        return why
    chosen = indices[:count]
    # Only the last eligible block can be partial and it is always kept, so all kept sets hold equally many tokens.
    if len(chosen) != wanted:
        return f"{len(chosen)} tokens were chosen, wanted min(topk, visible candidates) = {wanted}"
    return _why_not_chosen(query, chosen, blocks) or (
        None if scores is None else _why_not_scores(query, chosen, scores)
    )


def _why_not_a_list(what: str, ids, count: int, limit: int) -> str | None:
    """Whether `ids` are `count` ascending, different numbers of [0, limit) and then -1."""
    real = ids != -1
    holes = np.flatnonzero(~real[: int(real.sum())])
    if len(holes):
        return f"slot {holes[0]} holds -1 before later {what}s: -1 may only fill up the end; {_short(ids)}"
    if count != real.sum():
        return f"count is {count}, but {real.sum()} {what}s are given: {_short(ids)}"
    ids = ids[:count]
    outside = ids[(ids < 0) | (ids >= limit)]
    if len(outside):
        kind = "is not visible" if what == "token" else "is not eligible"
        return f"{what} {outside[0]} {kind}: the query may choose from [0, {limit})"
    repeated = np.flatnonzero(np.bincount(ids, minlength=1) > 1) if count else ids
    if len(repeated):
        return f"{what} {repeated[0]} is given twice"
    falls = np.flatnonzero(np.diff(ids) < 0)
    if len(falls):
        return f"not ascending: {what} {ids[falls[0] + 1]} stands after {ids[falls[0]]}"
    return None


def _why_not_chosen(query: Query, chosen, blocks) -> str | None:
    if not has_blocks(query.method):
        return _why_not_best(query, chosen, np.zeros(0, np.int32))
    if blocks is not None:
        reported = blocks[blocks != -1]
        why = _why_not_a_list("block", blocks, len(reported), len(query.block_scores))
        return why or _why_not_kept(query, reported) or _why_not_best(query, chosen, reported)
    used = np.unique(chosen // block_size_of(query.method))
    if query.may_keep_more:
        return _why_not_best_of_more(query, chosen, set(used.tolist()))
    if type(query.method).__name__ == "BlockSparse":  # every kept block shows in the tokens
        return _why_not_kept(query, used) or _why_not_best(query, chosen, used)
    reasons = []
    for kept in _explanations(query, used):
        reasons.append(_why_not_kept(query, kept) or _why_not_best(query, chosen, kept))
        if reasons[-1] is None:
            return None
    return reasons[0]


def _why_not_best_of_more(query: Query, chosen, used: set[int]) -> str | None:
    """Whether `chosen` are the best of a set that holds all kept blocks, up to those near the block threshold.

    Blocks in which nothing was chosen and that the reference does not keep need not be in it.
    """
    (sure, near), size, scores = _block_choice(query), block_size_of(query.method), query.token_scores
    why = _why_not_best(query, chosen, np.array(sorted(sure | used), np.int32))
    if why or not len(chosen):
        return why
    threshold = scores[chosen].min() + query.token_slack
    better = [j for j in sorted(near - used) if scores[j * size : (j + 1) * size].max() > threshold]
    spare = len(sure | near) - len(query.blocks)
    if len(better) > spare:
        return (
            f"blocks {_short(np.array(better))} near the block threshold have better tokens than some of the "
            f"chosen, and at most {spare} of those near it may be left out"
        )
    return None


def _explanations(query: Query, used):
    """Sets of kept blocks that could hold the chosen tokens, the likeliest first; [kept] int32 ascending each.

    At least one: the oracle's own set fits in the blocks to choose from.
    """
    sure, near = _block_choice(query)
    must = sure | set(used.tolist())
    spare = len(query.blocks) - len(must)
    if spare <= 0:  # too many blocks: let the caller say so
        yield np.array(sorted(must), np.int32)
        return
    # A block that was kept and gave no token most likely has only low scores.
    size = block_size_of(query.method)
    idle = sorted(near - must, key=lambda j: query.token_scores[j * size : (j + 1) * size].max())
    for extra in itertools.islice(itertools.combinations(idle, spare), GUESSES):
        yield np.array(sorted(must.union(extra)), np.int32)


def _block_choice(query: Query) -> tuple[set[int], set[int]]:
    """The blocks that must be kept, and those near enough to the block threshold to be kept or not."""
    kept, scores = set(query.blocks.tolist()), query.block_scores
    forced = forced_blocks(len(scores), query.method)
    if len(kept) == len(scores) or kept == forced or query.block_slack == 0:
        return kept, set()
    threshold = min(scores[j] for j in kept - forced)
    near = {j for j in range(len(scores)) if j not in forced and _near(scores[j], threshold, query.block_slack)}
    return kept - near, near


def _why_not_kept(query: Query, kept) -> str | None:
    scores, kept = query.block_scores, set(kept.tolist())
    forced = forced_blocks(len(scores), query.method)
    missing = sorted(forced - kept)
    if missing:
        return f"block {missing[0]} was left out, but the first and last blocks {sorted(forced)} are always kept"
    sure, near = _block_choice(query)
    by_score = set(query.blocks.tolist()) - forced
    threshold = min((scores[j] for j in by_score), default=math.nan)
    for j in sorted(kept - sure - near):
        token = j * block_size_of(query.method)
        return (
            f"block {j} (tokens from {token} on) was kept with score {scores[j]:.9g}, block threshold {threshold:.9g}; "
            f"the oracle keeps {_short(query.blocks)}"
        )
    for j in sorted(sure - kept):
        return f"block {j} was left out with score {scores[j]:.9g}, block threshold {threshold:.9g}"
    wanted = block_budget(query.method, len(scores), query.kept_limit)
    if len(kept) != wanted:
        return f"{len(kept)} blocks were kept, wanted {wanted}: {_short(np.array(sorted(kept)))}"
    return None


def _why_not_best(query: Query, chosen, kept) -> str | None:
    """Whether `chosen` are the best of the visible tokens in `kept`, up to near-ties."""
    scores, items = query.token_scores, candidates(kept, query.visible, query.method, query.listed)
    foreign = np.setdiff1d(chosen, items)
    if len(foreign):
        token = foreign[0]
        return (
            f"token {token} was chosen (score {scores[token]:.9g}), but its block is not among the kept {_short(kept)}"
        )
    best = best_of(items, scores, query.topk)
    extra, missing = np.setdiff1d(chosen, best), np.setdiff1d(best, chosen)
    if len(extra) == 0:  # as many were chosen as there are best ones, so nothing is missing either
        return None
    threshold = scores[best].min()
    low, high = extra[np.argmin(scores[extra])], missing[np.argmax(scores[missing])]
    if query.token_slack > 0 and _near(scores[low], threshold, query.token_slack):
        if _near(scores[high], threshold, query.token_slack):
            return None
        broken = f"token {high} was left out"
    else:
        broken = f"token {low} was chosen"
    return (
        f"{broken}: chosen {low} has score {scores[low]:.9g}, left out {high} has {scores[high]:.9g}, "
        f"threshold {threshold:.9g} of {len(items)} candidates; {len(extra)} tokens differ"
        + (f"; kept blocks {_short(kept)}" if has_blocks(query.method) else "")
    )


def _why_not_scores(query: Query, chosen, scores) -> str | None:
    for token, score in zip(chosen, scores[: len(chosen)].astype(np.float64), strict=True):
        score = -np.inf if np.isnan(score) else score
        wanted = query.token_scores[token]
        if not _near(score, wanted, query.token_slack):
            return f"token {token} was given score {score:.9g}, the oracle's is {wanted:.9g}"
    return None


def _near(a: float, b: float, slack: float) -> bool:
    """Equal (also both -inf), or at most `slack` apart."""
    return a == b or (math.isfinite(a) and math.isfinite(b) and abs(a - b) <= slack)


def _short(ids) -> str:
    return np.array2string(np.asarray(ids), threshold=24, edgeitems=8)
