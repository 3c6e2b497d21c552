"""`python -m bench tpu --run`: the rows of `bench.tpu.rows` on this machine's TPU, each checked before it is timed."""

import argparse

import jax
import numpy as np

from bench import UserError, records, shapes
from bench.timing import device_times
from bench.tpu.rows import Row, rows


def run(args: argparse.Namespace) -> int:
    if jax.default_backend() != "tpu":
        raise UserError(f"--run needs a TPU, this machine has {jax.default_backend()}; without --run it estimates")
    print(f"Measured on {jax.devices()[0].device_kind}, jax {jax.__version__}: device time inside one program.")
    return records.measure_all(rows(), [args.rows], measure, _line, args.json)


def measure(row: Row, samples: int = 9) -> dict:
    operands = row.draw()
    row.check(jax.tree.map(np.asarray, jax.jit(row.f)(*operands)), operands)
    times = device_times(row.f, operands, samples, sample_s=0.05)
    return {
        **{name: getattr(row, name) for name in ("row", "context", "dtype", "queries")},
        "ms": float(np.median(times)),
        "samples_ms": times,
        "checked": True,
        "shape": row.model.name,
        **records.device(),
    }


def _line(x: dict) -> str:
    times = x["samples_ms"]
    what = f"{x['row']:14} {shapes.label(x['context']):>7} {x['dtype']:5}"
    return f"{what} {x['ms']:9.3f} ms  [{min(times):.3f}, {max(times):.3f}]"
