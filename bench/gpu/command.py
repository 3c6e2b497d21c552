"""`python -m bench gpu`: every stage and whole indexer on an NVIDIA GPU, each result checked before it is timed.

Two times of each row. The **span** is of one call, from its first kernel's start to its last one's end, by the
profiler. The **sustained** time is that of a call among many in one jitted loop, where each waits for the one before
(one of its inputs depends on the last result): it holds launches, and the clock of a card at work. A figure is the
median. Everything is counted: top-k, index arithmetic. Floors are those of the tensor cores at the vendor's dense rate,
or of device memory where that is the larger.
"""

import argparse
import pathlib
import warnings
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from bench import UserError, options, records, shapes
from bench.gpu.row import NAMED, Row
from bench.gpu.rows import rows
from bench.gpu.span import AS_A_GRAPH, clock_mhz, spans
from bench.timing import device_times, in_turn

_IN_A_ROW = 5  # calls that are compared with the one that was checked
_KERNELS = 8  # of a row, those that take longest are written down


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", type=pathlib.Path, help="write each row to this file, among others")
    options.add_rows(parser)
    parser.add_argument("--samples", type=int, default=9, help="timed programs a row")


def run(args: argparse.Namespace) -> int:
    if jax.default_backend() != "gpu":
        raise UserError(f"needs an NVIDIA GPU, this machine has {jax.default_backend()}")
    warnings.filterwarnings("ignore", message="The Pallas Triton backend is deprecated")
    return records.measure_all(rows(), args.rows, lambda row: measure(row, args.samples), _line, args.json)


def measure(row: Row, samples: int) -> dict:
    f, operands, check = row.make()
    compiled = jax.jit(f, compiler_options=AS_A_GRAPH)
    first = jax.tree.map(np.asarray, compiled(*operands))
    check(first)

    times = device_times(f, operands, samples, carries=row.carries)
    clock = clock_mhz()
    span = spans(in_turn(f, operands) if row.carries else lambda: compiled(*operands))
    if not row.carries:
        check_again(row.defined(first, operands), lambda: row.defined(compiled(*operands), operands))
    ms = float(np.median(times))
    p10, p90 = (float(x) for x in np.percentile(times, [10, 90]))
    span_p10, span_p90 = (float(x) for x in np.percentile(span.ms, [10, 90]))
    return {
        **{name: getattr(row, name) for name in NAMED},
        "ms": ms,
        "ms_p10": p10,
        "ms_p90": p90,
        "span_ms": float(np.median(span.ms)),
        "span_ms_p10": span_p10,
        "span_ms_p90": span_p90,
        "kernels_ms": {name[:60]: ms for name, ms in list(span.kernels.items())[:_KERNELS]},
        "clock_mhz": clock,
        "tflops": row.flop / ms / 1e9,
        "floor_ms": row.floor_ms,
        "checked": True,
        **records.device(),
    }


def check_again(first: Any, call: Callable[[], Any]) -> None:
    """Some calls in a row must have the bits of `first`, which was checked.

    A race may show where caches are warm and no call waits, and not in a first call. A row that writes over its
    operands cannot be called again like that.
    """
    for result in [call() for _ in range(_IN_A_ROW)]:
        for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(result), strict=True):
            assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), "calls in a row have other bits than the first"


def _line(x: dict) -> str:
    floor = f"{100 * x['floor_ms'] / x['span_ms']:3.0f} % of floor"
    what = f"{x['row']:22} {x['implementation']:10} {x['shape']:12} {shapes.label(x['context']):>5} {x['dtype']:5}"
    span = f"{x['span_ms']:8.4f} ms [{x['span_ms_p10']:.4f}, {x['span_ms_p90']:.4f}]"
    return f"{what} {span}, sustained {x['ms']:8.4f} at {x['clock_mhz']} MHz, {x['tflops']:6.0f} TFLOP/s {floor}"
