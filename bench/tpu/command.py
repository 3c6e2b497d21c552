"""`python -m bench tpu`: how fast the TPU kernels are by the compiler's own schedule, with no TPU; with one, `--run`.

Without a TPU every figure is a static estimate: bundles of the final schedule times trip counts, at the chip's clock,
or the bytes that cross HBM at the published bandwidth where that is longer, plus what is copied while nothing else
runs. Waits, bank conflicts and what XLA does around the kernels are not in it (docs/tpu.md says more). `--run` times
the same rows on the TPU at hand, each checked first. `--compile` compiles the public functions at the named shapes.
"""

import argparse
import fnmatch
import json
import pathlib

import jax

from bench import shapes
from bench.tpu import aot, compile
from bench.tpu import run as tpu_run
from bench.tpu.chips import CHIPS, Chip
from bench.tpu.rows import Row, rows

NOTE = "Static estimate from the compiler's schedule: nothing was run. One TensorCore; v5p: both of a chip's."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", type=pathlib.Path, help="write the rows to this file")
    parser.add_argument("--chips", nargs="+", choices=CHIPS, default=list(CHIPS), help="only these")
    parser.add_argument("--rows", default="*", help="only rows whose name matches this pattern")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument(
        "--run", dest="is_measured", action="store_true", help="check and time the rows on the TPU of this machine"
    )
    instead.add_argument(
        "--compile", dest="only_compiles", action="store_true", help="compile every named shape for every chip"
    )


def run(args: argparse.Namespace) -> int:
    if args.is_measured:
        return tpu_run.run(args)
    if args.only_compiles:
        return compile.run(args)
    aot.prepare()
    results = []
    for chip in args.chips:
        print(f"\n{chip}: {NOTE}\n{_HEADING}", flush=True)
        estimates: list[dict] = []
        for row in rows():
            if fnmatch.fnmatch(row.row, args.rows):
                estimates.append(estimate(CHIPS[chip], row))
                _compare(estimates)
                print(_line(estimates[-1]), flush=True)
        results += estimates
    if args.json:
        args.json.write_text(json.dumps({"note": NOTE, "jax": jax.__version__, "rows": results}, indent=1) + "\n")
    return 0


def estimate(chip: Chip, row: Row) -> dict:
    """One line: compiles, reads the schedules, multiplies."""
    program = aot.compile_for(chip.name, row.f, *row.operands)
    kernels = row.kernels(chip)
    cycles = selecting = seconds = valu = 0.0
    parts = {}
    queries = row.queries / chip.cores_per_device
    for kernel in kernels:
        schedule = program.schedule(kernel.name)
        own, own_selecting, slots = kernel.cycles(schedule)
        valu += slots["VALU"] / schedule.capacity["VALU"]
        moving = kernel.moved_bytes / chip.hbm_bytes_per_s
        seconds += max(own / chip.clock_hz, moving) + kernel.exposed_bytes / chip.hbm_bytes_per_s
        cycles, selecting = cycles + own, selecting + own_selecting
        parts[kernel.name] = {
            "bundles": schedule.bundles,
            "cycles_a_query": own / queries,
            "moved_mb": kernel.moved_bytes / 1e6,
            "exposed_mb": kernel.exposed_bytes / 1e6,
            "bound": "HBM" if moving > own / chip.clock_hz else "core",
            "vmem_mib": schedule.vmem_bytes / (1 << 20),
        }
    flop = row.flop / chip.cores_per_device
    peak = chip.flops(row.dtype)
    moved = sum(kernel.moved_bytes + kernel.exposed_bytes for kernel in kernels)
    floor = max(flop / peak, moved / chip.hbm_bytes_per_s)
    out = {
        "row": row.row,
        "chip": chip.name,
        "shape": row.model.name,
        "context": row.context,
        "dtype": row.dtype,
        "queries": row.queries,
        "cycles_a_query": cycles / queries,
        "topk_cycles_a_query": selecting / queries,
        "ms": 1e3 * seconds,
        "floor_ms": 1e3 * floor,
        "mxu_percent": 100 * flop / peak * chip.clock_hz / cycles,
        "valu_percent": 100 * valu / cycles,
        "kernels": parts,
    }
    for kernel in kernels:
        if kernel.pairs:
            out["refine_cycles_a_pair"] = kernel.cycles_a_pair(program.schedule(kernel.name))
    return out


def _compare(estimates: list[dict]) -> None:
    """Sets how many times faster HISA or the scan is than the flat indexer of the same size."""
    last = estimates[-1]
    for other in estimates:
        same = all(other[key] == last[key] for key in ("context", "dtype", "queries"))
        if last["row"].startswith(("hisa", "scan")) and other["row"].startswith("flat") and same:
            last["times_faster_than_flat"] = other["ms"] / last["ms"]


_HEADING = (
    f"{'row':14} {'context':>7} {'dtype':5} {'cycles/query':>12} {'top-k':>6} {'MXU':>5} {'VALU':>5} {'ms':>9} "
    f"{'of roof':>7}  {'flat/HISA':>9} {'pair':>5}  bound, MiB of VMEM"
)


def _line(x: dict) -> str:
    faster = f"{x['times_faster_than_flat']:8.2f}x" if "times_faster_than_flat" in x else " " * 9
    pair = f"{x['refine_cycles_a_pair']:5.1f}" if "refine_cycles_a_pair" in x else " " * 5
    bound = ", ".join(f"{name}: {part['bound']} {part['vmem_mib']:.1f}" for name, part in x["kernels"].items())
    return (
        f"{x['row']:14} {shapes.label(x['context']):>7} {x['dtype']:5} {x['cycles_a_query']:12.0f} "
        f"{100 * x['topk_cycles_a_query'] / x['cycles_a_query']:5.0f}% {x['mxu_percent']:4.0f}% "
        f"{x['valu_percent']:4.0f}% {x['ms']:9.3f} {100 * x['floor_ms'] / x['ms']:6.0f}%  {faster} {pair}  {bound}"
    )
