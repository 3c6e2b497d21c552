"""Real text in, tokens out: any text file, or the Python sources of the interpreter's own standard library."""

import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from bench import UserError

# A word, number or punctuation mark, with a space before it, or a run of whitespace: every character is in a token.
_TOKEN = re.compile(r" ?(?:[^\W\d]\w*|\d+|[^\w\s])|\s+")
_SKIPPED_FOLDERS = {"site-packages", "test", "tests", "__pycache__"}


def tokenize(text: str) -> list[str]:
    """Cuts a text into tokens; joined, they are the text again."""
    return _TOKEN.findall(text)


def file_tokens(path: Path, at_least: int) -> list[str]:
    """Tokens of a text file; what is not UTF-8 becomes replacement characters."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"--text {path}: cannot be read: {error.strerror}") from error
    if not content:
        raise UserError(f"--text {path}: is empty")
    return _long_enough(tokenize(content.decode(errors="replace")), at_least, f"--text {path}")


def standard_library_tokens(at_least: int) -> list[str]:
    """Tokens of the standard library's sources, file after file in the order of their paths, until there are enough."""
    folder = Path(sysconfig.get_path("stdlib"))
    tokens: list[str] = []
    for source in _sources(folder):
        tokens += tokenize(source)
        if len(tokens) >= at_least:
            break
    return _long_enough(tokens, at_least, f"the standard library's sources in {folder}")


def _long_enough(tokens: list[str], at_least: int, source: str) -> list[str]:
    if len(tokens) < at_least:
        raise UserError(f"{source}: {len(tokens):,} tokens, wanted {at_least:,}: give more text or a smaller --context")
    return tokens


def _sources(folder: Path) -> Iterator[str]:
    for path in sorted(folder.rglob("*.py")):
        if _SKIPPED_FOLDERS.isdisjoint(path.relative_to(folder).parts):
            try:
                yield path.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError):
                continue
