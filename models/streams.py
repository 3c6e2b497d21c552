"""A request's tokens and text in pieces, as they come."""

import dataclasses

from hisa_jax.models.request import FinishReason, Request
from hisa_jax.models.sampling import Logprobs
from hisa_jax.models.text import Text
from hisa_jax.models.tokens import Tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Piece:
    """What a request has made since the piece before.

    Attributes:
        tokens: new ones; a stop token is the last.
        text: whole characters that they complete. Pieces joined are the text of all tokens but a stop token, up to the
            stop text that was found.
        logprobs: of each token, if asked for.
        finish_reason: None while more will come; "stop" at a stop token or text, "length" at `max_tokens`, "cancelled",
            "failed".
        error: why it failed.
    """

    tokens: tuple[int, ...]
    text: str
    logprobs: tuple[Logprobs, ...]
    finish_reason: FinishReason | None
    error: str | None


class Reader:
    """Reads one request between the steps of its engine.

    Args:
        request: that it reads.
        tokenizer: makes text; None for none.
    """

    def __init__(self, request: Request, tokenizer: Tokenizer | None):
        self._request, self._n_read, self._is_done = request, 0, False
        self._text = None if tokenizer is None else Text(tokenizer=tokenizer, stop=request.sampling.stop)

    @property
    def n_prompt(self) -> int:
        """Tokens of the prompt."""
        return self._request.n_prompt

    def read(self) -> Piece | None:
        """What is new; None if nothing is."""
        request = self._request
        tokens = tuple(request.tokens[request.n_prompt + self._n_read :])
        reason = request.finish_reason
        if self._is_done or (not tokens and reason is None):
            return None
        logprobs = tuple(request.logprobs[self._n_read : self._n_read + len(tokens)])
        self._n_read, self._is_done = self._n_read + len(tokens), reason is not None
        return Piece(
            tokens=tokens, text=self._read(tokens, reason), logprobs=logprobs, finish_reason=reason, error=request.error
        )

    def _read(self, tokens: tuple[int, ...], reason: FinishReason | None) -> str:
        if self._text is None:
            return ""
        if reason == "stop" and tokens and self._request.ends_in_stop_token:
            tokens = tokens[:-1]
        parts = []
        for token in tokens:
            self._text = self._text.read(token)
            parts.append(self._text.new)
        return "".join(parts) + ("" if reason is None else self._text.end())
