"""A request of an engine: its tokens, what ends it, and why it ended."""

import dataclasses
from typing import Literal

from hisa_jax.models.sampling import Logprobs, Sampling
from hisa_jax.models.text import Text

FinishReason = Literal["stop", "length", "failed", "cancelled"]


@dataclasses.dataclass(kw_only=True, eq=False)
class Request:
    """A request.

    Attributes:
        id: its number.
        tokens: begins with the prompt.
        n_prompt: how many of them that are.
        end: how many tokens there may be.
        stop_ids: tokens that end it.
        sampling: how its tokens are taken.
        text: what its new tokens say, if a text may end it.
        logprobs: of each new token, if asked for.
        error: why it ended without success, if it did.
        is_cancelled: whether the caller ended it.
        must_copy: whether it shares a part of a page, which one of the two will have to copy.
        n_overtaken: how many requests that came after it were admitted before it.
    """

    id: int
    tokens: list[int]
    n_prompt: int
    end: int
    stop_ids: frozenset[int]
    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    text: Text | None = None
    logprobs: list[Logprobs] = dataclasses.field(default_factory=list)
    error: str | None = None
    is_cancelled: bool = False
    must_copy: bool = False
    n_overtaken: int = 0

    @property
    def n_known(self) -> int:
        """Tokens to read before decoding: the prompt, and what it had made if its pages were lost."""
        return max(self.n_prompt, len(self.tokens) - 1)

    @property
    def n_made(self) -> int:
        return len(self.tokens) - self.n_prompt

    @property
    def ends_in_stop_token(self) -> bool:
        return self.n_made > 0 and self.tokens[-1] in self.stop_ids

    @property
    def is_finished(self) -> bool:
        return self.finish_reason in ("stop", "length")

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why it ended; None while it runs or waits."""
        if self.error is not None:
            return "failed"
        if self.is_cancelled:
            return "cancelled"
        if self.ends_in_stop_token or (self.text is not None and self.text.is_stopped):
            return "stop"
        return "length" if len(self.tokens) >= self.end else None

    def add(self, token: int) -> None:
        """Adds a new token. Raises ValueError: one that the tokenizer cannot decode, where a text may end it."""
        self.tokens.append(token)
        if self.text is not None and token not in self.stop_ids:
            self.text = self.text.read(token)
