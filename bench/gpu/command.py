"""`python -m bench gpu`: every stage and whole indexer on an NVIDIA GPU, each result checked before it is timed.

Time is device time of many repetitions inside one jitted loop, where each repetition waits for the one before (one of
its inputs depends on the last result); a sample is the wall clock of such a program over its repetitions, a figure
the median of the samples. Everything is counted: top-k, index arithmetic, launches. Floors are those of the tensor
cores at the vendor's dense rate, or of device memory where that is the larger.
"""

import argparse
import pathlib
import warnings

import jax
import numpy as np

from bench import UserError, shapes
from bench.gpu.row import Row
from bench.gpu.rows import rows
from bench.records import measure_all
from bench.timing import device_times


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", type=pathlib.Path, help="write the rows to this file")
    parser.add_argument("--rows", default="*", help="only rows whose name matches this pattern")
    parser.add_argument("--samples", type=int, default=9, help="timed programs a row")


def run(args: argparse.Namespace) -> int:
    if jax.default_backend() != "gpu":
        raise UserError(f"needs an NVIDIA GPU, this machine has {jax.default_backend()}")
    warnings.filterwarnings("ignore", message="The Pallas Triton backend is deprecated")
    return measure_all(rows(), args.rows, lambda row: measure(row, args.samples), _line, args.json)


def measure(row: Row, samples: int) -> dict:
    f, operands, check = row.make()
    check(jax.tree.map(np.asarray, jax.jit(f)(*operands)))

    times = device_times(f, operands, samples, carries=row.carries)
    ms = float(np.median(times))
    p10, p90 = (float(x) for x in np.percentile(times, [10, 90]))
    return {
        **{name: getattr(row, name) for name in ("row", "implementation", "shape", "context", "queries", "dtype")},
        "ms": ms,
        "ms_p10": p10,
        "ms_p90": p90,
        "tflops": row.flop / ms / 1e9,
        "floor_ms": row.floor_ms,
        "checked": True,
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
    }


def _line(x: dict) -> str:
    floor = f"{100 * x['floor_ms'] / x['ms']:3.0f} % of floor"
    what = f"{x['row']:22} {x['implementation']:10} {x['shape']:12} {shapes.label(x['context']):>5} {x['dtype']:5}"
    return f"{what} {x['ms']:8.4f} ms [{x['ms_p10']:.4f}, {x['ms_p90']:.4f}] {x['tflops']:6.0f} TFLOP/s  {floor}"
