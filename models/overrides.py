"""Settings in the place of those of a config.json, as servers take them: --json-model-override-args, --hf-overrides."""

import argparse
import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hisa_jax.models import settings
from hisa_jax.models.json_object import parse_object, read_object, shown

Overrides = Mapping[str, Any] | str | Path
_SOURCE = "overrides"
_LARGEST_FILE = 2**20
# Ways of saying which layers share a selection: one of them replaces all that the checkpoint says of it.
_SHARING = {"indexer_types", "index_topk_pattern", "index_topk_freq", "index_skip_topk_offset"}


def parse_overrides(overrides: Overrides) -> dict[str, Any]:
    """The settings that somebody gives.

    Args:
        overrides: keys and values of config.json; a str: that in JSON; a Path: a file of JSON.

    Returns: them, each checked but for whether they fit together; null stays None.
    Raises: FileNotFoundError: no such file. TypeError: another type. ValueError: no object in JSON; a key that is none,
        or that is not read; a value that `settings.py` does not have it take.
    """
    if isinstance(overrides, Path):
        given, source = read_object(overrides, _LARGEST_FILE), str(overrides)
    elif isinstance(overrides, str):
        source = _SOURCE
        try:
            given = parse_object(overrides.encode())
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from error
    elif isinstance(overrides, Mapping):
        given, source = dict(overrides), _SOURCE
    else:
        raise TypeError(f"{_SOURCE} is {type(overrides).__name__}, wanted a mapping, JSON as a str, or a file's Path")
    for key in given:
        if key not in settings.SETTINGS:
            near = difflib.get_close_matches(str(key), settings.SETTINGS, n=1)
            hint = f"; the nearest one is {near[0]}" if near else ""
            raise ValueError(f"{source}: {shown(key)} is no setting of config.json that is read{hint}")
    settings.present(given, settings.SETTINGS, source)
    return given


def with_overrides(keys: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a config.json with those of `parse_overrides` in their place; a null takes a key away."""
    is_told = any(given.get(name) is not None for name in _SHARING)
    kept = {name: value for name, value in keys.items() if not (is_told and name in _SHARING)}
    return {**kept, **given}


def add_override(parser: argparse.ArgumentParser) -> None:
    """The option --override of a command that reads a checkpoint."""
    parser.add_argument(
        "--override", type=lambda text: text if text.lstrip().startswith("{") else Path(text), metavar="JSON|FILE",
        help="""settings in the place of config.json's, as '{"use_hisa": true}'""",
    )  # fmt: skip
