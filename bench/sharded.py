"""`python -m bench sharded`: selections and attention where several GPUs of one host share the keys, beside one GPU.

A row is a method, a context and a number of queries, on 1 GPU with all keys, on 1 with the share that one of several
has, and on 2, 4, 8, ... with all. A time is that of one call, from the first kernel on any GPU to the last on any, by
the profiler. What several give is compared with what one gives before it is timed.
"""

import argparse
import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
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
_SAME = 0.998  # of the tokens, the least: near the threshold Hopper's sums of e4m3 products may differ, block means too
_COMPARED = 256  # queries of a sequence
_NEAR = 0.02  # of the largest output, attention in bfloat16: the most that a part's rounding may change
_METHODS = ("dsa", "hisa", "scan")
_LISTED = 12  # kernels of a row, those that take longest
_ATTENTION = "sparse_mla"


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

    def __str__(self) -> str:
        return self.row


def add_arguments(parser: argparse.ArgumentParser) -> None:
    whole = options.whole(2, 64)
    parser.add_argument("--devices", type=whole, nargs="+", metavar="N", help="default: 2, 4, 8, ... as there are")
    options.add_rows(parser)
    parser.add_argument("--samples", type=options.whole(1, 1000), default=10, metavar="N", help="default: %(default)s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write each row there, among others")


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
    attention = [(128 * K, 1, 4096), *((8 * K, batch, 1) for batch in (1, 32, 128))]
    return [
        Row(method=method, context=context, batch=batch, queries=queries, devices=devices)
        for method in (*_METHODS, _ATTENTION)
        for context, batch, queries in (attention if method == _ATTENTION else sizes)
    ]


@dataclasses.dataclass(frozen=True)
class _Case:
    """What a row runs: a function over `inputs`, of which those numbered in `split` lie over the devices."""

    inputs: tuple[Any, ...]
    split: tuple[int, ...]
    on: Callable[[Mesh | None], Any]  # jitted, for this mesh; None: one device has them all
    share: Callable[[int], tuple[Any, ...]]  # the inputs of one device of so many
    agree: Callable[[np.ndarray, np.ndarray], float]  # of what was got and wanted; raises where they differ


def measure(row: Row, samples: int) -> dict[str, Any]:
    """Milliseconds on one GPU with all keys and with a share, and on several; bytes that each sends."""
    case = _attention(row) if row.method == _ATTENTION else _selection(row)
    whole = case.on(None)
    wanted = np.asarray(whole(*case.inputs))
    results: list[dict[str, Any]] = []
    calls = [functools.partial(whole, *case.inputs)]
    for n in row.devices:
        mesh = Mesh(np.array(jax.devices()[:n]), (_AXIS,))
        split, everywhere = NamedSharding(mesh, P(None, _AXIS)), NamedSharding(mesh, P())
        placed = [jax.device_put(x, split if at in case.split else everywhere) for at, x in enumerate(case.inputs)]
        compiled = case.on(mesh).lower(*placed).compile()
        same = case.agree(np.asarray(compiled(*placed)), wanted)
        calls += [functools.partial(whole, *case.share(n)), functools.partial(compiled, *placed)]
        moved = sum(x.moved_bytes for x in collectives(compiled.as_text(), n, ()))
        results.append({"devices": n, "same": same, "exchanged_bytes": moved})
    record = functools.partial(by_jax, planes="/device:GPU:")
    one, *others = spans_of(calls, samples, record)
    one_ms = float(np.median(one.ms))
    for result, share, span in zip(results, others[::2], others[1::2], strict=True):
        low, ms, high = (float(x) for x in np.percentile(span.ms, (10, 50, 90)))
        result |= {"ms": ms, "p10": low, "p90": high, "share_ms": float(np.median(share.ms)), "of_one": ms / one_ms}
        result |= {"kernels": dict(list(span.kernels.items())[:_LISTED])}  # of all devices together
    named = {"row": row.row, **dataclasses.asdict(row)}
    return records.device() | named | {"ms": one_ms, "several": results, "checked": True}


def line(result: dict[str, Any]) -> str:
    """What is printed of a row."""
    several = (
        f"{x['devices']}: {x['ms']:.3f} ms ({x['of_one']:.2f} of one, {x['ms'] / x['share_ms']:.2f} of one on a share, "
        f"{x['exchanged_bytes'] / 1e6:.1f} MB sent, {x['same']:.4f} the same)"
        for x in result["several"]
    )
    return f"{result['row']:<22} 1: {result['ms']:.3f} ms, {', '.join(several)}"


def _selection(row: Row) -> _Case:
    """The indexer; its keys are split, and are e4m3 with scales."""
    method = shapes.DSV32.methods()[row.method]
    inputs = draw(shapes.DSV32, row.batch, row.queries, row.context)

    def on(mesh: Mesh | None) -> Any:
        def f(q: Array, k: Array, k_scale: Array, w: Array, visible: Array) -> Array:
            options: Any = dict(query_positions=visible - 1, implementation="mosaic_gpu") | _over(mesh)
            return hj.select(q, hj.QuantizedKeys(k, k_scale), w, method, **options).indices

        return jax.jit(f)

    def share(n: int) -> Inputs:
        # The first n-th of the keys, which every query sees as far as there are any.
        S = row.context // n
        q, k, k_scale, w, visible = inputs
        return Inputs(q, k[:, :S], k_scale[:, :S], w, jnp.minimum(visible, S))

    return _Case(inputs, (1, 2), on, share, _share_of_tokens)


def _attention(row: Row) -> _Case:
    """Sparse MLA of 128 heads; latents are split. A device of n attends to an n-th of each list of 2048."""
    model, topk = shapes.DSV32, shapes.DSV32.topk
    keys = jax.random.split(jax.random.key(3), 3)
    q = jax.random.normal(keys[0], (row.batch, row.queries, model.mla_heads, model.mla_dim), jnp.bfloat16)
    kv = jax.random.normal(keys[1], (row.batch, row.context, model.mla_dim), jnp.bfloat16)
    starts = jax.random.randint(keys[2], (row.batch, row.queries, 1), 0, row.context // topk)
    indices = (starts + jnp.arange(topk) * (row.context // topk)).astype(jnp.int32)

    def on(mesh: Mesh | None) -> Any:
        options: Any = dict(value_dim=model.mla_value_dim, scale=model.mla_dim**-0.5, implementation="mosaic_gpu")
        return jax.jit(lambda q, kv, indices: hj.sparse_mla(q, kv, indices, **options, **_over(mesh)))

    def share(n: int) -> tuple[Array, Array, Array]:
        return q, kv[:, : row.context // n], indices[:, :, : topk // n]

    return _Case((q, kv, indices), (1,), on, share, _distance)


def _over(mesh: Mesh | None) -> dict[str, Any]:
    return {} if mesh is None else {"mesh": mesh, "context_axis": _AXIS}


def _share_of_tokens(got: np.ndarray, wanted: np.ndarray) -> float:
    """[B, T, K] token lists, -1 after the last: the share of the wanted tokens that were got, of some queries."""
    some = np.linspace(0, got.shape[1] - 1, min(got.shape[1], _COMPARED)).astype(int)
    lists = [x[:, some].reshape(-1, x.shape[2]) for x in (got, wanted)]
    found = sum(np.isin(b[b >= 0], a[a >= 0]).sum() for a, b in zip(*lists, strict=True))
    same = float(found / (lists[1] >= 0).sum())
    if same < _SAME:
        raise AssertionError(f"several devices select {same:.4f} of the tokens of one, wanted {_SAME}")
    return same


def _distance(got: np.ndarray, wanted: np.ndarray) -> float:
    """[B, T, N, V] outputs: 1 less the largest difference, as a part of the largest output."""
    got, wanted = got.astype(np.float32), wanted.astype(np.float32)
    difference = float(np.max(np.abs(got - wanted)) / np.max(np.abs(wanted)))
    if not difference <= _NEAR:
        raise AssertionError(f"outputs of several devices differ by {difference:.4f} of the largest, wanted {_NEAR}")
    return 1 - difference
