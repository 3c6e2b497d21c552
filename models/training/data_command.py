"""The command `data`: text to train a byte-level model on, in one file."""

import argparse
from pathlib import Path

from hisa_jax.models.training.text import read_corpus, save_corpus


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `data` takes."""
    parser.set_defaults(run=run)
    parser.add_argument("--out", required=True, type=Path, metavar="FILE", help=".npz to write")
    parser.add_argument(
        "--folder", action="append", type=Path, metavar="DIR",
        help="text files to read, repeat for more; default: Python's standard library and this machine's man pages",
    )  # fmt: skip


def run(options: argparse.Namespace) -> None:
    """Reads, writes, says what it was."""
    corpus = read_corpus(options.folder)
    save_corpus(corpus, options.out)
    for source in corpus.sources:
        print(
            f"{source.name}: {source.train_bytes:,} bytes of {source.train_files:,} files, held out "
            f"{source.held_out_bytes:,} of {source.held_out_files:,}, left out {sum(source.dropped.values()):,}"
        )
    print(f"{options.out}: {corpus.train.size:,} and {corpus.held_out.size:,} bytes, sha256 {corpus.sha256}")
