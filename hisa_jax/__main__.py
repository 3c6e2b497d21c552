"""The commands: hisa-jax COMMAND, or python -m hisa_jax COMMAND; each says what it takes with --help."""

import argparse
import importlib
import sys
from collections.abc import Sequence

import hisa_jax as hj
from hisa_jax.checks import optional_packages

# Command -> the function that adds its arguments, and `run`, by module; help. Imported when the command is called.
COMMANDS = {
    "check": (
        "hisa_jax.models.check.command:add_arguments",
        "what each indexer keeps of a checkpoint's own, on your text",
    ),
    "check-dump": (
        "hisa_jax.testing.dump_command:add_arguments",
        "whether the tokens that another framework selected follow from its q, k and w",
    ),
    "data": ("hisa_jax.models.__main__:add_data", "collect text to train a byte-level model on"),
    "evaluate": (
        "hisa_jax.models.evaluate.command:add_arguments",
        "the same questions to each indexer by lm-eval's tasks: one table, intervals, paired differences",
    ),
    "generate": ("hisa_jax.models.__main__:add_generate", "continue prompts by a local checkpoint"),
    "serve": ("hisa_jax.models.serve.command:add_arguments", "serve a checkpoint by OpenAI's interface"),
    "train": ("hisa_jax.models.training.command:add_arguments", "train a byte-level model with DSA's stages"),
}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        arguments: default: those of the process.

    Returns: the exit status: what the command says, 0 if it says nothing, 2 after an error.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    parser = argparse.ArgumentParser(prog="hisa-jax", description="Choosing tokens for sparse attention.")
    parser.add_argument("--version", action="version", version=f"hisa_jax {hj.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    try:
        with optional_packages():
            for name, (where, description) in COMMANDS.items():
                command = commands.add_parser(name, help=description, description=description)
                if arguments[:1] == [name]:
                    module, add_arguments = where.split(":")
                    getattr(importlib.import_module(module), add_arguments)(command)
            options = parser.parse_args(arguments)
            return options.run(options) or 0
    except (ValueError, OSError, ModuleNotFoundError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
