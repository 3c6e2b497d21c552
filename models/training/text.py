"""Real text to train on: what a machine with Python has anyway, or folders of yours, cleaned and split by file."""

import dataclasses
import gzip
import hashlib
import json
import os
import sys
import sysconfig
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

SEPARATOR = 0  # precedes every document; no document has it
_SMALLEST, _LARGEST = 200, 1_000_000  # bytes of a document
_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "__pycache__", ".git"}
_HELD_OUT = 0.04  # of the files
_SHINGLE = 2  # lines
# A document is dropped if more than this share of its shingles stands in the documents kept before it. What is held
# out comes last and is judged harder, since it is to measure what the model has not read.
_DUPLICATE_SHARE = {"train": 0.3, "held_out": 0.1}


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
    """Reads text files, leaves out what is no prose or code and what comes twice, and splits the rest by file.

    Args:
        folders: roots to read, whole. Default: the standard library of this Python with its tests, and where they
            exist the man pages in English, the common licences and the documentation under Python's prefix.

    Returns: the corpus; the same files give the same one on every machine.
    Raises: ValueError: a folder that is none, two of one name, or too few files to hold some out.
    """
    roots = _default_roots() if folders is None else _named_roots(folders)
    documents: list[tuple[str, str, bytes]] = []  # source, path, content
    dropped: dict[str, dict[str, int]] = {name: {} for name, _ in roots}
    seen_contents: set[bytes] = set()
    for name, path, content in _files(roots):
        reason = why_not(content)
        if reason is None:
            digest = hashlib.sha256(content).digest()
            reason = "same content" if digest in seen_contents else None
            seen_contents.add(digest)
        if reason is None:
            documents.append((name, path, content))
        else:
            dropped[name][reason] = dropped[name].get(reason, 0) + 1
    kept: dict[str, list[tuple[str, str, bytes]]] = {"train": [], "held_out": []}
    seen_shingles: set[int] = set()
    for split, documents_kept in kept.items():
        for name, path, content in documents:
            if is_held_out(path) != (split == "held_out"):
                continue
            shingles = _shingles(content)
            if len(shingles & seen_shingles) > _DUPLICATE_SHARE[split] * len(shingles):
                dropped[name]["near duplicate"] = dropped[name].get("near duplicate", 0) + 1
                continue
            seen_shingles |= shingles
            documents_kept.append((name, path, content))
    if not (kept["train"] and kept["held_out"]):
        raise ValueError(
            f"read_corpus: {len(kept['train'])} files to train on and {len(kept['held_out'])} held out from "
            f"{', '.join(str(folder) for _, folder in roots) or 'nowhere'}, wanted at least one of each: "
            "give folders with more text files"
        )
    sources = tuple(_source(name, kept, dropped[name]) for name, _ in roots)
    return Corpus(
        _joined(kept["train"]), _joined(kept["held_out"]), _names(kept["train"]), _names(kept["held_out"]), sources
    )


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


def is_held_out(path: str) -> bool:
    """Which split a file is in: a hash of its path from its root, so the same on every machine."""
    return int.from_bytes(hashlib.sha256(path.encode()).digest()[:4], "big") < _HELD_OUT * 2**32


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
        with np.load(path) as arrays:
            train, held_out, card = arrays["train"], arrays["held_out"], json.loads(arrays["card"].tobytes())
    except (KeyError, ValueError, zlib.error) as error:
        raise ValueError(f"load_corpus: {path} is no corpus written by save_corpus: {error}") from error
    sources = tuple(Source(**source) for source in card["sources"])
    return Corpus(train, held_out, tuple(card["train_names"]), tuple(card["held_out_names"]), sources)


def _default_roots() -> list[tuple[str, Path]]:
    manual = Path("/usr/share/man")
    roots = [("python", Path(sysconfig.get_path("stdlib")))]
    # Its sections alone: the other folders are translations.
    roots += [(f"man{section}", manual / f"man{section}") for section in range(1, 9)]
    roots += [("licenses", Path("/usr/share/common-licenses")), ("doc", Path(sys.base_prefix) / "share" / "doc")]
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


def _files(roots: Sequence[tuple[str, Path]]) -> Iterator[tuple[str, str, bytes]]:
    """Source, path from its root and content of each file, in order; .gz unpacked, links and unreadable files not."""
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
            yield name, path.relative_to(root).as_posix(), _without_macros(content)


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


def _joined(documents: Sequence[tuple[str, str, bytes]]) -> np.ndarray:
    separator = bytes([SEPARATOR])
    return np.frombuffer(b"".join(separator + content for _, _, content in documents), np.uint8)


def _names(documents: Sequence[tuple[str, str, bytes]]) -> tuple[str, ...]:
    return tuple(f"{name}/{path}" for name, path, _ in documents)


def _source(name: str, kept: dict[str, list[tuple[str, str, bytes]]], dropped: dict[str, int]) -> Source:
    sizes = {split: [len(content) + 1 for source, _, content in kept[split] if source == name] for split in kept}
    train, held_out = sizes["train"], sizes["held_out"]
    return Source(name, len(train), sum(train), len(held_out), sum(held_out), dropped)
