"""`python -m bench peers`: our kernels beside the best public ones, in one process, on the same inputs.

Peers run in torch: DeepGEMM's scores, a top-k of sglang, FlashMLA. Each composition of theirs is one CUDA graph. Both
sides are checked first: ours against NumPy, theirs by what they choose. A time is the span of one call, from its first
kernel's start to its last one's end, by torch's profiler, which sees both; sides take turns. What is not installed is
named with how to get it. `--report` makes table and plot of rows that were measured before, without a GPU.
"""

import argparse
import functools
import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from bench import UserError, options, records, shapes
from bench.gpu.row import Row
from bench.gpu.rows import rows
from bench.gpu.span import spans_of
from bench.peers import packages, report
from bench.peers.compare import Side, events_by_torch, graphed, kind_of, measure
from bench.peers.theirs import Theirs


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_rows(parser)
    parser.add_argument("--topk-library", type=Path, metavar="FILE", help="sglang's second top-k (docs/peers.md)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write each row to this file, among others")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="write the plot of ratios to this file")
    parser.add_argument("--report", type=Path, metavar="FILE", help="read rows from this file and measure nothing")


def run(args: argparse.Namespace) -> int:
    results: list[dict[str, Any]] = []
    status = 0
    if args.report:
        if not args.report.is_file():
            raise UserError(f"--report {args.report}: no such file")
        results = json.loads(args.report.read_text())
    else:
        status = _measure(args, results)
    if results:
        print(report.table(results))
        if args.plot:
            report.figure(results).savefig(args.plot, dpi=150)
    return status


def _measure(args: argparse.Namespace, results: list[dict[str, Any]]) -> int:
    # Before JAX starts: it would take three quarters of the memory, and torch needs some.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    if jax.default_backend() != "gpu":
        raise UserError(f"needs an NVIDIA GPU, this machine has {jax.default_backend()}")
    warnings.filterwarnings("ignore", message="The Pallas Triton backend is deprecated")
    peers = packages.load(args.topk_library)
    print("\n".join(peers.notes), flush=True)
    timer = functools.partial(spans_of, record=events_by_torch(peers.torch))

    def one(row: Row) -> dict[str, Any]:
        results.append(measure(row, sides_of(Theirs(peers), row), timer))
        peers.torch.cuda.empty_cache()
        return results[-1]

    return records.measure_all(comparable(peers), args.rows, one, report.line, args.json)


def comparable(peers: packages.Peers) -> list[Row]:
    """The rows that an installed peer has."""
    return [row for row in rows() if (kind := kind_of(row)) and getattr(peers, kind.package) is not None]


def sides_of(theirs: Any, row: Row) -> Callable[[tuple], dict[str, Callable[[], Side]]]:
    """Operands of a row -> how to make each of the peers' sides."""
    kind, model = kind_of(row), shapes.MODELS[row.shape]
    assert kind is not None

    def make(operands: tuple) -> dict[str, Callable[[], Side]]:
        calls = getattr(theirs, kind.part)(operands, model)
        return {name: functools.partial(graphed, theirs.torch, call) for name, call in calls.items()}

    return make
