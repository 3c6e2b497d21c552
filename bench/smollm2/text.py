"""Text to train and test on: documents and code of Django's source distribution, and Python's own library."""

import hashlib
import sysconfig
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

_SMALLEST, _LARGEST = 2_000, 400_000  # bytes of a document
_SKIPPED = {"test", "locale", "site-packages", "dist-packages", "__pycache__", "idlelib", "lib2to3"}
_HELD_OUT = 8  # one document of so many
SEPARATOR = 0  # the model's own end of a text
# Tokens taken, at most: prose and code.
_TRAIN, _TEST = (2_600_000, 3_000_000), (110_000, 60_000)


class Text(NamedTuple):
    """Tokens, uint16: what is trained on; prose and code of other documents; more prose of those, to hide facts in."""

    train: np.ndarray
    prose: np.ndarray
    code: np.ndarray
    filler: np.ndarray


def read_text(django: Path, tokenizer: Any) -> Text:
    """Reads, orders by a hash of the path, holds one document of eight out and tokenises, each text with its end."""
    documents = sorted([*_of_archive(django), *_of_library()])
    order = sorted(documents, key=lambda document: hashlib.sha256(document[0].encode()).digest())
    parts: dict[str, tuple[list[str], list[str]]] = {}
    for name, suffixes in (("prose", (".txt", ".rst")), ("code", (".py",))):
        texts = [content for path, content in order if path.endswith(suffixes)]
        n = len(texts) // _HELD_OUT
        parts[name] = texts[:n], texts[n:]
    train = [_stream(parts[name][1], most, tokenizer) for name, most in zip(("prose", "code"), _TRAIN, strict=True)]
    prose, code = (
        _stream(parts[name][0], most, tokenizer) for name, most in zip(("prose", "code"), _TEST, strict=True)
    )
    rest = parts["prose"][0][len(parts["prose"][0]) // 2 :]
    return Text(np.concatenate(train), prose, code, _stream(rest, 300_000, tokenizer))


def _stream(texts: list[str], most: int, tokenizer: Any) -> np.ndarray:
    ids: list[int] = []
    for text in texts:
        ids += [*tokenizer.encode(text, add_special_tokens=False).ids, SEPARATOR]
        if len(ids) >= most:
            break
    return np.array(ids[:most], np.uint16)


def _is_wanted(path: Path, size: int) -> bool:
    return (
        path.suffix in (".txt", ".rst", ".py")
        and _SMALLEST < size < _LARGEST
        and _SKIPPED.isdisjoint(path.parts)
    )  # fmt: skip


def _of_archive(archive: Path) -> Iterator[tuple[str, str]]:
    with tarfile.open(archive) as files:
        for member in files:
            path = Path(*Path(member.name).parts[1:])
            content = files.extractfile(member) if member.isfile() and _is_wanted(path, member.size) else None
            if content is not None:
                text = content.read().decode(errors="replace")
                yield f"django/{path.as_posix()}", text


def _of_library() -> Iterator[tuple[str, str]]:
    folder = Path(sysconfig.get_path("stdlib"))
    for path in sorted(folder.rglob("*.py")):
        within = path.relative_to(folder)
        if _is_wanted(within, path.stat().st_size):
            yield f"python/{within.as_posix()}", path.read_text(encoding="utf-8", errors="replace")
