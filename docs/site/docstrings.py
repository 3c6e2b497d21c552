"""Docstrings of this library as the reference shows them: sections in one line become paragraphs of their own."""

import re
from typing import Any

import griffe

_SECTION = re.compile(r"(Attributes|Args|Returns|Raises|Source|Yields): (\S.*)")


class Paragraphs(griffe.Extension):
    """Turns `Returns: text` into a paragraph, where Google's style has a section of indented lines alone."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = paragraphs(obj.docstring.value)


def paragraphs(text: str) -> str:
    """The docstring with each section that begins on its own line as `**Section**: text`, after an empty line."""
    lines: list[str] = []
    is_inside = False  # a paragraph, whose further lines are indented
    for line in text.split("\n"):
        match = _SECTION.fullmatch(line)
        if match:
            lines += ["", f"**{match[1]}**: {match[2]}"]
        elif is_inside and line.startswith(" "):
            lines.append(line.strip())
        else:
            # What follows a paragraph must not become part of it.
            lines += ["", line] if is_inside and line.strip() else [line]
        is_inside = bool(match) or (is_inside and line.startswith(" "))
    # The one section that holds doctests.
    return "\n".join("Examples:" if line == "Example:" else line for line in lines)
