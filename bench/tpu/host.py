"""`python -m bench.tpu.host FILE`: streamindex_topk by tpu-inference's FILE against ours, by the compiler's schedule.

FILE is theirs, tpu_inference/kernels/experimental/deepseek_v4/indexer/streamindex_topk.py or sglang-jax's copy. It is
compiled here as it is. One request's last 4096 queries, pages of 64 records, on one TensorCore of v7x. Every operation
counts, those that XLA makes too, by bundles of its schedule times trip counts. A loop of XLA's whose count is not in
the schedule counts once. What waits for HBM is left out on both sides; of theirs the scores cross it.
"""

import argparse
import functools
import importlib.util
import json
import pathlib
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp

import hisa_jax as hj
from bench import shapes
from bench.tpu import aot, cost
from bench.tpu.chips import CHIPS
from bench.tpu.command import NOTE
from bench.tpu.schedule import Schedule
from hisa_jax import dispatch
from hisa_jax.integrations.streamindex import streamindex_topk

K = 1024
CHIP = CHIPS["v7x"]
MODEL = shapes.DSV32
CONTEXTS = (8 * K, 32 * K, 128 * K)
PAGE, T = 64, shapes.PREFILL.T
TILE_T, TILE_S = 32, 2048  # of ours
_SHOWN = 0.01  # ms of an operation, to be written
BLOCK, QUERIES = 4096, 128  # of their kernel: sglang-jax's choice on v7x, and tpu-inference's


def operands(context: int) -> dict[str, Any]:
    """Of a host's call: one request, e4m3."""
    n = context // PAGE
    one = functools.partial(aot.shaped, dtype=jnp.int32)
    return dict(
        q=aot.shaped(T, MODEL.H, MODEL.D, dtype=jnp.float8_e4m3fn),
        indexer_weights=aot.shaped(T, MODEL.H, dtype=jnp.float32),
        cache_kv=aot.shaped(n, PAGE // 4, 4, 256, dtype=jnp.uint8),
        seq_lens=one(1), page_indices=one(n), cu_q_lens=one(2), distribution=one(3),
    )  # fmt: skip


def milliseconds(program: aot.Program, trips: Callable[[Schedule], Mapping[str, float] | None]) -> dict[str, float]:
    """Of each operation; `trips` says how often loops of a kernel run. None: it is idle."""
    out: dict[str, float] = {}
    for schedule in program.schedules:
        known = trips(schedule)
        if known is not None:
            once = {loop.path: 1.0 for loop in schedule.root.walk() if loop.trips is None}
            cycles = schedule.cost(once | dict(known)).cycles
            out[schedule.name] = out.get(schedule.name, 0.0) + 1e3 * cycles / CHIP.clock_hz
    return out


def theirs(module: ModuleType, context: int) -> dict[str, float]:
    """Their kernel scores all keys for all queries; `approx_max_k`, with a recall of 1, sorts the scores."""

    def trips(schedule: Schedule) -> dict[str, float] | None:
        if schedule.name.startswith("StreamIdxTC-d"):  # of decode steps, of which there are none
            return None
        if schedule.name.startswith("StreamIdxTC-m"):
            return {"0": 1, "0.1": T / QUERIES, "0.1.0": context / BLOCK}
        return {}

    sizes = dict(num_kv_pages_per_block=(BLOCK // PAGE,) * 3, num_queries_per_block=(1, QUERIES, QUERIES))
    call = functools.partial(module.streamindex_topk, k=MODEL.topk, compression_ratio=1, **sizes)
    return milliseconds(compiled(call, context), trips)


def ours(context: int) -> dict[str, float]:
    """The flat indexer: its first kernel has all queries, its second, for requests of few, none."""
    (kernel,) = cost.flat_kernels(CHIP, MODEL, 1, T, context, "e4m3")
    is_idle = iter((False, True))

    def trips(schedule: Schedule) -> dict[str, float] | None:
        if schedule.name != kernel.name:
            return {}
        if next(is_idle):
            return None
        steps = next(path for path, name in schedule.names(kernel.loops).items() if name == "pool")
        selection = {name: n for name, n in kernel.trips.items() if name not in ("grid", "score")}
        known = schedule.named_trips(kernel.loops, selection, {}, {"spans": kernel.rest["spans"]})
        # A group of pages is whole, or the last one, which has the loops without a count.
        others = {loop.path: 0.0 for loop in schedule.root.walk() if loop.trips is None}
        return others | known | {"0": T / TILE_T, steps: kernel.shares["score"] * context / TILE_S}

    method, device = hj.Dsa(topk=MODEL.topk), dispatch.Device(platform="tpu", kind=CHIP.kind)
    options: Any = dict(method=method, implementation="mosaic_tpu")
    call = functools.partial(streamindex_topk, k=MODEL.topk, compression_ratio=1, **options)
    with mock.patch.object(dispatch.Device, "default", lambda: device):
        return milliseconds(compiled(call, context), trips)


def compiled(call: Callable, context: int) -> aot.Program:
    return aot.compile_for(CHIP.name, lambda operands: call(**operands), operands(context), of_xla=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.tpu.host")
    parser.add_argument("file", type=pathlib.Path, help="streamindex_topk.py of a host")
    parser.add_argument("--json", type=pathlib.Path, help="write the rows to this file")
    args = parser.parse_args()
    aot.prepare()
    spec = importlib.util.spec_from_file_location("host", args.file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    rows = []
    for context in CONTEXTS:
        for who, parts in (("theirs", theirs(module, context)), ("ours", ours(context))):
            kernels = sum(ms for name, ms in parts.items() if name.startswith(("StreamIdx", "dsa_")))
            ms = sum(parts.values())
            largest = {name: round(part, 3) for name, part in parts.items() if part >= _SHOWN}
            rows.append(dict(who=who, context=context, ms=round(ms, 3), kernels_ms=round(kernels, 3), parts=largest))
            print(f"{who:8} {shapes.label(context):>5} {ms:9.3f} ms, of which kernels {kernels:9.3f}", flush=True)
    if args.json:
        text = json.dumps({"note": NOTE, "chip": CHIP.name, "jax": jax.__version__, "rows": rows}, indent=1)
        args.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
