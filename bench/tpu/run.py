"""`python -m bench tpu --run`: the rows of `bench.tpu.rows` on this machine's TPU, each checked before it is timed."""

import argparse
import fnmatch
import json

import jax
import numpy as np

from bench import UserError, shapes
from bench.timing import device_times
from bench.tpu.rows import MODEL, Row, rows


def run(args: argparse.Namespace) -> int:
    if jax.default_backend() != "tpu":
        raise UserError(f"--run needs a TPU, this machine has {jax.default_backend()}; without --run it estimates")
    results, failed = [], 0
    print(f"Measured on {jax.devices()[0].device_kind}, jax {jax.__version__}: device time inside one program.")
    for row in rows():
        if not fnmatch.fnmatch(row.row, args.rows):
            continue
        try:
            results.append(measure(row))
            print(_line(results[-1]), flush=True)
        except Exception as error:  # a row that fails must not cost the others; the exit status tells
            failed += 1
            print(f"{row.row} {shapes.label(row.context)} {row.dtype}: FAILED {error!r:.300}", flush=True)
        if args.json:
            args.json.write_text(json.dumps(results, indent=1) + "\n")
    return 1 if failed else 0


def measure(row: Row, samples: int = 9) -> dict:
    operands = row.draw()
    row.check(jax.tree.map(np.asarray, jax.jit(row.f)(*operands)), operands)
    times = device_times(row.f, operands, samples, sample_s=0.05)
    return {
        **{name: getattr(row, name) for name in ("row", "context", "dtype", "queries")},
        "ms": float(np.median(times)),
        "samples_ms": times,
        "checked": True,
        "shape": MODEL.name,
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
    }


def _line(x: dict) -> str:
    times = x["samples_ms"]
    what = f"{x['row']:14} {shapes.label(x['context']):>7} {x['dtype']:5}"
    return f"{what} {x['ms']:9.3f} ms  [{min(times):.3f}, {max(times):.3f}]"
