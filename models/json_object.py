"""Reads JSON of unknown origin: an object in UTF-8, no larger than it may be, each key once."""

import json
import reprlib
from collections import Counter
from pathlib import Path
from typing import Any

# What a list or an object takes in memory is many times its 2 bytes of text; a header has three of them a tensor.
_MOST_CONTAINERS = 2**20
# Values in error messages: long enough to be found in the file, however long they are.
_SHORT = reprlib.Repr(maxstring=80, maxother=80, maxlong=40, maxlist=4, maxdict=4, maxlevel=2)


def shown(value: Any) -> str:
    """A value as error messages show it: its `repr`, cut to a line."""
    return _SHORT.repr(value)


def short(name: str) -> str:
    """A name as error messages show it: on one line, whole if it is no longer than names are."""
    name = name if len(name) <= 200 else f"{name[:120]}...{name[-60:]}"
    return name if name.isprintable() else repr(name)[1:-1]  # neither a terminal's controls nor lone surrogates


def parse_object(data: bytes) -> dict[str, Any]:
    """Makes an object of its text.

    Args:
        data: JSON in UTF-8.

    Returns: the object.
    Raises: ValueError: not UTF-8, not JSON, nested too deeply, too many lists and objects, another value than an
        object, a key twice.
    """
    if data.count(b"[") + data.count(b"{") > _MOST_CONTAINERS:
        raise ValueError(f"holds more than {_MOST_CONTAINERS} lists and objects, too many for what it should hold")
    try:
        value = json.loads(data.decode(), object_pairs_hook=_each_key_once)
    except UnicodeDecodeError as error:
        raise ValueError(f"not JSON: not UTF-8 at byte {error.start}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error}") from None
    except RecursionError:
        raise ValueError("not JSON that can be read: nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError(f"holds a {type(value).__name__}, wanted an object")
    return value


def read_object(file: Path, limit: int) -> dict[str, Any]:
    """Reads an object.

    Args:
        file: a file that is there.
        limit: bytes that it may have; what Python makes of them takes some 20 times as many at the worst.

    Returns: the object.
    Raises: ValueError: more bytes than that; as `parse_object`, with the file's name.
    """
    with file.open("rb") as stream:
        data = stream.read(limit + 1)
    if len(data) > limit:
        raise ValueError(f"{file}: has more than {limit} bytes, too many for what it should hold")
    try:
        return parse_object(data)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def _each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        key = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"key {shown(key)} is there twice")
    return found
