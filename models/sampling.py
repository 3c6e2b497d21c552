"""How a request is continued: one value for `generate`, `Engine`, the server and the command line."""

import dataclasses
import sys
from collections.abc import Collection, Sequence
from typing import Any

from hisa_jax.models import checks
from hisa_jax.models.config import Config

MOST_LOGPROBS = 20  # alternatives of a token; what a step computes has this size


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a request is continued.

    A token is drawn from the logits divided by `temperature`, of which first the `top_k` largest stay, then the fewest
    whose probabilities reach `top_p`, then those at least `min_p` times as probable as the likeliest. The draw of a
    request's nth new token depends on `seed` and n alone.

    Args:
        max_tokens: new tokens at most.
        temperature: 0 takes the likeliest token.
        top_p: above 0, at most 1; 1 keeps all tokens.
        top_k: 0 keeps all tokens. Of equal logits the lower token stays.
        min_p: from 0, which keeps all tokens, to 1.
        seed: of the draws, an int of 64 bits.
        stop: texts that end a request, at whatever place of a token they end. They are no part of its text.
        stop_ids: tokens that end a request, beside those of the checkpoint.
        logprobs: how many of the likeliest tokens to name beside each new one, each with its log probability by the
            model's own logits; at most 20. None: no log probabilities.
        ignore_eos: whether the stop tokens of the checkpoint end nothing.

    Raises: ValueError: a value outside of these.
    """

    max_tokens: int = 32
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    logprobs: int | None = None
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        call = "Sampling"
        self._set("max_tokens", checks.whole(call, "max_tokens", self.max_tokens))
        self._set("top_k", checks.whole(call, "top_k", self.top_k, 0))
        self._set("seed", checks.random_seed(call, self.seed))
        self._set("temperature", checks.number(call, "temperature", self.temperature, 0, sys.float_info.max))
        self._set("top_p", checks.number(call, "top_p", self.top_p, 0, 1))
        self._set("min_p", checks.number(call, "min_p", self.min_p, 0, 1))
        if self.top_p == 0:
            raise ValueError("Sampling: top_p=0, wanted a number above 0, at most 1")
        if self.logprobs is not None:
            self._set("logprobs", checks.whole(call, "logprobs", self.logprobs, 0))
            if self.logprobs > MOST_LOGPROBS:
                raise ValueError(f"Sampling: logprobs={checks.shown(self.logprobs)}, wanted at most {MOST_LOGPROBS}")
        if not isinstance(self.ignore_eos, bool):
            raise ValueError(f"Sampling: ignore_eos={checks.shown(self.ignore_eos)}, wanted True or False")
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        if not isinstance(stop, Sequence) or not all(isinstance(text, str) and text for text in stop):
            raise ValueError(f"Sampling: stop={checks.shown(self.stop)}, wanted texts that are not empty")
        self._set("stop", tuple(stop))
        self._set("stop_ids", checks.ids_of_set(call, self.stop_ids))

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def stop_ids_of(self, call: str, config: Config) -> frozenset[int]:
        """The tokens that end a request of a model. Raises ValueError: one outside of its vocabulary."""
        given = checks.token_ids(call, "stop_ids", self.stop_ids, config.vocab_size)
        return frozenset(given) | (frozenset() if self.ignore_eos else frozenset(config.eos_token_ids))


def short_form(
    call: str, config: Config, sampling: Sampling | None, *, max_new_tokens: Any, stop_ids: Collection[int] | None,
    temperature: Any = 0.0, seed: Any = 0,
) -> Sampling:  # fmt: skip
    """The `Sampling` that a call was given, or that its short arguments make.

    Args:
        call: what an error calls it.
        config: of the model, which has stop tokens.
        sampling: None, or the only one of these that is given.
        max_new_tokens, temperature, seed: as the fields.
        stop_ids: all tokens that end the request; None: those of the model; () for none.

    Raises: ValueError: both, or values that no `Sampling` has, by the names that the call has for them.
    """
    if sampling is not None:
        if not isinstance(sampling, Sampling):
            raise ValueError(f"{call}: sampling is {checks.shown(sampling)}, wanted a Sampling or None")
        if max_new_tokens is not None or stop_ids is not None or temperature != 0 or seed != 0:
            raise ValueError(f"{call}: beside sampling no max_new_tokens, stop_ids, temperature or seed is wanted")
        return sampling
    return Sampling(
        max_tokens=checks.whole(call, "max_new_tokens", max_new_tokens),
        temperature=checks.number(call, "temperature", temperature, 0, sys.float_info.max),
        seed=checks.random_seed(call, seed),
        stop_ids=() if stop_ids is None else checks.stop_ids(call, stop_ids, config),
        ignore_eos=stop_ids is not None,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Logprobs:
    """Log probabilities of one new token and of the likeliest in its place, by the model's own logits.

    Attributes:
        token, logprob: the one that was made.
        top: (token, log probability), the likeliest first; as many as were asked for.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]
