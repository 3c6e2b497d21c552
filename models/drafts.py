"""Proposals of the next tokens, which a decode step verifies."""

import itertools
import operator
from collections.abc import Callable, Iterable, Sequence

from hisa_jax.models import checks

# What a request may continue with: of its tokens so far and how many are wanted, proposals, or fewer, or none.
Draft = Callable[[Sequence[int], int], Iterable[int] | None]


def propose(draft: Draft, tokens: list[int], n: int, vocabulary: int) -> tuple[list[int], str | None]:
    """Asks a draft, which may be wrong in any way: a proposal is verified, so it costs time at most.

    Args:
        draft: is handed a copy of the tokens.
        tokens: of the request so far.
        n: how many are wanted; more are not read.
        vocabulary: how many tokens there are.

    Returns: the proposals up to the first that is not a token; what was wrong, None if nothing was.
    """
    proposals: list[int] = []
    try:
        if (proposed := draft(list(tokens), n)) is None:
            return [], None
        for token in itertools.islice(proposed, n):
            if isinstance(token, bool) or not 0 <= (id := operator.index(token)) < vocabulary:
                return proposals, f"proposed {checks.shown(token)}, wanted an int from 0 to {vocabulary - 1}"
            proposals.append(id)
    except Exception as error:
        return proposals, _told(error)
    return proposals, None


def _told(error: Exception) -> str:
    try:
        return f"{type(error).__name__}: {error}"
    except Exception:  # an error that cannot show itself
        return type(error).__name__


def lookup(tokens: Sequence[int], n: int) -> list[int]:
    """A draft without a model: what followed the last two tokens when they last stood together."""
    last = tokens[-2:]
    for at in range(len(tokens) - 3, -1, -1):
        if tokens[at : at + 2] == last:
            return list(tokens[at + 2 : at + 2 + n])
    return []
