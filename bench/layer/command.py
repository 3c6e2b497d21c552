"""`python -m bench layer`: one attention layer of DeepSeek-V3.2 and GLM-5 at its real widths, whole and part by part.

The layer is the model's own: projections, indexer, cache, selection, sparse attention, output. Weights and hidden
states are random; the cache is filled. Each result is checked before it is timed. On a GPU a time is the span of one
call by the profiler, elsewhere the wall clock of a call. Parts are compiled each for itself, so their sum is not the
whole: what lies between them, and what the compiler makes of all together, is the difference.
"""

import argparse
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from bench import UserError, options, records, shapes
from bench.gpu.span import clock_mhz, spans_of
from bench.layer.checks import check
from bench.layer.parts import Layer
from bench.layer.setting import MODELS, PAGE, Setting, served
from bench.timing import in_turn, once
from hisa_jax.models.config import Config
from hisa_jax.models.methods import make_method

METHODS = ("dsa", "hisa", "scan")
PARTS = ("project", "indexer", "append", "select", "attention", "output")
WHOLE, SPARSE = "whole", "sparse_mla"  # the kernel alone, a part of "attention"
OF_METHOD = ("select", "attention", SPARSE)
_SAMPLES = 3  # of calls that the clock times
K = 1024

Timer = Callable[[Sequence[Callable[[], Any]]], list[list[float]]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--models", nargs="+", choices=sorted(MODELS), default=sorted(MODELS), help="default: all")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS, help="default: all")
    parser.add_argument(
        "--contexts", type=options.context, nargs="*", default=[8 * K, 16 * K, 32 * K, 64 * K, 128 * K], metavar="N",
        help="tokens of a sequence that ends with a chunk of prefill (default: 8K to 128K)",
    )  # fmt: skip
    parser.add_argument("--chunk", type=options.whole(2, 1 << 16), default=4 * K, metavar="N", help="default: 4096")
    parser.add_argument(
        "--batches", type=options.whole(1, 4096), nargs="*", default=[1, 32, 128], metavar="N",
        help="sequences that decode a token each (default: 1, 32 and 128)",
    )  # fmt: skip
    parser.add_argument(
        "--decode-context", type=options.context, default=128 * K, metavar="N", help="tokens of each (default: 128K)"
    )
    parser.add_argument("--latents-in-8-bits", action="store_true", help="keep latents in 8 bits (docs/latents.md)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write each row there, among others")


def run(args: argparse.Namespace) -> int:
    bench = Bench(timer())
    rows = [Row(setting, name) for setting in settings(args) for name in args.methods]
    results: list[dict[str, Any]] = []

    def measure(row: Row) -> dict[str, Any]:
        results.append(bench.measure(row))
        return results[-1]

    status = records.measure_all(rows, ["*"], measure, line, args.json)
    print(table(results))
    return status


@dataclasses.dataclass(frozen=True)
class Row:
    """A setting and the name of a method."""

    setting: Setting
    method: str

    @property
    def row(self) -> str:
        x = self.setting
        form = " 8bit" if x.config.latent_dtype else ""
        return f"{x.model} {x.phase}{x.B if x.T == 1 else ''} {shapes.label(x.context)}{form} {self.method}"

    def __str__(self) -> str:
        return self.row


def settings(args: argparse.Namespace) -> Iterator[Setting]:
    """What the options ask for; sequences are whole pages, and longer than a chunk."""
    for model in args.models:
        config = served(MODELS[model](), latents_in_8_bits=args.latents_in_8_bits)
        for context in args.contexts:
            yield setting(model, config, 1, args.chunk, context)
        for batch in args.batches:
            yield setting(model, config, batch, 1, args.decode_context)


def setting(model: str, config: Config, B: int, T: int, context: int) -> Setting:
    """A setting whose sizes fit each other. Raises UserError otherwise."""
    if context % PAGE or context < T + PAGE:
        raise UserError(f"a context of {context}, wanted a multiple of {PAGE}, and {PAGE} more than {T} new tokens")
    return Setting(model=model, config=config, B=B, T=T, context=context)


def timer() -> Timer:
    """Milliseconds of each of some calls: by the profiler where it sees kernels, else by the clock."""
    if jax.default_backend() == "gpu":
        return lambda calls: [span.ms for span in spans_of(calls)]
    return lambda calls: [[once(call)[1] for _ in range(1 + _SAMPLES)][1:] for call in calls]


class Bench:
    """Rows of one setting share its layer, and the times of the parts that no method changes."""

    def __init__(self, timer: Timer):
        self._timer = timer
        self._setting: Setting | None = None
        self._layer: Layer | None = None
        self._common: dict[str, float] = {}

    def measure(self, row: Row) -> dict[str, Any]:
        """Checks a row's layer, then times it."""
        start, setting = time.perf_counter(), row.setting
        tell = lambda what: print(f"  {row}: {what} after {time.perf_counter() - start:.0f} s", flush=True)  # noqa: E731
        layer = self._layer_of(setting)
        tell("layer made")
        method = make_method(row.method, setting.config)
        f, operands = layer.whole(method)
        call = in_turn(f, operands, lambda result: result.pages)
        result = jax.block_until_ready(call())
        tell("compiled")
        check(layer, result, method)
        tell("checked")
        del result  # its pages are used up by the next call
        calls = {WHOLE: call, **dict(layer.parts_of(method)), **({} if self._common else dict(layer.parts()))}
        times = dict(zip(calls, self._timer(list(calls.values())), strict=True))
        whole, clock = times.pop(WHOLE), clock_mhz()
        parts = self._common | {name: float(np.median(samples)) for name, samples in times.items()}
        self._common = {name: ms for name, ms in parts.items() if name not in OF_METHOD}
        return records.device() | {
            "row": row.row, "model": setting.model, "phase": setting.phase, "batch": setting.B, "queries": setting.T,
            "context": setting.context, "latents": setting.config.latent_dtype or "bfloat16", "method": row.method,
            "ms": float(np.median(whole)),
            "ms_p10": float(np.percentile(whole, 10)), "ms_p90": float(np.percentile(whole, 90)),
            "parts_ms": {name: parts[name] for name in (*PARTS, SPARSE)}, "clock_mhz": clock, "checked": True,
            "timer": "span" if jax.default_backend() == "gpu" else "wall clock",
        }  # fmt: skip

    def _layer_of(self, setting: Setting) -> Layer:
        if setting != self._setting or self._layer is None:
            self._layer = None  # before the next is made
            self._layer, self._setting, self._common = Layer(setting), setting, {}
        return self._layer


def line(x: dict[str, Any]) -> str:
    """What is printed of a row."""
    parts = ", ".join(f"{name} {x['parts_ms'][name]:.3g}" for name in PARTS)
    return (
        f"{x['row']:28} {x['ms']:9.4g} ms [{x['ms_p10']:.4g}, {x['ms_p90']:.4g}] by {x['timer']}: {parts} (of it "
        f"{SPARSE} {x['parts_ms'][SPARSE]:.3g}), between {x['ms'] - sum(x['parts_ms'][name] for name in PARTS):.3g}"
    )


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a row's milliseconds, by part, and what its method gains of the whole layer over the flat indexer."""
    flat = {_setting_of(x): x["ms"] for x in rows if x["method"] == "dsa"}
    cells = [["layer", "whole", "faster by", *PARTS, f"{SPARSE} alone", "largest"]]
    cells.append(["---"] + ["--:"] * (len(cells[0]) - 2) + ["---"])
    for x in rows:
        parts = x["parts_ms"]
        largest = max(PARTS, key=lambda name: parts[name])
        gain = f"{flat[_setting_of(x)] / x['ms']:.2f}x" if _setting_of(x) in flat and x["method"] != "dsa" else ""
        times = [f"{parts[name]:.3f}" for name in (*PARTS, SPARSE)]
        cells.append([x["row"], f"{x['ms']:.3f}", gain, *times, f"{largest}, {100 * parts[largest] / x['ms']:.0f} %"])
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def _setting_of(row: dict[str, Any]) -> tuple:
    return tuple(row[name] for name in ("model", "batch", "queries", "context"))
