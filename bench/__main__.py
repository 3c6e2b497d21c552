"""The commands: `python -m bench COMMAND`."""

import argparse
import importlib
import sys

from bench import UserError
from hisa_jax.checks import MissingExtra, optional_packages
from hisa_jax.command_line import Command

# `where` is a module with `add_arguments(parser)` and `run(args) -> int`, the exit status.
COMMANDS = {
    "demo": Command(
        "bench.demo.command",
        "the main job: real text by all methods: answers of a trained model, speed, found passages",
        "python -m bench demo --text book.txt --context 8192 65536",
    ),
    "files": Command(
        "bench.files.command",
        "checkpoints with a fault in one file: each ends in a named error or in the same model",
        "python -m bench files --faults 100",
    ),
    "fuzz": Command(
        "bench.fuzz.command",
        "random rows of every form against the oracle and each other; what is wrong, made small",
        "python -m bench fuzz --minutes 3",
    ),
    "gpu": Command(
        "bench.gpu.command",
        "the kernels on an NVIDIA GPU, each checked before it is timed",
        "python -m bench gpu --rows 'hisa*' --json rows.json",
    ),
    "gpu-report": Command(
        "bench.gpu.report",
        "the table and the plot of the README from rows that gpu measured",
        "python -m bench gpu-report --json rows.json",
    ),
    "indexers": Command(
        "bench.indexers.command",
        "HISA and the scan over pools, and with other ways to score less, in the byte model",
        "python -m bench indexers --part composed --context 4096",
    ),
    "tpu": Command(
        "bench.tpu.command",
        "the TPU kernels by the compiler's schedule, without a TPU; with one, measured: --run",
        "python -m bench tpu --chips v5e",
    ),
    "layer": Command(
        "bench.layer.command",
        "one attention layer of DeepSeek-V3.2 and GLM-5 at real widths, whole and part by part, by each method",
        "python -m bench layer --models dsv32 --contexts 8192",
    ),
    "lighthouse": Command(
        "bench.lighthouse",
        "one layer of Lighthouse attention stage by stage, beside dense attention, each checked before it is timed",
        "python -m bench lighthouse --contexts 8192",
    ),
    "memory": Command(
        "bench.memory", "peak memory of each method at a long context", "python -m bench memory --method hisa"
    ),
    "pods": Command(
        "bench.pods.command",
        "steps of whole models compiled for whole pods, without a TPU: memory, exchanges, an estimate of the time",
        "python -m bench pods --rows '*-decode-v5e'",
    ),
    "pretraining": Command(
        "bench.pretraining",
        "what a checkpoint of the byte model keeps under block means, at ratios of 1 in 2 to 1 in 16",
        "python -m bench pretraining --checkpoint models/bytes --context 4096",
    ),
    "peers": Command(
        "bench.peers.command",
        "the kernels beside the best public ones (DeepGEMM, sglang, FlashMLA), in one process on the same inputs",
        "python -m bench peers --rows 'sparse*'",
    ),
    "quality": Command(
        "bench.quality.command",
        "what HISA and the scan keep and lose in a trained model, against its flat indexer",
        "python -m bench quality --part multikey --out quality_out",
    ),
    "renew": Command(
        "bench.renew.command",
        "all published GPU figures, those first that are missing or of other code, on all GPUs of this machine",
        "python -m bench renew --minutes 25 --only 'gpu:flat*' 'layer:*'",
    ),
    "serve": Command(
        "bench.serve.command",
        "a small continuous-batching server on the paged cache; --verify checks every selection",
        "python -m bench serve --verify",
    ),
    "sharded": Command(
        "bench.sharded",
        "selections and attention where several GPUs share the keys, beside one GPU, each checked before it is timed",
        "python -m bench sharded --devices 2 --rows 'hisa*'",
    ),
    "tune": Command(
        "bench.gpu.tune",
        "find the fastest launch configurations on this GPU, for kernels_pallas/tuned.json",
        "python -m bench tune",
    ),
}  # fmt: skip


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench", description="Benches of hisa_jax.",
        epilog="example:\n  python -m bench demo --help", formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    try:
        with optional_packages():
            for name, command in COMMANDS.items():
                added = command.add_to(commands, name)
                if argv[:1] == [name]:  # the others need not be imported
                    module = importlib.import_module(command.where)
                    module.add_arguments(added)
                    added.set_defaults(run=module.run)
            args = parser.parse_args(argv)
            return args.run(args)
    except (UserError, MissingExtra) as error:
        print(f"python -m bench {argv[0]}: error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
