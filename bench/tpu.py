"""`python -m bench tpu`: how fast the TPU kernels are by the compiler's own schedule, with no TPU; with one, `--run`.

Without a TPU every figure is a static estimate: bundles of the final schedule times trip counts, at the chip's clock,
or the bytes that cross HBM at the published bandwidth where that is longer, plus what is copied while nothing else
runs. Waits, bank conflicts and what XLA does around the kernels are not in it (docs/tpu.md says more). `--run` times
the same rows on the TPU at hand.
"""

import argparse
import fnmatch
import json
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench import UserError, shapes, tpu_aot, tpu_cost
from bench.chips import CHIPS, Chip
from bench.timing import device_times
from kernels_pallas import mosaic_tpu
from kernels_pallas.mosaic_tpu.flat import select_flat
from kernels_pallas.mosaic_tpu.sparse_mla import sparse_mla
from kernels_pallas.mosaic_tpu.topk import topk

NOTE = "Static estimate from the compiler's schedule: nothing was run. One TensorCore; v5p: both of a chip's."
DTYPES: dict[str, Any] = {"bf16": jnp.bfloat16, "int8": jnp.int8, "e4m3": jnp.float8_e4m3fn}
MODEL, T = shapes.DSV32, shapes.PREFILL.T
SIZES = ((8192, "bf16"), (32768, "bf16"), (131072, "bf16"), (1048576, "bf16"), (131072, "int8"), (131072, "e4m3"))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", type=pathlib.Path, help="write the rows to this file")
    parser.add_argument("--chips", nargs="+", choices=CHIPS, default=list(CHIPS), help="only these")
    parser.add_argument("--rows", default="*", help="only rows whose name matches this pattern")
    parser.add_argument(
        "--run", dest="is_measured", action="store_true", help="time the rows on the TPU of this machine instead"
    )


def run(args: argparse.Namespace) -> int:
    if args.is_measured:
        return _run_all(args)
    tpu_aot.prepare()
    results = []
    for chip in args.chips:
        print(f"\n{chip}: {NOTE}\n{_HEADING}", flush=True)
        rows: list[dict] = []
        for make, name, context, dtype in cases():
            if fnmatch.fnmatch(name, args.rows):
                rows.append({**estimate(CHIPS[chip], make, name, context, dtype)})
                _compare(rows)
                print(_line(rows[-1]), flush=True)
        results += rows
    if args.json:
        args.json.write_text(json.dumps({"note": NOTE, "jax": jax.__version__, "rows": results}, indent=1) + "\n")
    return 0


def cases() -> Iterator[tuple[Callable, str, int, str]]:
    """(make, row, context, dtype); make(context, dtype) -> f, its operands."""
    yield _make_topk, "topk", MODEL.block_topk * MODEL.block_size, "int32"
    yield _make_sparse_mla, "mla", 131072, "bf16"
    for context, dtype in SIZES:
        yield _make_flat, "flat", context, dtype
        yield _make_hisa, "hisa", context, dtype


def estimate(chip: Chip, make: Callable, name: str, context: int, dtype: str) -> dict:
    """One row: compiles, reads the schedules, multiplies."""
    f, operands = make(context, dtype)
    shaped = jax.tree.map(lambda x: jax.ShapeDtypeStruct(*x), operands, is_leaf=_is_shape)
    program = tpu_aot.compile_for(chip.name, f, *shaped)
    kernels = _kernels(chip, name, context, dtype)
    cycles = selecting = seconds = valu = 0.0
    parts = {}
    for kernel in kernels:
        schedule = program.schedule(kernel.name)
        own, own_selecting, slots = kernel.cycles(schedule)
        valu += slots["VALU"] / schedule.capacity["VALU"]
        moving = kernel.moved_bytes / chip.hbm_bytes_per_s
        seconds += max(own / chip.clock_hz, moving) + kernel.exposed_bytes / chip.hbm_bytes_per_s
        cycles, selecting = cycles + own, selecting + own_selecting
        queries = T / chip.cores_per_device
        parts[kernel.name] = {
            "bundles": schedule.bundles,
            "cycles_a_query": own / queries,
            "moved_mb": kernel.moved_bytes / 1e6,
            "exposed_mb": kernel.exposed_bytes / 1e6,
            "bound": "HBM" if moving > own / chip.clock_hz else "core",
        }
    flop = _flop(name, context) / chip.cores_per_device
    peak = chip.flops(dtype)
    moved = sum(kernel.moved_bytes + kernel.exposed_bytes for kernel in kernels)
    floor = max(flop / peak, moved / chip.hbm_bytes_per_s)
    row = {
        "row": name,
        "chip": chip.name,
        "shape": MODEL.name,
        "context": context,
        "dtype": dtype,
        "queries": T,
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
            row["refine_cycles_a_pair"] = kernel.cycles_a_pair(program.schedule(kernel.name))
    return row


def _kernels(chip: Chip, name: str, context: int, dtype: str) -> list[tpu_cost.Kernel]:
    if name == "topk":
        return tpu_cost.topk_kernels(chip, T, context, MODEL.topk)
    if name == "mla":
        return tpu_cost.sparse_mla_kernels(chip, MODEL, T)
    return {"flat": tpu_cost.flat_kernels, "hisa": tpu_cost.hisa_kernels}[name](chip, MODEL, T, context, dtype)


def _compare(rows: list[dict]) -> None:
    """Sets how many times faster HISA is than the flat indexer of the same size."""
    row = rows[-1]
    for other in rows:
        same = all(other[key] == row[key] for key in ("context", "dtype"))
        if row["row"] == "hisa" and other["row"] == "flat" and same:
            row["times_faster_than_flat"] = other["ms"] / row["ms"]


def _flop(name: str, context: int) -> float:
    """Of the visible work: the means and the kept blocks, or all tokens."""
    visible = context - (T - 1) / 2
    if name == "topk":
        return 0.0
    if name == "mla":
        return 2.0 * T * MODEL.topk * MODEL.mla_heads * (MODEL.mla_dim + MODEL.mla_value_dim)
    scored = visible
    if name == "hisa":
        kept = min(MODEL.block_topk * MODEL.block_size, visible)
        scored = kept + (visible / MODEL.block_size if context > MODEL.block_topk * MODEL.block_size else 0)
    return 2.0 * T * scored * MODEL.H * MODEL.D


_HEADING = (
    f"{'row':5} {'context':>7} {'dtype':5} {'cycles/query':>12} {'top-k':>6} {'MXU':>5} {'VALU':>5} {'ms/4096':>9} "
    f"{'of roof':>7}  {'flat/HISA':>9} {'pair':>5}  bound"
)


def _line(x: dict) -> str:
    faster = f"{x['times_faster_than_flat']:8.2f}x" if "times_faster_than_flat" in x else " " * 9
    pair = f"{x['refine_cycles_a_pair']:5.1f}" if "refine_cycles_a_pair" in x else " " * 5
    bound = ", ".join(f"{name}: {part['bound']}" for name, part in x["kernels"].items())
    return (
        f"{x['row']:5} {shapes.label(x['context']):>7} {x['dtype']:5} {x['cycles_a_query']:12.0f} "
        f"{100 * x['topk_cycles_a_query'] / x['cycles_a_query']:5.0f}% {x['mxu_percent']:4.0f}% "
        f"{x['valu_percent']:4.0f}% {x['ms']:9.3f} {100 * x['floor_ms'] / x['ms']:6.0f}%  {faster} {pair}  {bound}"
    )


def _make_topk(width: int, dtype: str) -> tuple[Callable, tuple]:
    return lambda x, n: topk(x, n, MODEL.topk), (((T, width), jnp.int32), ((T,), jnp.int32))


def _make_flat(context: int, dtype: str) -> tuple[Callable, tuple]:
    return lambda *operands: select_flat(*operands, topk=MODEL.topk), _operands(context, dtype)


def _make_hisa(context: int, dtype: str) -> tuple[Callable, tuple]:
    def f(*operands: Any) -> Any:
        return mosaic_tpu.select_hisa(
            *operands, topk=MODEL.topk, block_size=MODEL.block_size, block_topk=MODEL.block_topk
        )

    return f, _operands(context, dtype)


def _make_sparse_mla(context: int, dtype: str) -> tuple[Callable, tuple]:
    N, E, V = MODEL.mla_heads, MODEL.mla_dim, MODEL.mla_value_dim
    operands = ((1, T, N, E), DTYPES[dtype]), ((1, context, E), DTYPES[dtype]), ((1, T, MODEL.topk), jnp.int32)
    return lambda *operands: sparse_mla(*operands, value_dim=V, scale=E**-0.5), operands


def _operands(S: int, dtype: str) -> tuple:
    scale = None if dtype == "bf16" else ((1, S), jnp.float32)
    q, k = ((1, T, MODEL.H, MODEL.D), DTYPES[dtype]), ((1, S, MODEL.D), DTYPES[dtype])
    return q, k, scale, ((1, T, MODEL.H), jnp.float32), ((1, T), jnp.int32)


def _is_shape(x: Any) -> bool:
    return isinstance(x, tuple) and len(x) == 2 and isinstance(x[0], tuple) and all(isinstance(n, int) for n in x[0])


def _run_all(args: argparse.Namespace) -> int:
    if jax.default_backend() != "tpu":
        raise UserError(f"--run needs a TPU, this machine has {jax.default_backend()}; without --run it estimates")
    results = []
    kind = jax.devices()[0].device_kind
    print(f"Measured on {kind}, jax {jax.__version__}: device time of repetitions inside one program.")
    for make, name, context, dtype in cases():
        if not fnmatch.fnmatch(name, args.rows):
            continue
        f, shaped = make(context, dtype)
        times = device_times(f, _draw(shaped, context), samples=9, sample_s=0.05)
        ms = float(np.median(times))
        row = {"row": name, "context": context, "dtype": dtype, "queries": T, "ms": ms, "samples_ms": times}
        results.append({**row, "shape": MODEL.name, "device": kind, "jax": jax.__version__})
        print(f"{name:5} {shapes.label(context):>7} {dtype:5} {ms:9.3f} ms  [{min(times):.3f}, {max(times):.3f}]")
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")
    return 0


def _draw(shaped: tuple, context: int) -> tuple:
    """Normal queries, keys and weights; the last T queries of the context; positive scales."""
    if len(shaped) == 2:
        (shape, _), _ = shaped
        return jax.random.randint(jax.random.key(0), shape, -(1 << 30), 1 << 30), jnp.full((T,), shape[1], jnp.int32)
    if len(shaped) == 3:  # the tokens of every second block of the last 128, every fourth of them
        q, kv = (jax.random.normal(jax.random.key(i), x[0]).astype(x[1]) for i, x in enumerate(shaped[:2]))
        token = jnp.arange(MODEL.topk, dtype=jnp.int32)
        listed = context - 16384 + token // 32 * 256 + token % 32 * 4
        return q, kv, jnp.broadcast_to(listed, shaped[2][0])
    keys = iter(jax.random.split(jax.random.key(0), 4))
    q, k, scale, w, _ = shaped
    draw = lambda x, factor: (factor * jax.random.normal(next(keys), x[0])).astype(x[1])  # noqa: E731
    factor = 30.0 if q[1] == jnp.int8 else 1.0
    visible = jnp.arange(context - T + 1, context + 1, dtype=jnp.int32)[None]
    scales = None if scale is None else jnp.exp(0.1 * jax.random.normal(next(keys), scale[0]))
    return draw(q, factor), draw(k, factor), scales, draw(w, 0.01), visible
