"""What a key stands for: entries of several tokens, the open tail, and lists of tokens taken back to entries.

Entry e of r tokens holds the tokens e * r .. e * r + r - 1 of its sequence. A query sees those of which it sees all.
"""

import numpy as np


def size_of(method) -> int:
    return getattr(method, "entry_size", 1)


def has_tail(method) -> bool:
    return getattr(method, "tail", None) == "open"


def by_tokens(method) -> bool:
    """Whether a selection lists tokens of more than one an entry."""
    return size_of(method) > 1 and getattr(method, "returns", "tokens") == "tokens"


def width(method) -> int:
    """Slots of a selection."""
    if not by_tokens(method):
        return method.topk
    r = size_of(method)
    return method.topk * r + (r - 1 if has_tail(method) else 0)


def tail(tokens: int, method) -> np.ndarray:
    """The visible tokens after the last whole entry, where they are handed out."""
    whole = tokens // size_of(method) * size_of(method)
    return np.arange(whole, tokens if by_tokens(method) and has_tail(method) else whole)


def members(entries, method) -> np.ndarray:
    """[n] ascending -> their tokens, or the entries themselves."""
    r = size_of(method) if by_tokens(method) else 1
    return (np.asarray(entries, np.int64)[:, None] * r + np.arange(r)).reshape(-1)


def why_not_whole(indices, count: int, tokens: int, method) -> str | None:
    """None, or why `count` ascending tokens are not whole entries and then the tail of a query that sees so many."""
    if not by_tokens(method):
        return None
    last, r = tail(tokens, method), size_of(method)
    if count < len(last) or (indices[count - len(last) : count] != last).any():
        return f"the open tail {last} does not end {indices[:count]}"
    chosen = indices[: count - len(last)]
    if len(chosen) % r or (members(chosen[::r] // r, method) != chosen).any():
        return f"{chosen} are not all tokens of entries of {r}"
    return None


def folded(indices, count: int, scores, tokens: int, method) -> tuple[np.ndarray, int, np.ndarray | None, str | None]:
    """A list of whole entries and a tail -> the entries [topk], then -1, their count and scores; what is wrong."""
    if not by_tokens(method):
        return indices, count, scores, None
    r, of_tail = size_of(method), len(tail(tokens, method))
    n, why = (count - of_tail) // r, None
    entries = np.full(method.topk, -1, np.int32)
    entries[:n] = indices[: n * r : r] // r
    if scores is not None:
        of_entries, rest = scores[: n * r].reshape(n, r), scores[n * r : n * r + of_tail]
        with np.errstate(invalid="ignore"):
            if not ((of_entries == of_entries[:, :1]) | np.isnan(of_entries)).all() or not (rest == np.inf).all():
                why = f"scores {scores[:count]} are not one for all tokens of an entry, and infinity for the tail"
        scores = np.full(method.topk, -np.inf)
        scores[:n] = of_entries[:, 0]
    return entries, n, scores, why
