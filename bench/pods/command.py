"""`python -m bench pods`: steps of whole models, compiled for whole pods by the real compiler, with no TPU.

DeepSeek-V3.2 with bfloat16 and e4m3 weights and GLM-5 at their published sizes: a decoding step and a chunk of prompts,
128K tokens a request, for 256 chips of v5e and v6e and 128 of v5p and v7x. Each row says what a device holds and what
it sends, and fails where that is too much. Times are estimates.
"""

import argparse
import fnmatch
import json
import pathlib
import time
from typing import Any

import jax

from bench import shapes
from bench.pods import bounds, hlo
from bench.pods.estimate import estimate_ms
from bench.pods.rows import Row, rows
from bench.pods.step import compile_step, config_of, mesh_of
from bench.records import plain, whole_file
from bench.tpu import aot
from bench.tpu.chips import CHIPS

_GIB = 1 << 30


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rows", default="*", help="only rows whose name matches this pattern, '*-decode-v5e'")
    parser.add_argument("--json", type=pathlib.Path, help="write the rows to this file, beside others that are in it")
    parser.add_argument(
        "--table", type=pathlib.Path, metavar="JSON", help="compile nothing, print the tables of a file"
    )


def run(args: argparse.Namespace) -> int:
    if args.table:
        found = tables(json.loads(args.table.read_text())["rows"])
        print("\n\n".join(f"{title}\n\n{text}" for title, text in found.items()))
        return 0
    aot.prepare()
    failed = False
    print(HEADING, flush=True)
    for row in rows():
        if fnmatch.fnmatch(row.row, args.rows):
            result = measure(row)
            failed |= bool(result["problems"])
            print("\n".join([line(result), *(f"{row.row}: {x}" for x in result["problems"])]), flush=True)
            if args.json:
                _add(args.json, result)
    return 1 if failed else 0


def measure(row: Row) -> dict[str, Any]:
    """Compiles a row: what a device holds and sends, the kernels, the estimate, and what is wrong with it."""
    config, start = config_of(row), time.perf_counter()
    step = compile_step(row, mesh_of(row))
    seconds = time.perf_counter() - start
    text, memory = step.program.compiled.as_text(), step.program.compiled.memory_analysis()
    found, kernels = hlo.collectives(text, row.n_devices, step.runs), hlo.kernels(text)
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    used = held + memory.temp_size_in_bytes + memory.generated_code_size_in_bytes
    moved = sum(x.moved_bytes for x in found)
    milliseconds = estimate_ms(row, config, step, found)
    result = {
        "row": row.row,
        "chip": row.chip,
        "model": row.model,
        "weights": row.weights,
        "phase": row.phase,
        "mesh": row.axes,
        "batch": row.batch,
        "queries": row.queries,
        "context": row.context,
        "used_gib": used / _GIB,
        "hbm_gib": CHIPS[row.chip].hbm_bytes / _GIB,
        "weight_gib": step.weight_bytes / _GIB,
        "cache_gib": (memory.argument_size_in_bytes - step.weight_bytes) / _GIB,
        "temp_gib": memory.temp_size_in_bytes / _GIB,
        "sent_mb": moved / 1e6,
        "sent_mb_a_token": moved * row.n_devices / row.tokens / 1e6,
        "collectives": {kind: _of_kind(found, kind) for kind in sorted({x.kind for x in found})},
        "kernels": sorted(kernels),
        "estimated_ms": milliseconds | {"step": sum(milliseconds.values())},
        "compile_seconds": seconds,
        "jax": jax.__version__,
        "problems": bounds.problems(row, config, found, kernels, used, CHIPS[row.chip].hbm_bytes),
    }
    return plain(result, 4)


def _of_kind(found: list[hlo.Collective], kind: str) -> dict[str, float]:
    own = [x for x in found if x.kind == kind]
    return {"times": sum(x.times for x in own), "sent_mb": sum(x.moved_bytes for x in own) / 1e6}


HEADING = (
    "| chip | step | mesh | requests | HBM used, GiB | weights + cache + temporaries | MB sent | a token | ms |\n"
    "|---|---|---|---|---|---|---|---|---|"
)


def tables(results: list[dict[str, Any]]) -> dict[str, str]:
    """The tables of docs/pods.md, one for each model and dtype of weights."""
    found: dict[str, str] = {}
    by_name = {x["row"]: x for x in results}
    for row in rows():
        if x := by_name.get(row.row):
            title = f"{row.model}, {row.weights}"
            found[title] = f"{found.get(title, HEADING)}\n{line(x)}"
    return found


def line(x: dict[str, Any]) -> str:
    parts = " + ".join(f"{x[name]:.3g}" for name in ("weight_gib", "cache_gib", "temp_gib"))
    cells = [
        x["chip"], x["phase"], " x ".join(map(str, x["mesh"].values())), x["batch"],
        f"{x['used_gib']:.1f} of {x['hbm_gib']:.0f}", parts, f"{x['sent_mb']:,.0f}", f"{x['sent_mb_a_token']:,.0f}",
        f"{x['estimated_ms']['step']:.0f}",
    ]  # fmt: skip
    return f"| {' | '.join(map(str, cells))} |"


def _add(file: pathlib.Path, result: dict[str, Any]) -> None:
    kept = json.loads(file.read_text())["rows"] if file.exists() else []
    note = f"Compiled, not run; {shapes.label(result['context'])} tokens a request. Milliseconds are estimates."
    results = [row for row in kept if row["row"] != result["row"]] + [result]
    with whole_file(file) as partial:
        partial.write_text(json.dumps({"note": note, "rows": results}, indent=1) + "\n")
