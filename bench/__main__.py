"""The commands: `python -m bench COMMAND`."""

import argparse
import importlib
import sys

from bench import UserError
from hisa_jax.checks import MissingExtra, optional_packages

# Command -> module, help. A module has `add_arguments(parser)` and `run(args) -> int`, the exit status.
COMMANDS = {
    "demo": (
        "bench.demo.command",
        "the main job: index real text with all methods, show speed, quality and found passages",
    ),
    "files": (
        "bench.files.command",
        "checkpoints with a fault in one file: each ends in a named error or in the same model",
    ),
    "fuzz": (
        "bench.fuzz.command",
        "random rows of every form against the oracle and each other; what is wrong, made small",
    ),
    "gpu": ("bench.gpu.command", "the kernels on an NVIDIA GPU, each checked before it is timed"),
    "gpu-report": ("bench.gpu.report", "the table and the plot of the README from rows that gpu measured"),
    "tpu": (
        "bench.tpu.command",
        "the TPU kernels by the compiler's schedule, without a TPU; with one, measured: --run",
    ),
    "lighthouse": (
        "bench.lighthouse",
        "one layer of Lighthouse attention stage by stage, beside dense attention, each checked before it is timed",
    ),
    "memory": ("bench.memory", "peak memory of each method at a long context"),
    "pods": (
        "bench.pods.command",
        "steps of whole models compiled for whole pods, without a TPU: memory, exchanges, an estimate of the time",
    ),
    "quality": (
        "bench.quality.command",
        "what HISA and the scan keep and lose in a trained model, against its flat indexer",
    ),
    "serve": (
        "bench.serve.command",
        "a small continuous-batching server on the paged cache; --verify checks every selection",
    ),
    "tune": ("bench.gpu.tune", "find the fastest launch configurations on this GPU, for kernels_pallas/tuned.json"),
}


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description="Benches of hisa_jax.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    try:
        with optional_packages():
            for name, (module_name, description) in COMMANDS.items():
                command = commands.add_parser(name, help=description, description=description)
                if argv[:1] == [name]:  # the others need not be imported
                    module = importlib.import_module(module_name)
                    module.add_arguments(command)
                    command.set_defaults(run=module.run)
            args = parser.parse_args(argv)
            return args.run(args)
    except (UserError, MissingExtra) as error:
        print(f"python -m bench {argv[0]}: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
