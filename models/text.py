"""Text from tokens as they come: whole characters alone, and nothing of a text that ends a request."""

import dataclasses
from typing import Self

from hisa_jax.models.tokens import Tokenizer

_BROKEN = "\ufffd"  # what an unfinished character decodes to
_MOST_PENDING = 64  # tokens without a whole character; a text that is no text is passed on in such pieces


@dataclasses.dataclass(frozen=True, kw_only=True)
class Text:
    """What tokens say so far. A value: `read` makes another one, so that what went wrong is undone by the old one.

    Attributes:
        tokenizer: decodes.
        stop: texts that end it.
        new: the text that the last token settled.
        is_stopped: whether one of `stop` was found; the text before it is all there is.
        held: characters that may begin one of `stop`.
        window: the last tokens; decoders treat a first token otherwise than others, so some stand before the new ones.
        n_settled: how many of the window have given their text.
    """

    tokenizer: Tokenizer
    stop: tuple[str, ...] = ()
    new: str = ""
    is_stopped: bool = False
    held: str = ""
    window: tuple[int, ...] = ()
    n_settled: int = 0

    def read(self, token: int) -> Self:
        """With one more token."""
        window = (*self.window, token)
        before = self._decode(window[: self.n_settled])
        text = self._decode(window)
        if len(text) > len(before) and not text.endswith(_BROKEN):
            return self._settle(window, len(window), text[len(before) :])
        if len(window) - self.n_settled > _MOST_PENDING:
            # A character has at most 4 bytes, so one of these ends has none that is unfinished, or all are broken.
            ends = [len(window) - n for n in range(4)]
            texts = [self._decode(window[:end]) for end in ends]
            n = next((i for i, text in enumerate(texts) if not text.endswith(_BROKEN)), 3)
            return self._settle(window, ends[n], texts[n][len(before) :])
        return dataclasses.replace(self, window=window, new="")

    def end(self) -> str:
        """The rest, if no token comes after: what was held, and an unfinished character as a replacement character."""
        if self.is_stopped:
            return ""
        rest = self._decode(self.window)[len(self._decode(self.window[: self.n_settled])) :]
        return self._split(self.held + rest, is_last=True)[0]

    def _settle(self, window: tuple[int, ...], end: int, text: str) -> Self:
        new, held, is_stopped = self._split(self.held + text, is_last=False)
        window, n_settled = window[self.n_settled :], end - self.n_settled
        return dataclasses.replace(
            self, window=window, n_settled=n_settled, new=new, held=held, is_stopped=is_stopped
        )  # fmt: skip

    def _split(self, text: str, *, is_last: bool) -> tuple[str, str, bool]:
        """What is settled, what is held, whether one of `stop` ended it: the one that is complete first."""
        found = [(at + len(stop), at) for stop in self.stop if (at := text.find(stop)) >= 0]
        if found:
            return text[: min(found)[1]], "", True
        longest = 0 if is_last else min(len(text), max(map(len, self.stop), default=1) - 1)
        n = next((n for n in range(longest, 0, -1) if any(stop.startswith(text[-n:]) for stop in self.stop)), 0)
        return text[: len(text) - n], text[len(text) - n :], False

    def _decode(self, tokens: tuple[int, ...]) -> str:
        return self.tokenizer.decode(tokens) if tokens else ""
