"""`python -m bench sharded`: selections over keys that several GPUs of one host share, beside one GPU.

A row is a method, a context and a number of queries, on 1 GPU with all keys, on 1 with the share that one of several
has, and on 2, 4, 8, ... with all. A time is that of one call, from the first kernel on any GPU to the last on any, by
the profiler. What several select is compared with what one selects before it is timed.
"""

import argparse
import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import hisa_jax as hj
from bench import UserError, options, records, shapes
from bench.gpu.inputs import Inputs, draw
from bench.gpu.row import K
from bench.gpu.span import by_jax, spans_of
from bench.pods.hlo import collectives

_AXIS = "context"
_SAME = 0.998  # of the tokens, the least: near the cut Hopper's sums of e4m3 products may differ, block means too
_COMPARED = 256  # queries of a sequence
_METHODS = ("dsa", "hisa", "scan")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One line: `batch` sequences of `context` tokens with `queries` each, their keys on `devices` GPUs."""

    method: str
    context: int
    batch: int
    queries: int
    devices: tuple[int, ...]

    @property
    def row(self) -> str:
        kind = "prefill" if self.batch == 1 and self.queries > 1 else f"decode{self.batch}"
        return f"{self.method}_{kind}_{shapes.label(self.context)}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    whole = options.whole(2, 64)
    parser.add_argument("--devices", type=whole, nargs="+", metavar="N", help="default: 2, 4, 8, ... as there are")
    parser.add_argument("--rows", default="*", help="only rows whose name matches this pattern")
    parser.add_argument("--samples", type=options.whole(1, 1000), default=10, metavar="N", help="default: %(default)s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")


def run(args: argparse.Namespace) -> int:
    there = len(jax.devices())
    if jax.default_backend() != "gpu" or there < 2:
        raise UserError(f"needs 2 NVIDIA GPUs or more, this machine has {there} of {jax.default_backend()}")
    devices = tuple(args.devices or [n for n in (2, 4, 8, 16) if n <= there])
    if max(devices) > there:
        raise UserError(f"--devices {max(devices)}: wanted at most the {there} there are")
    return records.measure_all(rows(devices), args.rows, lambda row: measure(row, args.samples), line, args.json)


def rows(devices: tuple[int, ...]) -> list[Row]:
    sizes = [
        (128 * K, 1, 4096),
        (1024 * K, 1, 4096),
        *((128 * K, batch, 1) for batch in (1, 32, 128)),
        (1024 * K, 1, 1),
    ]
    return [
        Row(method=method, context=context, batch=batch, queries=queries, devices=devices)
        for context, batch, queries in sizes
        for method in _METHODS
    ]


def measure(row: Row, samples: int) -> dict[str, Any]:
    """Milliseconds on one GPU with all keys and with a share, and on several; bytes that each sends."""
    method = shapes.DSV32.methods()[row.method]
    inputs = draw(shapes.DSV32, row.batch, row.queries, row.context)
    whole = _select(method, None)
    wanted = np.asarray(jax.block_until_ready(whole(*inputs)).indices)
    calls, results = [functools.partial(whole, *inputs)], []
    for n in row.devices:
        mesh = Mesh(np.array(jax.devices()[:n]), (_AXIS,))
        placed = _placed(inputs, mesh)
        compiled = _select(method, mesh).lower(*placed).compile()
        same = _same(np.asarray(compiled(*placed).indices), wanted)
        if same < _SAME:
            raise AssertionError(f"{n} devices select {same:.4f} of the tokens of one, wanted {_SAME}")
        share = _share(inputs, n)
        calls += [functools.partial(whole, *share), functools.partial(compiled, *placed)]
        moved = sum(x.moved_bytes for x in collectives(compiled.as_text(), n, ()))
        results.append({"devices": n, "same": same, "exchanged_bytes": moved})
    record = functools.partial(by_jax, planes="/device:GPU:")
    one, *others = ([float(x) for x in span.ms] for span in spans_of(calls, samples, record))
    for result, share_ms, ms in zip(results, others[::2], others[1::2], strict=True):
        middle = float(np.median(ms))
        result |= {"ms": middle, "p10": float(np.percentile(ms, 10)), "p90": float(np.percentile(ms, 90))}
        result |= {"share_ms": float(np.median(share_ms)), "of_one": middle / float(np.median(one))}
    named = {"row": row.row, **dataclasses.asdict(row)}
    return records.device() | named | {"ms": float(np.median(one)), "several": results, "checked": True}


def line(result: dict[str, Any]) -> str:
    """What is printed of a row."""
    several = (
        f"{x['devices']}: {x['ms']:.3f} ms ({x['of_one']:.2f} of one, {x['ms'] / x['share_ms']:.2f} of one on a share, "
        f"{x['exchanged_bytes'] / 1e6:.1f} MB sent, {x['same']:.4f} the same)"
        for x in result["several"]
    )
    return f"{result['row']:<22} 1: {result['ms']:.3f} ms, {', '.join(several)}"


def _select(method: hj.Method, mesh: Mesh | None) -> Any:
    """Jitted over `Inputs`; `mesh` splits the keys, None: one device has them all."""

    def f(q: Array, k: Array, k_scale: Array, w: Array, visible: Array) -> hj.Selection:
        split: dict[str, Any] = {} if mesh is None else {"mesh": mesh, "context_axis": _AXIS}
        keys = hj.QuantizedKeys(k, k_scale)
        return hj.select(q, keys, w, method, query_positions=visible - 1, implementation="mosaic_gpu", **split)

    return jax.jit(f)


def _placed(inputs: Inputs, mesh: Mesh) -> Inputs:
    split, everywhere = NamedSharding(mesh, P(None, _AXIS)), NamedSharding(mesh, P())
    return Inputs(*(jax.device_put(x, split if at in (1, 2) else everywhere) for at, x in enumerate(inputs)))


def _share(inputs: Inputs, n: int) -> Inputs:
    """The first n-th of the keys, which every query sees as far as there are any."""
    S = inputs.k.shape[1] // n
    visible = jax.numpy.minimum(inputs.visible, S)
    return Inputs(inputs.q, inputs.k[:, :S], inputs.k_scale[:, :S], inputs.w, visible)


def _same(got: np.ndarray, wanted: np.ndarray) -> float:
    """[B, T, K] token lists, -1 after the last: the share of the wanted tokens that were got, of some queries."""
    some = np.linspace(0, got.shape[1] - 1, min(got.shape[1], _COMPARED)).astype(int)
    lists = [x[:, some].reshape(-1, x.shape[2]) for x in (got, wanted)]
    found = sum(np.isin(b[b >= 0], a[a >= 0]).sum() for a, b in zip(*lists, strict=True))
    return float(found / (lists[1] >= 0).sum())
