"""What do HISA and the scan keep, and what do they lose? A trained model with its flat indexer replaced.

The checkpoint was trained with the flat indexer; HISA, the scan and block-sparse take its place without training, at
the same number of selected tokens. The report is in parts: bits a byte of held-out text by position, single needles by
depth, many similar needles, other long-range tasks, selections layer by layer at the flat model's hidden states,
variants of the scan and of HISA.
"""

import argparse
import dataclasses
import json
import math
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from bench import UserError, options, shapes
from bench.quality.cells import PARTS, Cell, Folder, Plan, fingerprint
from bench.quality.figures import all_figures
from bench.quality.model import BYTES, load, load_hisa_aware
from bench.quality.page import about, markdown, page, png, verdict
from bench.quality.size import CONTEXTS, SIZES, Size
from bench.quality.variants import ablations, main_variants, scans
from bench.records import device, plain
from bench.smollm2 import command
from hisa_jax.models.training.text import Corpus, load_corpus, read_corpus

_MINUTES = {"small": 30.0, "full": math.inf}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", choices=("bytes", "smollm2"), default="bytes",
        help="the byte model of --checkpoint, or SmolLM2-135M with indexers trained for it (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--checkpoint", type=Path, default=BYTES, metavar="DIR", help="default: the trained model that comes along"
    )
    parser.add_argument("--corpus", type=Path, metavar="FILE.npz", help="default: this machine's text, read now")
    parser.add_argument("--out", type=Path, default=Path("quality_out"), metavar="DIR", help="default: %(default)s")
    parser.add_argument("--size", choices=SIZES, default="small", help="full is for a GPU (default: %(default)s)")
    parser.add_argument(
        "--part", choices=[*PARTS, *command.PARTS], nargs="+", metavar="PART",
        help=f"of bytes: {', '.join(PARTS)} (default: all); of smollm2: {', '.join(command.PARTS)} "
        f"(default: {', '.join(command.DEFAULT)})",
    )  # fmt: skip
    parser.add_argument(
        "--contexts", type=options.whole(2, CONTEXTS[-1]), nargs="+", metavar="N",
        help=f"of {', '.join(map(str, CONTEXTS))} (default: those of the size)",
    )  # fmt: skip
    parser.add_argument(
        "--samples", type=options.whole(1, 10_000), metavar="N",
        help="samples of each kind wherever the size has some (default: those of the size)",
    )  # fmt: skip
    parser.add_argument(
        "--minutes", type=float, metavar="M",
        help="begin nothing later than this; the same command goes on (default: 30 for small)",
    )  # fmt: skip
    for name, default in (("block-size", 32), ("block-topk", 32)):
        kind = options.whole(1, 4096)
        parser.add_argument(f"--{name}", type=kind, default=default, metavar="N", help="of HISA (default: %(default)s)")
    command.add_arguments(parser.add_argument_group("--model smollm2"))


def run(args: argparse.Namespace) -> int:
    parts_of_model = command.PARTS if args.model == "smollm2" else PARTS
    for part in args.part or ():
        if part not in parts_of_model:
            raise UserError(f"--part {part}: --model {args.model} has {', '.join(parts_of_model)}")
    if args.model == "smollm2":
        return command.run(args)
    console = Console()
    if not args.checkpoint.is_dir():
        raise UserError(f"--checkpoint {args.checkpoint}: no such folder")
    size = _size(args)
    stacked, corpus = load(args.checkpoint), corpus_of(args.corpus)
    config = stacked.config
    contexts = args.contexts or [c for c in CONTEXTS if c <= config.max_position_embeddings]
    _check(contexts, config.max_position_embeddings, corpus)
    topk, block_size, block_topk = config.index_topk, args.block_size, args.block_topk
    try:
        variants = main_variants(topk, block_size, block_topk), ablations(topk, block_size, block_topk)
    except ValueError as error:
        raise UserError(f"--block-size {block_size} --block-topk {block_topk}: {error}") from error
    aware = load_hisa_aware(args.checkpoint)
    plan = Plan(stacked, aware, corpus, size, *variants, scans(topk))
    identity = {
        "weights": fingerprint(stacked), "corpus": corpus.sha256, "topk": topk, "block_size": block_size,
        "block_topk": block_topk, "measured": json.loads(json.dumps(dataclasses.asdict(size))),
    }  # fmt: skip
    folder = Folder(args.out, identity)
    minutes = _MINUTES[args.size] if args.minutes is None else args.minutes
    rows, seconds, left = _measure(console, folder, plan.cells(args.part or PARTS, contexts), minutes)
    del identity["measured"]
    data = {
        "checkpoint": args.checkpoint.name, **identity, "candidates": block_size * block_topk, "size": args.size,
        "dtype": str(stacked.embed.dtype), "held_out_bytes": corpus.held_out.size, "seconds": seconds, **device(),
        "hisa_aware": "measured" if aware is not None else "not trained",
        "not_measured": [f"{cell.part} {shapes.label(cell.context)} {cell.method}" for cell in left],
        "rows": plain(rows, digits=6),
    }  # fmt: skip
    return _write(console, args.out, data)


def _size(args: argparse.Namespace) -> Size:
    size = SIZES[args.size]
    if args.samples is None and args.contexts is None:
        return size
    changed: dict[str, Any] = {}
    for field in dataclasses.fields(size):
        counts = getattr(size, field.name)
        if isinstance(counts, dict):
            # A context asked for by name is measured, with as many samples as the longest one that the size has.
            fewest = min(counts.values(), default=1)
            at = args.contexts or list(counts)
            changed[field.name] = {c: args.samples or counts.get(c, fewest) for c in at}
    return dataclasses.replace(size, **changed)


def corpus_of(path: Path | None) -> Corpus:
    """That of a file, or this machine's text. Raises: UserError: it cannot be read, or is none."""
    try:
        return read_corpus() if path is None else load_corpus(path)
    except (OSError, ValueError) as error:
        raise UserError(f"--corpus {path}: {error}" if path else str(error)) from error


def _check(contexts: list[int], longest: int, corpus: Corpus) -> None:
    for context in contexts:
        if context > longest:
            raise UserError(f"--contexts {context}: wanted at most {longest}, the model's longest")
        if context > corpus.held_out.size:
            raise UserError(f"--contexts {context}: wanted at most {corpus.held_out.size}, the text held out")


def _measure(
    console: Console, folder: Folder, cells: list[Cell], minutes: float
) -> tuple[list[dict[str, Any]], float, list[Cell]]:
    """Rows of all cells, seconds that the finished ones took, cells left for want of time."""
    rows: list[dict[str, Any]] = []
    left = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    start = time.monotonic()
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("", total=len(cells))
        for cell in cells:
            progress.update(bar, description=f"{cell.part} {shapes.label(cell.context)} {cell.method}")
            known = folder.known(cell)
            if known is None and time.monotonic() - start > 60 * minutes:
                left.append(cell)
                continue
            try:
                rows += folder.measure(cell) if known is None else known
            except ValueError as error:
                raise UserError(f"{cell.part} at {cell.context}: {error}") from error
            progress.advance(bar)
    return rows, folder.seconds(cells), left


def _write(console: Console, folder: Path, data: dict[str, Any]) -> int:
    if not data["rows"]:
        raise UserError("nothing was measured: give more --minutes, other --part or other --contexts")
    (folder / "quality.json").write_text(json.dumps(data, indent=1, allow_nan=False) + "\n")
    figures = {name: png(figure) for name, figure in all_figures(data["rows"]).items()}
    for name, content in figures.items():
        (folder / f"{name}.png").write_bytes(content)
    sentences = verdict(data)
    (folder / "quality.html").write_text(page(data, sentences, figures))
    (folder / "quality.md").write_text(markdown(data))
    for sentence in (
        *sentences,
        about(data),
        f"Written: {folder / 'quality.html'}, quality.json, {len(figures)} figures",
    ):
        console.print(sentence, highlight=False, markup=False, soft_wrap=True)
    return 0
