"""What callers hand to `generate` and `Engine`, checked and copied where it comes in."""

import operator
import reprlib
import sys
from collections.abc import Sequence, Set
from typing import Any

import numpy as np

from hisa_jax.models.config import Config
from hisa_jax.models.settings import INT32


def whole(call: str, name: str, value: Any, least: int = 1) -> int:
    """An int from `least` on, NumPy's among them. Raises ValueError: anything else, True among it."""
    number = _int_or_none(value)
    if number is None or number < least:
        raise ValueError(f"{call}: {name}={shown(value)}, wanted an int of at least {least}")
    return number


def random_seed(call: str, value: Any) -> int:
    """An int that JAX takes as a seed. Raises ValueError: anything else, True among it."""
    number = _int_or_none(value)
    if number is None or not -(2**63) <= number < 2**63:
        raise ValueError(f"{call}: seed={shown(value)}, wanted an int from -2^63 to 2^63 - 1")
    return number


def number(call: str, name: str, value: Any, low: float, high: float) -> float:
    """A finite number from low to high. Raises ValueError: anything else, True among it."""
    is_number = isinstance(value, int | float | np.number) and not isinstance(value, bool)
    if not is_number or not low <= value <= high:
        most = "" if high == sys.float_info.max else f", at most {high}"
        raise ValueError(f"{call}: {name}={shown(value)}, wanted a number of at least {low}{most}")
    return float(value)


def token_ids(call: str, name: str, value: Any, vocabulary: int) -> list[int]:
    """A copy of token ids as ints.

    Args:
        call, name: what an error calls them.
        value: a sequence of ints, or a NumPy or JAX array [n] of integers.
        vocabulary: how many tokens there are.

    Raises: ValueError: anything else, an id outside of 0 to vocabulary - 1.
    """
    if hasattr(value, "__array__"):
        try:
            array = np.asarray(value)
        except Exception as error:  # deleted, traced, keys of random numbers
            raise ValueError(f"{call}: {name} is {shown(value)}, wanted an array that NumPy can read") from error
        if array.ndim != 1 or array.dtype.kind not in "iu":
            raise ValueError(f"{call}: {name} is {array.dtype} {list(array.shape)}, wanted [n] integers")
        value = array.tolist()
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise ValueError(f"{call}: {name} is {shown(value)}, wanted a sequence of ints")
    # A first token waits for this: a loop of Python takes 20 ms and more for 128K tokens.
    if type(value) in (list, tuple) and set(map(type, value)) == {int} and 0 <= min(value) <= max(value) < vocabulary:
        return list(value)
    ids = []
    for i, one in enumerate(value):
        token = _int_or_none(one)
        if token is None or not 0 <= token < vocabulary:
            raise ValueError(f"{call}: {name}[{i}] is {shown(one)}, wanted an int from 0 to {vocabulary - 1}")
        ids.append(token)
    return ids


def prompt(call: str, name: str, value: Any, vocabulary: int) -> list[int]:
    """As `token_ids`, and at least one."""
    ids = token_ids(call, name, value, vocabulary)
    if not ids:
        raise ValueError(f"{call}: {name} is empty, wanted at least one token")
    return ids


def stop_ids(call: str, value: Any, config: Config) -> tuple[int, ...]:
    """Ascending token ids that end a row: those given, also as a set; None: the checkpoint's."""
    if value is None:
        return tuple(sorted(set(config.eos_token_ids)))
    return ids_of_set(call, value, config.vocab_size)


def ids_of_set(call: str, value: Any, vocabulary: int = INT32) -> tuple[int, ...]:
    """Ascending token ids that end a row, given as a sequence or a set."""
    given = list(value) if isinstance(value, Set) else value
    return tuple(sorted(set(token_ids(call, "stop_ids", given, vocabulary))))


def shown(value: Any) -> str:
    """A value as an error shows it: short, whatever it is."""
    try:
        return reprlib.repr(value)
    except Exception:  # an int of too many digits, an object that cannot show itself
        return f"a {type(value).__name__}"


def _int_or_none(value: Any) -> int | None:
    if isinstance(value, bool):
        return None
    try:
        return operator.index(value)
    except Exception:  # not an int, or `__index__` fails
        return None
