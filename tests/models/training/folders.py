"""Folders of made-up text to read."""

from pathlib import Path

import numpy as np

from hisa_jax.models.training.lines import draw_passage


def prose(seed: int, n_lines: int = 40) -> str:
    """Lines of words, no two alike."""
    rng = np.random.default_rng(seed)
    return "".join(f"{draw_passage(rng, 8)}.\n" for _ in range(n_lines))


def write_files(folder: Path, files: dict[str, str | bytes]) -> Path:
    """Writes files by their path in a folder, which it returns."""
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def many_files(n: int = 200) -> dict[str, str | bytes]:
    """Enough that several are held out."""
    return {f"part{at % 3}/file{at}.txt": prose(at) for at in range(n)}
