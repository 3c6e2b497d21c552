"""Prompts as callers write them: token ids, or text where there is a tokenizer."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hisa_jax.models import checks
from hisa_jax.models.modeling import Model
from hisa_jax.models.tokens import Tokenizer, has_tokenizer, load_tokenizer


def tokenizer_of(model: Model) -> Tokenizer | None:
    """The tokenizer of the folder that a model was loaded from; None if it was made otherwise, or has none.

    Raises: as `load_tokenizer`.
    """
    if model.folder is None or not has_tokenizer(model.folder, model.config.vocab_size):
        return None
    file = Path(model.folder) / "tokenizer.json"
    changed = file.stat().st_mtime_ns if file.exists() else 0
    return _load(model.folder, model.config.vocab_size, changed)


@functools.lru_cache(maxsize=4)  # the largest take a second to read
def _load(folder: str, vocab_size: int, changed: int) -> Tokenizer:
    return load_tokenizer(folder, vocab_size)


def prompt_ids(
    call: str, name: str, value: Any, vocabulary: int, tokenizer: Callable[[], Tokenizer | None]
) -> list[int]:
    """The token ids of a prompt.

    Args:
        call, name: what an error calls them.
        value: text, or what `checks.prompt` takes.
        vocabulary: how many tokens there are.
        tokenizer: gives one, or None; asked if the prompt is text.

    Raises: ValueError: neither text nor token ids, no token, text without a tokenizer or that it cannot encode.
    """
    if not isinstance(value, str):
        return checks.prompt(call, name, value, vocabulary)
    if (found := tokenizer()) is None:
        raise ValueError(
            f"{call}: {name} is {checks.shown(value)}, wanted a sequence of ints: the model has no tokenizer: it was "
            "not loaded from a folder, or from one without; tokenizer= takes one"
        )
    return checks.prompt(call, name, found.encode(value), vocabulary)
