"""The commands: hisa-jax COMMAND, or python -m hisa_jax COMMAND; each says what it takes with --help."""

import argparse
import importlib
import os
import subprocess
import sys
from collections.abc import Sequence

import hisa_jax as hj
from hisa_jax.checkout import checkout
from hisa_jax.checks import optional_packages
from hisa_jax.command_line import Command, UsageError

COMMANDS = {
    "chat": Command(
        "hisa_jax.models.chat_command:add_arguments",
        "talk to a checkpoint by its chat template, a message a line",
        "echo 'Hello' | hisa-jax chat --checkpoint bytes --max-new-tokens 64",
    ),
    "check": Command(
        "hisa_jax.models.check.command:add_arguments",
        "what each indexer keeps of a checkpoint's own, on your text",
        "hisa-jax check --checkpoint bytes --text book.txt --context 4096",
    ),
    "check-dump": Command(
        "hisa_jax.testing.dump_command:add_arguments",
        "whether the tokens that another framework selected follow from its q, k and w",
        "hisa-jax check-dump dump.npz\n"
        '  where np.savez("dump.npz", q=q, k=k, w=w, indices=indices)     # [T, H, D], [S, D], [T, H], [T, topk]',
    ),
    "data": Command(
        "hisa_jax.models.training.data_command:add_arguments",
        "collect text to train a byte-level model on",
        "hisa-jax data --out corpus.npz --folder texts",
    ),
    "evaluate": Command(
        "hisa_jax.models.evaluate.command:add_arguments",
        "the same questions to each indexer by lm-eval's tasks: one table, intervals, paired differences",
        "hisa-jax evaluate --checkpoint bytes --tasks needles --indexers flat,hisa,scan --lengths 2048 --limit 20",
    ),
    "generate": Command(
        "hisa_jax.models.generate_command:add_arguments",
        "continue prompts by a checkpoint",
        "hisa-jax generate --checkpoint bytes --prompt 'def main(' --indexer scan",
    ),
    "serve": Command(
        "hisa_jax.models.serve.command:add_arguments",
        "serve a checkpoint by OpenAI's interface: completions, chat, metrics, and a page to look at",
        "hisa-jax serve --checkpoint bytes --indexer hisa --port 8000",
    ),
    "train": Command(
        "hisa_jax.models.training.command:add_arguments",
        "train a byte-level model with DSA's stages",
        "hisa-jax train --out run --corpus corpus.npz",
    ),
}  # fmt: skip
# Of the repository: handed to `python -m bench` as they are.
_BENCHES = {
    "bench": "speed, memory, faults, quality: each bench a command of its own",
    "demo": "the indexers side by side on real text: answers, speed",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        arguments: default: those of the process.

    Returns: the exit status: what the command says, 0 if it says nothing; 2 for what cannot be meant as it was typed,
        1 after any other error, 130 after an interrupt.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    parser = argparse.ArgumentParser(
        prog="hisa-jax", description="Choosing tokens for sparse attention.",
        epilog="example:\n  hisa-jax generate --help", formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--version", action="version", version=f"hisa_jax {hj.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, description in _BENCHES.items():
        commands.add_parser(name, help=f"{description} (from a checkout)")
    try:
        if arguments[:1] and arguments[0] in _BENCHES:
            return _bench(arguments[1:] if arguments[0] == "bench" else arguments)
        with optional_packages():
            for name, command in COMMANDS.items():
                added = command.add_to(commands, name)
                if arguments[:1] == [name]:
                    module, add_arguments = command.where.split(":")
                    getattr(importlib.import_module(module), add_arguments)(added)
            options = parser.parse_args(arguments)
            return options.run(options) or 0
    except (ValueError, OSError, ModuleNotFoundError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    except KeyboardInterrupt:
        return 130


def _bench(arguments: list[str]) -> int:
    """Runs `python -m bench` of a checkout with that checkout's library, whichever is installed."""
    root = checkout("bench")
    if root is None:
        raise FileNotFoundError(
            "demo and benches lie in the repository of hisa_jax, not in the wheel: clone it and run this in it"
        )
    paths = [str(root), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    # -P: another folder of this name, where this is run, is not taken for it.
    return subprocess.call([sys.executable, "-P", "-m", "bench", *arguments], env=environment)


if __name__ == "__main__":
    sys.exit(main())
