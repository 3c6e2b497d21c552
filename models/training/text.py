"""Real text to train on: what a machine with Python has anyway, or folders of yours, cleaned and split by file."""

import collections
import dataclasses
import gzip
import hashlib
import json
import os
import sys
import sysconfig
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

SEPARATOR = 0  # precedes every document; no document has it
_SMALLEST, _LARGEST = 200, 1_000_000  # bytes of a document
_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "__pycache__", ".git"}
_HELD_OUT = 0.04  # of the files
_MANUAL, _LICENSES = Path("/usr/share/man"), Path("/usr/share/common-licenses")
_SHINGLE = 2  # lines
# A document is dropped if more than this share of its shingles stands in the documents kept before it. What is held
# out comes last and is judged harder, since it is to measure what the model has not read.
_DUPLICATE_SHARE = {"train": 0.3, "held_out": 0.1}


class _Document(NamedTuple):
    source: str
    path: str  # from the root
    content: bytes


@dataclasses.dataclass(frozen=True)
class Source:
    """One root folder of a corpus, as the model card lists it."""

    name: str
    train_files: int
    train_bytes: int
    held_out_files: int
    held_out_bytes: int
    dropped: dict[str, int]  # files left out, by reason


@dataclasses.dataclass(frozen=True, eq=False)
class Corpus:
    """Documents, each preceded by a byte 0, in the order of their paths.

    Attributes:
        train: uint8 [N], what the model reads.
        held_out: uint8 [M], other files, none of them near to one of `train`.
        train_names, held_out_names: the documents, as source/path.
        sources: how much came from where and what was dropped.
    """

    train: np.ndarray
    held_out: np.ndarray
    train_names: tuple[str, ...]
    held_out_names: tuple[str, ...]
    sources: tuple[Source, ...]

    @property
    def sha256(self) -> str:
        """Of both splits: the same text gives the same."""
        digest = hashlib.sha256(self.train)
        digest.update(self.held_out)
        return digest.hexdigest()

    def card(self) -> dict:
        """Sizes, sources and hash, ready for JSON."""
        return {
            "sha256": self.sha256,
            "train_bytes": self.train.size,
            "held_out_bytes": self.held_out.size,
            "train_files": len(self.train_names),
            "held_out_files": len(self.held_out_names),
            "sources": [dataclasses.asdict(source) for source in self.sources],
        }


def read_corpus(folders: Sequence[Path] | None = None) -> Corpus:
    """Reads text files, leaves out what is neither prose nor code and what comes twice, and splits the rest by file.

    Args:
        folders: roots to read, whole. Default: the standard library of this Python with its tests, and where they
            exist the man pages in English, the common licences and the documentation under Python's prefix.

    Returns: the corpus; the same files give the same one on every machine.
    Raises: ValueError: a folder that does not exist, two of one name, or too few files to hold some out.
    """
    roots = _default_roots() if folders is None else _named_roots(folders)
    dropped: dict[str, collections.Counter[str]] = {name: collections.Counter() for name, _ in roots}
    kept = _split(_text_files(roots, dropped), dropped)
    train, held_out = kept["train"], kept["held_out"]
    if not (train and held_out):
        raise ValueError(
            f"read_corpus: {len(train)} files to train on and {len(held_out)} held out from "
            f"{', '.join(str(folder) for _, folder in roots) or 'nowhere'}, wanted at least one of each: "
            "give folders with more text files"
        )
    sources = tuple(_source(name, train, held_out, dropped[name]) for name in dropped)
    return Corpus(_joined(train), _joined(held_out), _names(train), _names(held_out), sources)


def held_out_text(n_bytes: int) -> bytes:
    """Standard library files that are held out wherever this corpus is read, joined, cut to `n_bytes`.

    Raises: ValueError: there are not so many.
    """
    joined = b""
    for document in _files([("python", Path(sysconfig.get_path("stdlib")))]):
        if _place(document.path) <= _HELD_OUT and why_not(document.content) is None:
            joined += document.content
            if len(joined) >= n_bytes:
                return joined[:n_bytes]
    raise ValueError(f"held_out_text: n_bytes is {n_bytes}, wanted at most {len(joined)}, what this Python has")


def why_not(content: bytes) -> str | None:
    """Why a file is left out, None if it is text to read."""
    if not _SMALLEST <= len(content) <= _LARGEST:
        return f"not {_SMALLEST} to {_LARGEST} bytes"
    if b"\0" in content:
        return "not text"
    try:
        content.decode("utf-8")
    except UnicodeDecodeError:
        return "not text"
    # Tables of numbers or code points, keys in base64, the same line over and over: shares found on such files.
    digits = sum(content.count(digit) for digit in b"0123456789")
    if digits > 0.12 * len(content):
        return "digits"
    if max(map(len, content.splitlines())) > 5000:
        return "long lines"
    ratio = len(zlib.compress(content, 1)) / len(content)
    return None if 0.08 < ratio < 0.7 else "compresses unlike text"


def save_corpus(corpus: Corpus, path: Path) -> None:
    """Writes one compressed .npz."""
    card = {
        "train_names": corpus.train_names,
        "held_out_names": corpus.held_out_names,
        "sources": [dataclasses.asdict(source) for source in corpus.sources],
    }
    with open(path, "wb") as file:  # a file, since NumPy would add a suffix to a name without one
        np.savez_compressed(
            file, train=corpus.train, held_out=corpus.held_out, card=np.frombuffer(json.dumps(card).encode(), np.uint8)
        )


def load_corpus(path: Path) -> Corpus:
    """Reads what `save_corpus` wrote.

    Raises: ValueError: a file that it did not write. OSError: none there.
    """
    try:
        with open(path, "rb") as file, np.load(file) as arrays:
            train, held_out, card = arrays["train"], arrays["held_out"], json.loads(arrays["card"].tobytes())
    except (KeyError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"load_corpus: {path} is no corpus written by save_corpus: {error}") from error
    sources = tuple(Source(**source) for source in card["sources"])
    return Corpus(train, held_out, tuple(card["train_names"]), tuple(card["held_out_names"]), sources)


def _default_roots() -> list[tuple[str, Path]]:
    roots = [("python", Path(sysconfig.get_path("stdlib")))]
    # Its sections alone: the other folders are translations.
    roots += [(f"man{section}", _MANUAL / f"man{section}") for section in range(1, 9)]
    roots += [("licenses", _LICENSES), ("doc", Path(sys.base_prefix) / "share" / "doc")]
    return [(name, folder) for name, folder in roots if folder.is_dir()]


def _named_roots(folders: Sequence[Path]) -> list[tuple[str, Path]]:
    roots: dict[str, Path] = {}
    for folder in map(Path, folders):
        if not folder.is_dir():
            raise ValueError(f"read_corpus: folders has {folder}, wanted a folder")
        name = folder.resolve().name
        if name in roots:
            raise ValueError(f"read_corpus: folders has {roots[name]} and {folder}, wanted folders of different names")
        roots[name] = folder
    return list(roots.items())


def _text_files(roots: Sequence[tuple[str, Path]], dropped: dict[str, collections.Counter[str]]) -> list[_Document]:
    """The files that are text, each content once; counts the others."""
    documents = []
    seen: set[bytes] = set()
    for document in _files(roots):
        digest = hashlib.sha256(document.content).digest()
        reason = why_not(document.content) or ("same content" if digest in seen else None)
        if reason is None:
            seen.add(digest)
            documents.append(document)
        else:
            dropped[document.source][reason] += 1
    return documents


def _split(documents: Sequence[_Document], dropped: dict[str, collections.Counter[str]]) -> dict[str, list[_Document]]:
    """What to train on, what is held out, both without near duplicates; counts those."""
    held_out = _held_out({document.path for document in documents})
    kept: dict[str, list[_Document]] = {"train": [], "held_out": []}
    seen: set[int] = set()
    for split, documents_kept in kept.items():
        for document in documents:
            if (document.path in held_out) != (split == "held_out"):
                continue
            shingles = _shingles(document.content)
            if len(shingles & seen) > _DUPLICATE_SHARE[split] * len(shingles):
                dropped[document.source]["near duplicate"] += 1
                continue
            seen |= shingles
            documents_kept.append(document)
    return kept


def _files(roots: Sequence[tuple[str, Path]]) -> Iterator[_Document]:
    """Each file, in the order of the paths; .gz unpacked, links and what cannot be read left out."""
    for name, root in roots:
        paths = []
        for folder, subfolders, files in os.walk(root):
            subfolders[:] = [subfolder for subfolder in subfolders if subfolder not in _SKIPPED_FOLDERS]
            paths += [Path(folder, file) for file in files]
        for path in sorted(paths, key=lambda path: path.relative_to(root).as_posix()):
            if path.is_symlink() or not path.is_file() or path.stat().st_size > _LARGEST:
                continue
            try:
                content = path.read_bytes()
                if path.suffix == ".gz":
                    content = gzip.decompress(content)
            except (OSError, EOFError, zlib.error):
                continue
            yield _Document(name, path.relative_to(root).as_posix(), _without_macros(content))


def _without_macros(content: bytes) -> bytes:
    """A manual page from its title on: before it stand macros that thousands of pages share. Other text as it is."""
    if not content.lstrip().startswith((b".", b"'")):
        return content
    starts = [at for title in (b"\n.TH ", b"\n.Dd ") if (at := content.find(title)) >= 0]
    return content[min(starts) + 1 :] if starts else content


def _shingles(content: bytes) -> set[int]:
    """Hashes of the runs of lines, blank ones and indentation apart."""
    lines = [line.strip() for line in content.splitlines()]
    lines = [line for line in lines if line]
    return {hash(tuple(lines[at : at + _SHINGLE])) for at in range(max(1, len(lines) - _SHINGLE + 1))}


def _held_out(paths: set[str]) -> set[str]:
    """The files held out, by a hash of the path from the root, so the same on every machine; at least one."""
    places = {path: _place(path) for path in paths}
    most = max(_HELD_OUT, min(places.values(), default=0.0))
    return {path for path, place in places.items() if place <= most}


def _place(path: str) -> float:
    """Where in [0, 1) a path's hash puts it."""
    return int.from_bytes(hashlib.sha256(path.encode()).digest()[:4], "big") / 2**32


def _joined(documents: Sequence[_Document]) -> np.ndarray:
    separator = bytes([SEPARATOR])
    return np.frombuffer(b"".join(separator + document.content for document in documents), np.uint8)


def _names(documents: Sequence[_Document]) -> tuple[str, ...]:
    return tuple(f"{document.source}/{document.path}" for document in documents)


def _source(
    name: str, train: Sequence[_Document], held_out: Sequence[_Document], dropped: collections.Counter[str]
) -> Source:
    sizes = [
        [len(document.content) + 1 for document in documents if document.source == name]
        for documents in (train, held_out)
    ]
    return Source(name, len(sizes[0]), sum(sizes[0]), len(sizes[1]), sum(sizes[1]), dict(dropped))
