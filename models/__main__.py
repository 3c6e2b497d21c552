"""The commands: python -m hisa_jax.models generate, check, data and train; each says what it takes with --help."""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp

from hisa_jax.checks import optional_packages
from hisa_jax.models.check import command as check
from hisa_jax.models.config import Config, read_config
from hisa_jax.models.generate import Generation, generate
from hisa_jax.models.indexers import NAMES, make_method, read_methods
from hisa_jax.models.json_object import shown
from hisa_jax.models.overrides import add_override
from hisa_jax.models.params import from_pretrained
from hisa_jax.models.plan import MethodLike
from hisa_jax.models.sharding import make_mesh
from hisa_jax.models.tokens import load_tokenizer
from hisa_jax.models.training import command as training
from hisa_jax.models.training.text import read_corpus, save_corpus

_DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


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
    config = read_config(options.checkpoint, options.override)
    tokenizer = load_tokenizer(options.checkpoint, config.vocab_size)
    if options.prompt_ids:
        prompts = [_ids(text) for text in options.prompt_ids]
    else:
        prompts = [tokenizer.encode(text) for text in options.prompt]
    devices = options.data_parallel, options.model_parallel
    mesh = None if devices == (1, 1) else make_mesh(*devices)
    method = _method(options, config)
    model = from_pretrained(options.checkpoint, method, _DTYPES[options.dtype], mesh, config=config)
    for _ in range(2 if options.warm_up else 1):
        result = generate(
            model, prompts, options.max_new_tokens, chunk=options.chunk, temperature=options.temperature,
            seed=options.seed, report_recall=options.report_recall,
        )  # fmt: skip
    for tokens in result.tokens:
        print(",".join(map(str, tokens)) if options.prompt_ids else tokenizer.decode(tokens))
    _report(result, options.warm_up)


def _ids(text: str) -> list[int]:
    try:
        return [int(token) for token in text.split(",")]
    except ValueError:
        raise ValueError(f"--prompt-ids: {shown(text)}, wanted token ids with commas between, as 1,2,3") from None


def _method(options: argparse.Namespace, config: Config) -> MethodLike:
    if options.indexer not in (None, *NAMES):
        return read_methods(options.indexer, config)
    fields = {field.name for method in NAMES.values() for field in dataclasses.fields(method)}
    # What a method does not have is refused there, by name, if it was given.
    given = {name: value for name in sorted(fields) if (value := getattr(options, name, None)) is not None}
    own = "hisa" if config.use_hisa else "dsa"
    return make_method(options.indexer or own, config, "--indexer", **given)


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
    _add_data(commands.add_parser("data", help="collect text to train a byte-level model on"))
    training.add_arguments(commands.add_parser("train", help="train a byte-level model with DSA's stages"))
    _add_generate(commands.add_parser("generate", help="continue prompts by a local checkpoint"))
    check.add_arguments(
        commands.add_parser("check", help="what each indexer keeps of a checkpoint's own, on your text")
    )
    return parser


def _add_data(command: argparse.ArgumentParser) -> None:
    command.set_defaults(run=_data)
    command.add_argument("--out", required=True, type=Path, metavar="FILE", help=".npz to write")
    command.add_argument(
        "--folder", action="append", type=Path, metavar="DIR",
        help="text files to read, repeat for more; default: Python's standard library and this machine's man pages",
    )  # fmt: skip


def _add_generate(command: argparse.ArgumentParser) -> None:
    command.set_defaults(run=_generate)
    command.add_argument("--checkpoint", required=True, metavar="DIR", help="folder with config.json and safetensors")
    prompts = command.add_mutually_exclusive_group(required=True)
    prompts.add_argument("--prompt", action="append", metavar="TEXT", help="repeat for a batch")
    prompts.add_argument("--prompt-ids", action="append", metavar="1,2,3", help="token ids; prints ids, too")
    add_override(command)
    command.add_argument(
        "--indexer", metavar="|".join([*NAMES, "FILE"]), help="FILE: per-layer JSON; default: the checkpoint's own"
    )
    command.add_argument("--topk", type=int, help="tokens each query attends to; default: the checkpoint's")
    command.add_argument("--block-size", type=int, help="tokens a block")
    command.add_argument("--block-topk", type=int, help="blocks kept, for hisa")
    command.add_argument("--block-ratio", type=int, help="for hisa: one block in so many is kept, up to --block-topk")
    command.add_argument("--candidates", type=int, help="tokens scored exactly, for scan; default: 4 times topk")
    command.add_argument("--exact-heads", type=int, help="heads scanned as they are, for scan; default: 4")
    command.add_argument("--unit", type=int, help="adjacent tokens that become candidates together, for scan")
    command.add_argument("--slopes", metavar="sampled|plain", help="of the virtual head, for scan")
    command.add_argument("--sketch", metavar="int4", help="what is scanned in place of the keys, for scan")
    command.add_argument("--max-new-tokens", type=int, default=32)
    command.add_argument("--chunk", type=int, default=512, help="prompt tokens a forward pass")
    command.add_argument("--temperature", type=float, default=0.0, help="0: the likeliest token")
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--dtype", choices=_DTYPES, default="bfloat16")
    command.add_argument("--data-parallel", type=int, default=1, metavar="N", help="devices the batch is split over")
    command.add_argument(
        "--model-parallel", type=int, default=1, metavar="N", help="devices the weights are split over"
    )
    command.add_argument("--warm-up", action="store_true", help="run twice, so that tokens/s leave compilation out")
    command.add_argument("--report-recall", action="store_true", help="compare each selection with the flat indexer's")


if __name__ == "__main__":
    sys.exit(main())
