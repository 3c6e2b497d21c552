"""The commands: python -m hisa_jax.models generate, serve, check, data, train; each says what it takes by --help."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from hisa_jax.checks import optional_packages
from hisa_jax.models.check import command as check
from hisa_jax.models.config import read_config
from hisa_jax.models.generate import Generation, generate
from hisa_jax.models.json_object import shown
from hisa_jax.models.locate import locate
from hisa_jax.models.options import add_model, add_sampling, load, sampling_of
from hisa_jax.models.progress import Progress
from hisa_jax.models.sampling import Logprobs
from hisa_jax.models.serve import command as serve
from hisa_jax.models.sharding import make_mesh
from hisa_jax.models.tokens import load_tokenizer
from hisa_jax.models.training import command as training
from hisa_jax.models.training.text import read_corpus, save_corpus


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        arguments: default: those of the process.

    Returns: the exit status; 1 for a bad checkpoint, a bad argument, or logits that are not finite.
    """
    options = _parser().parse_args(arguments)
    try:
        with optional_packages():
            options.run(options)
    except (ValueError, OSError, ModuleNotFoundError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _generate(options: argparse.Namespace) -> None:
    folder = locate(options.checkpoint)
    config = read_config(folder, options.override)
    sampling = sampling_of(options)
    prompts: list = [_ids(text) for text in options.prompt_ids] if options.prompt_ids else options.prompt
    if not options.prompt_ids:
        tokenizer = load_tokenizer(folder, config.vocab_size)
        prompts = [tokenizer.encode(text) for text in prompts]  # refused before the weights are read
    devices = options.data_parallel, options.model_parallel
    mesh = None if devices == (1, 1) else make_mesh(*devices)
    model = load(options, folder, config, mesh)
    for _ in range(2 if options.warm_up else 1):
        result = generate(
            model, prompts, sampling=sampling, chunk=options.chunk, report_recall=options.report_recall,
            tokenizer=None if options.prompt_ids else tokenizer, progress=Progress(),
        )  # fmt: skip
    for answer in [",".join(map(str, tokens)) for tokens in result.tokens] if options.prompt_ids else result.texts:
        print(answer)
    for row, logprobs in enumerate(result.logprobs):
        _show_logprobs(row, logprobs)
    _report(result, options.warm_up)


def _ids(text: str) -> list[int]:
    try:
        return [int(token) for token in text.split(",")]
    except ValueError:
        raise ValueError(f"--prompt-ids: {shown(text)}, wanted token ids with commas between, as 1,2,3") from None


def _show_logprobs(row: int, logprobs: Sequence[Logprobs]) -> None:
    if logprobs:
        print(f"prompt {row}: token, its log probability, the likeliest in its place", file=sys.stderr)
    for one in logprobs:
        top = ", ".join(f"{token} {value:.3f}" for token, value in one.top)
        print(f"{one.token:>8} {one.logprob:>8.3f}  {top}".rstrip(), file=sys.stderr)


def _report(result: Generation, is_warm: bool) -> None:
    new = sum(map(len, result.tokens))
    print(
        f"prefill {result.prompt_tokens} tokens, {result.prefill_rate:.1f} tokens/s; "
        f"decode {new} tokens, {result.decode_rate:.1f} tokens/s"
        f"{'' if is_warm else ' (compilation included)'}",
        file=sys.stderr,
    )
    if not result.recall:
        return
    print("recall against the flat indexer, where more than topk tokens are visible", file=sys.stderr)
    print(f"{'layer':>5} {'prefill':>8} {'decode':>8}", file=sys.stderr)
    for layer, pair in enumerate(zip(result.recall["prefill"], result.recall["decode"], strict=True)):
        cells = " ".join(f"{'-' if value is None else format(value, '.4f'):>8}" for value in pair)
        print(f"{layer:>5} {cells}", file=sys.stderr)


def _data(options: argparse.Namespace) -> None:
    corpus = read_corpus(options.folder)
    save_corpus(corpus, options.out)
    for source in corpus.sources:
        print(
            f"{source.name}: {source.train_bytes:,} bytes of {source.train_files:,} files, held out "
            f"{source.held_out_bytes:,} of {source.held_out_files:,}, left out {sum(source.dropped.values()):,}"
        )
    print(f"{options.out}: {corpus.train.size:,} and {corpus.held_out.size:,} bytes, sha256 {corpus.sha256}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m hisa_jax.models", description="DSA models with a pluggable indexer."
    )
    commands = parser.add_subparsers(required=True)
    add_data(commands.add_parser("data", help="collect text to train a byte-level model on"))
    training.add_arguments(commands.add_parser("train", help="train a byte-level model with DSA's stages"))
    add_generate(commands.add_parser("generate", help="continue prompts by a local checkpoint"))
    serve.add_arguments(commands.add_parser("serve", help="serve a checkpoint by OpenAI's interface"))
    check.add_arguments(
        commands.add_parser("check", help="what each indexer keeps of a checkpoint's own, on your text")
    )
    return parser


def add_data(command: argparse.ArgumentParser) -> None:
    """What `data` takes."""
    command.set_defaults(run=_data)
    command.add_argument("--out", required=True, type=Path, metavar="FILE", help=".npz to write")
    command.add_argument(
        "--folder", action="append", type=Path, metavar="DIR",
        help="text files to read, repeat for more; default: Python's standard library and this machine's man pages",
    )  # fmt: skip


def add_generate(command: argparse.ArgumentParser) -> None:
    """What `generate` takes."""
    command.set_defaults(run=_generate)
    add_model(command)
    prompts = command.add_mutually_exclusive_group(required=True)
    prompts.add_argument("--prompt", action="append", metavar="TEXT", help="repeat for a batch")
    prompts.add_argument("--prompt-ids", action="append", metavar="1,2,3", help="token ids; prints ids, too")
    add_sampling(command)
    command.add_argument("--chunk", type=int, default=512, help="prompt tokens a forward pass")
    command.add_argument("--data-parallel", type=int, default=1, metavar="N", help="devices the batch is split over")
    command.add_argument(
        "--model-parallel", type=int, default=1, metavar="N", help="devices the weights are split over"
    )
    command.add_argument("--warm-up", action="store_true", help="run twice, so that tokens/s leave compilation out")
    command.add_argument("--report-recall", action="store_true", help="compare each selection with the flat indexer's")


if __name__ == "__main__":
    sys.exit(main())
