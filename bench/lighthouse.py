"""One layer of Lighthouse attention, forward and with its gradient, stage by stage, beside dense causal attention.

Both run the same dense implementation, in the same process: cuDNN on NVIDIA GPUs, splash attention on TPUs, else XLA.
Work grows as (entries / tokens) squared, so (tokens / entries) squared is the most that can be gained.
"""

import argparse
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import hisa_jax as hj
from bench import UserError, options, records, timing
from bench.gpu.span import spans
from hisa_jax.lighthouse import dense, forward
from hisa_jax.lighthouse.selection import select
from hisa_jax.testing.oracle import lighthouse as oracle

CONTEXTS = tuple(1 << power for power in range(15, 20))
_ORACLE_TOKENS = 2048
_LONG_MS = 20.0
_TILE = 128

Call = Callable[..., Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layer:
    """What is measured; of 64 tokens, one entry is picked a level."""

    tokens: int
    heads: int
    dim: int
    dtype: str

    @property
    def row(self) -> str:
        return f"lighthouse-{self.tokens}"

    @property
    def method(self) -> hj.Lighthouse:
        topk = self.tokens // 64
        return hj.Lighthouse(levels=3, pool=4, topk=topk, tile=min(_TILE, topk))

    def operands(self) -> tuple[Array, Array, Array]:
        shape = (1, self.tokens, self.heads, self.dim)
        q, k, v = (jax.random.normal(jax.random.key(i), shape, jnp.float32).astype(self.dtype) for i in range(3))
        return q, k, v


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--contexts", type=options.whole(2048, 1 << 22), nargs="+", default=CONTEXTS, metavar="N",
        help="tokens, multiples of 2048 (default: 32K to 512K)",
    )  # fmt: skip
    for name, default in (("heads", 8), ("dim", 128), ("samples", 5)):
        parser.add_argument(
            f"--{name}", type=options.whole(1, 1024), default=default, metavar="N", help="default: %(default)s"
        )
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="default: %(default)s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write each row there, among others")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw what --json holds there, and measure nothing")


def run(args: argparse.Namespace) -> int:
    if args.plot:
        return _plot(args.json, args.plot)
    worst = check_against_oracle(args.dim, args.dtype)
    print(f"{_ORACLE_TOKENS} tokens: selection that of the oracle, greatest error of an output {worst:.2g}", flush=True)
    layers = [Layer(tokens=n, heads=args.heads, dim=args.dim, dtype=args.dtype) for n in args.contexts]
    return records.measure_all(layers, ["*"], lambda layer: measure(layer, args.samples), line, args.json)


def _plot(rows: Path | None, target: Path) -> int:
    if rows is None or not rows.is_file():
        raise UserError(f"--plot: --json is {rows}, wanted a file that a run wrote")
    from bench.lighthouse_plot import figure  # matplotlib, which measuring does without

    figure(json.loads(rows.read_text())).savefig(target, dpi=150)
    return 0


def check_against_oracle(dim: int, dtype: str) -> float:
    """The greatest error of a small layer's outputs; raises if they or the selection are not the oracle's."""
    layer = Layer(tokens=_ORACLE_TOKENS, heads=1, dim=dim, dtype=dtype)
    operands = layer.operands()
    q, k, v = (np.asarray(x[0, :, 0].astype(jnp.float32), np.float64) for x in operands)
    # The norms as the library rounds them, so that near ties are the same.
    a, b = (np.asarray(x, np.float64)[0, :, 0] for x in forward.strengths(*operands[:2], **_settings(layer, operands)))
    entries = oracle.present(a, b, layer.method)
    selection = hj.lighthouse_select(*operands[:2], layer.method)
    pyramid = layer.method.pyramid(layer.tokens)
    wanted = np.array([pyramid.starts[level] + number for level, number in entries])
    got = np.asarray(selection.entries)[0, :, 0]
    if not np.array_equal(got[got >= 0], wanted):
        raise AssertionError("the selection is not the oracle's")
    out = np.asarray(hj.lighthouse_attention(*operands, layer.method).astype(jnp.float32))[0, :, 0]
    error = float(np.abs(out - oracle.attention(q[:, None], k, v, entries, layer.method)[:, 0]).max())
    if error > (0.1 if dtype == "bfloat16" else 1e-2):
        raise AssertionError(f"an output is {error:.2g} off the oracle's")
    return error


def _settings(layer: Layer, operands: tuple[Array, ...]) -> dict[str, Any]:
    q, _, v = operands
    name = dense.choose("bench", "auto", q, v)
    return dict(method=layer.method, options=forward.Options(name=name, scale=layer.dim**-0.5))


def measure(layer: Layer, samples: int) -> dict[str, Any]:
    """Checks a layer, then times it: milliseconds of each stage, of all, and of dense attention."""
    q, k, v = operands = layer.operands()
    settings = _settings(layer, operands)
    method, given = settings["method"], settings["options"]
    pyramid, S = method.pyramid(layer.tokens), method.n_entries(layer.tokens)
    positions = jnp.arange(layer.tokens, dtype=jnp.int32)[None]
    scores = jax.jit(lambda q, k: forward.strengths(q, k, **settings))(q, k)
    selection = select(*scores, method)
    entries, slots = selection.entries, selection.slots

    def gather(q: Array, k: Array, v: Array, entries: Array, slots: Array) -> tuple[Array, Array, Array]:
        return forward.operands(q, k, v, entries, slots, positions, pyramid, None)

    def spread(out: Array, entries: Array, slots: Array) -> Array:
        return forward.results(out, entries, slots, pyramid, None)

    def whole(q: Array, k: Array, v: Array) -> Array:
        return hj.lighthouse_attention(q, k, v, method)

    def dense_of(q: Array, k: Array, v: Array) -> Array:
        return forward.attention(q, k, v, given)

    gathered = jax.jit(gather)(q, k, v, entries, slots)
    out = jax.jit(dense_of)(*gathered)
    _check(layer, whole, operands, selection)
    calls: dict[str, tuple[Call, tuple[Array, ...]]] = {
        "score": (lambda q, k: forward.strengths(q, k, **settings), (q, k)),
        "select": (lambda a, b: select(a, b, method), scores),
        "gather": (gather, (q, k, v, entries, slots)),
        "attention": (dense_of, gathered),
        "spread": (spread, (out, entries, slots)),
        "forward": (whole, operands),
        "forward_backward": (_with_gradient(whole), operands),
        "attention_backward": (_with_gradient(dense_of), gathered),
        "dense_forward": (dense_of, operands),
        "dense_forward_backward": (_with_gradient(dense_of), operands),
    }
    ms = {name: float(np.median(_times(f, arrays, samples))) for name, (f, arrays) in calls.items()}
    return records.device() | {
        "row": layer.row, **dataclasses.asdict(layer), "method": dataclasses.asdict(method), "entries": S,
        "implementation": given.name, "checked": True, "ms": ms, "ceiling": (layer.tokens / S) ** 2,
        "forward_gain": ms["dense_forward"] / ms["forward"],
        "forward_backward_gain": ms["dense_forward_backward"] / ms["forward_backward"],
        "glue_share": 1 - ms["attention"] / ms["forward"],
        "glue_share_backward": 1 - ms["attention_backward"] / ms["forward_backward"],
        "memory": _memory(whole, operands), "memory_backward": _memory(_with_gradient(whole), operands),
    }  # fmt: skip


def line(result: dict[str, Any]) -> str:
    """What is printed of a layer."""
    ms = result["ms"]
    stages = ", ".join(f"{name} {ms[name]:.3g}" for name in ("score", "select", "gather", "attention", "spread"))
    return (
        f"{result['tokens']:>7} tokens, {result['entries']} entries, {result['implementation']}: forward "
        f"{ms['forward']:.3g} ms ({stages}), dense {ms['dense_forward']:.3g}, {result['forward_gain']:.3g} times of at "
        f"most {result['ceiling']:.3g}; with gradient {ms['forward_backward']:.3g}, dense "
        f"{ms['dense_forward_backward']:.3g}, {result['forward_backward_gain']:.3g} times; all but the attention "
        f"{100 * result['glue_share']:.0f} % and {100 * result['glue_share_backward']:.0f} %; memory "
        f"{result['memory']:.3g} and {result['memory_backward']:.3g} times inputs and outputs"
    )


def _check(layer: Layer, whole: Call, operands: tuple[Array, ...], selection: hj.LighthouseSelection) -> None:
    """Raises unless entries and places are each other's inverse, every token is covered, and bits repeat."""
    q, k, v = operands
    entries, slots = np.asarray(selection.entries), np.asarray(selection.slots)
    S = entries.shape[1]
    for head in range(layer.heads):
        row, places = entries[0, :, head], slots[0, :, head]
        n = int(np.sum(row >= 0))
        if S - n > layer.method.n_kept or not np.array_equal(places[row[:n]], np.arange(n)) or (places >= 0).sum() != n:
            raise AssertionError(f"head {head}: entries and places do not fit each other")
    run = jax.jit(whole)
    counts = np.asarray(run(q, k, jnp.ones_like(v)).astype(jnp.float32))
    is_whole = np.abs(counts - np.round(counts)).max() < 0.05
    if not is_whole or not 0.95 < counts.min() <= counts.max() < layer.method.levels + 0.05:
        raise AssertionError("values of 1 do not give the number of windows of each token")
    gradient = jax.jit(_with_gradient(whole))
    first, again = ([np.asarray(x.astype(jnp.float32)) for x in gradient(*operands)] for _ in range(2))
    if not all(np.isfinite(x).all() for x in first):
        raise AssertionError("a gradient is not finite")
    # The dense attention's backward pass may add in any order, as cuDNN's does; ours may not.
    if not np.array_equal(first[0], again[0]):
        raise AssertionError("the output differs from call to call")


def _with_gradient(f: Call) -> Call:
    """A call for the output and the gradients of all operands under a cotangent of ones."""

    def both(*operands: Array) -> tuple[Array, ...]:
        out, pull = jax.vjp(f, *operands)
        return out, *pull(jnp.ones_like(out))

    return both


def _times(f: Call, operands: tuple[Array, ...], samples: int) -> list[float]:
    """Milliseconds of a call on the device: on a GPU from its first kernel to its last, by the profiler."""
    compiled = jax.jit(f)
    jax.block_until_ready(compiled(*operands))
    if jax.default_backend() == "gpu":
        return spans(lambda: compiled(*operands), samples).ms
    _, once_ms = timing.once(lambda: compiled(*operands))
    unused = jnp.zeros((1,), jnp.int32)
    return timing.device_times(
        lambda *x: f(*x[:-1]), (*operands, unused), samples, run_length=1 if once_ms > _LONG_MS else 16
    )


def _memory(f: Call, operands: tuple[Array, ...]) -> float | None:
    """What the compiled program takes, in times of its inputs and outputs; None where the compiler does not say."""
    found = jax.jit(f).lower(*operands).compile().memory_analysis()
    if found is None:
        return None
    own = found.argument_size_in_bytes + found.output_size_in_bytes
    return (own + found.temp_size_in_bytes) / own
