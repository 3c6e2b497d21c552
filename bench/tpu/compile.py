"""`python -m bench tpu --compile`: the TPU kernels at every named shape, compiled for every chip, with no TPU.

Prints, and writes with `--json`, what the compiler gave each: VMEM of every kernel, temporaries in HBM, seconds.
"""

import argparse
import fnmatch
import json
import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp

import hisa_jax as hj
from bench import shapes
from bench.tpu import aot
from bench.tpu.rows import call_of, indexer_operands
from hisa_jax.kernels_pallas import mosaic_tpu
from hisa_jax.kernels_pallas.mosaic_tpu.sparse_mla import sparse_mla

K = 1024
CONTEXTS = (8 * K, 32 * K, 128 * K, 1024 * K)
PHASES = (shapes.PREFILL, shapes.PHASES["decode32"])


def run(args: argparse.Namespace) -> int:
    results = []
    print(f"{'':4} {'shape':6} {'context':>7} {'phase':9} {'':5} {'temp MiB':>8} {'seconds':>7}  MiB of VMEM")
    for chip in args.chips:
        for model, context, phase, name in cases():
            if not fnmatch.fnmatch(name, args.rows):
                continue
            results.append(
                {"chip": chip, "shape": model.name, "context": context, "phase": phase.name, "row": name}
                | outcome(chip, model, context, phase, name)
            )
            print(_line(results[-1]), flush=True)
        if args.json:
            args.json.write_text(json.dumps({"jax": jax.__version__, "rows": results}, indent=1) + "\n")
    return 1 if any("error" in row for row in results) else 0


def cases() -> Iterator[tuple[shapes.Model, int, shapes.Phase, str]]:
    for model in (shapes.DSV32, shapes.GLM5):
        for context in CONTEXTS:
            for phase in PHASES:
                for name in ("hisa", "flat", "mla"):
                    yield model, context, phase, name


def outcome(chip: str, model: shapes.Model, context: int, phase: shapes.Phase, name: str) -> dict:
    """What the compiler gave it, or the error: the others are to be seen, too."""
    f, operands = function(model, context, phase, name)
    start = time.perf_counter()
    try:
        program = aot.compile_for(chip, f, *operands)
    except jax.errors.JaxRuntimeError as error:
        return {"error": str(error).split("\n")[0]}
    return {
        "vmem_mib": {schedule.name: schedule.vmem_bytes / (1 << 20) for schedule in program.schedules},
        "temp_mib": program.temp_bytes / (1 << 20),
        "seconds": time.perf_counter() - start,
    }


def function(model: shapes.Model, context: int, phase: shapes.Phase, name: str) -> tuple[Callable, tuple]:
    """What is compiled, and shapes of its operands: a whole indexer, or the attention after it."""
    B, T = phase.B, phase.T
    if name == "mla":
        N, E, V = model.mla_heads, model.mla_dim, model.mla_value_dim
        q, kv = aot.shaped(B, T, N, E), aot.shaped(B, context, E)
        indices = aot.shaped(B, T, model.topk, dtype=jnp.int32)
        return lambda *x: sparse_mla(*x, value_dim=V, scale=E**-0.5), (q, kv, indices)
    operands = indexer_operands(model, B, T, context, "bf16")
    if name == "flat":
        return lambda *x: mosaic_tpu.select_flat(call_of(*x), model.topk), operands
    hisa = hj.Hisa(topk=model.topk, block_size=model.block_size, block_topk=model.block_topk)
    return lambda *x: mosaic_tpu.select_hisa(call_of(*x), hisa), operands


def _line(x: dict) -> str:
    what = f"{x['chip']:4} {x['shape']:6} {shapes.label(x['context']):>7} {x['phase']:9} {x['row']:5}"
    if "error" in x:
        return f"{what} {x['error']}"
    vmem = ", ".join(f"{name} {mib:.1f}" for name, mib in x["vmem_mib"].items())
    return f"{what} {x['temp_mib']:8.1f} {x['seconds']:7.1f}  {vmem}"
