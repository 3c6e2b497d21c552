"""Messages to a prompt, by the chat template of a checkpoint.

A template is a program of the checkpoint's author. It runs in jinja2's sandbox: it reaches the messages and what is
named here, and no attribute of Python's objects. How much time and memory it takes is not bounded.
"""

import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from hisa_jax.checks import optional_packages
from hisa_jax.models.json_object import read_object, short, shown

_LARGEST_FILE = 2**22
_LARGEST_PROMPT = 2**24  # characters


class ChatTemplate:
    """A chat template.

    Args:
        source: jinja2.
        name: what errors call it.
        special: texts of special tokens by name, as "bos_token", which templates refer to.

    Raises: MissingExtra: the package jinja2 is missing. ValueError: not a template.
    """

    def __init__(self, source: str, name: str, special: Mapping[str, str] | None = None):
        with optional_packages():
            import jinja2
            from jinja2.ext import loopcontrols
            from jinja2.sandbox import ImmutableSandboxedEnvironment
        self._name, self._special, self._errors = name, dict(special or {}), jinja2.TemplateError
        # What the transformers package gives templates; they are written for it.
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        environment.filters["tojson"] = _to_json
        environment.globals |= {"raise_exception": _refuse, "strftime_now": _now}
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise ValueError(f"{name}: not a template: {short(str(error))}") from error

    def render(self, messages: Sequence[Mapping[str, Any]], **names: Any) -> str:
        """The prompt after which the assistant's answer comes.

        Args:
            messages: each with "role" and "content".
            names: more that the template may read, as tools.

        Raises: ValueError: the template refuses these messages, or fails.
        """
        parts, size = [], 0
        given = {**self._special, "messages": list(messages), "add_generation_prompt": True, **names}
        try:
            for part in self._template.generate(given):
                parts.append(part)
                size += len(part)
                if size > _LARGEST_PROMPT:
                    raise ValueError(f"makes more than {_LARGEST_PROMPT} characters")
        except (
            self._errors,
            ValueError,
            TypeError,
            ArithmeticError,
            LookupError,
            AttributeError,
            RecursionError,
        ) as error:
            raise ValueError(f"{self._name}: {short(str(error))}") from error
        return "".join(parts)


def load_chat_template(folder: str | Path) -> ChatTemplate | None:
    """The chat template of a checkpoint: chat_template.jinja, else `chat_template` of tokenizer_config.json.

    Args:
        folder: of the checkpoint. Of several named templates the one called "default" counts.

    Returns: it; None if there is none.
    Raises: MissingExtra: the package jinja2 is missing. ValueError: a file that is none.
    """
    folder = Path(folder)
    config = folder / "tokenizer_config.json"
    keys = read_object(config, _LARGEST_FILE) if config.is_file() else {}
    special = {name: text for name, value in keys.items() if (text := _text_of(value)) and name.endswith("_token")}
    file = folder / "chat_template.jinja"
    if file.is_file():
        return ChatTemplate(_read(file), str(file), special)
    source = keys.get("chat_template")
    if isinstance(source, list):
        named = {item.get("name"): item.get("template") for item in source if isinstance(item, dict)}
        source = named.get("default")
    if source is None:
        return None
    if not isinstance(source, str):
        raise ValueError(f"{config}: chat_template is {shown(source)}, wanted a text")
    return ChatTemplate(source, f"{config}: chat_template", special)


def _read(file: Path) -> str:
    with file.open("rb") as stream:
        data = stream.read(_LARGEST_FILE + 1)
    if len(data) > _LARGEST_FILE:
        raise ValueError(f"{file}: has more than {_LARGEST_FILE} bytes, too many for a template")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: not UTF-8 at byte {error.start}") from None


def _text_of(token: Any) -> str | None:
    """A special token is a text, or an object that has it as its content."""
    text = token.get("content") if isinstance(token, Mapping) else token
    return text if isinstance(text, str) else None


def _to_json(value: Any, indent: int | None = None, ensure_ascii: bool = False) -> str:
    return json.dumps(value, indent=indent, ensure_ascii=ensure_ascii)


def _refuse(message: str) -> NoReturn:
    raise ValueError(message)


def _now(form: str) -> str:
    return datetime.datetime.now().strftime(form)
