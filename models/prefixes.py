"""How much of one request's cache another one may have: their prompts must begin alike, and their methods by phase."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, Self

from hisa_jax.models.request import Request


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sharing:
    """How much of one request's cache is what another one's would be, which methods by phase decide.

    Attributes:
        prompt_only: whether tokens that were made are cached otherwise than those of a prompt.
        tail: last tokens of a prompt that are cached otherwise than those before.
    """

    prompt_only: bool
    tail: int

    @classmethod
    def of(cls, prefill: object, last_prefill: object, decode: object, chunk: int) -> Self:
        """What the programs of the phases allow, of which equal ones cache alike; the last chunk has `chunk` tokens."""
        read_alike = prefill == last_prefill
        return cls(prompt_only=not (read_alike and prefill == decode), tail=0 if read_alike else chunk)

    def limit(self, n_prompt: int, donor_n_prompt: int) -> int:
        """Tokens that a prompt may share; its last one is always computed, for the logits after it."""
        both = min(n_prompt, donor_n_prompt) if self.prompt_only else n_prompt
        return min(both - self.tail, n_prompt - 1)


def longest_prefix(
    request: Request, others: Iterable[Request], lengths: Mapping[Any, int], sharing: Sharing, page_size: int
) -> tuple[int | None, int]:  # fmt: skip
    """Which of others has most of a prompt's first tokens in the cache, and how many; None for less than a page.

    Args:
        lengths: tokens of each in the cache, by number.
    """
    prompt = request.tokens[: request.n_prompt]
    best, most = None, 0
    for other in others:
        n = min(lengths[other.id], sharing.limit(request.n_prompt, other.n_prompt))
        if n < page_size or n <= most or other.tokens[:page_size] != prompt[:page_size]:
            continue
        n = _n_equal(other.tokens[:n], prompt[:n])
        best, most = (other.id, n) if n > most else (best, most)
    return best, most


def _n_equal(a: list[int], b: list[int]) -> int:
    """How many first tokens of two lists of one length are the same; by halves, since slices are compared fast."""
    low, high = 0, len(a)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a[low:middle] == b[low:middle] else (low, middle - 1)
    return low
