"""One row: both sides checked, then timed in turn."""

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from bench import records, shapes
from bench.gpu.row import Row
from bench.gpu.span import AS_A_GRAPH, Event, Span, clock_mhz

_ROUNDS = 2  # of both sides in turn: a card's clock falls under load
_COMPARED = 64  # queries whose lists are compared

Call = Callable[[], Any]
Timer = Callable[[Sequence[Call]], list[Span]]


class Kind(NamedTuple):
    """How rows of some names are compared.

    Attributes:
        names: a pattern; `part`: the method of `Theirs`; `package`: what it needs, a field of `Peers`.
        least: share of our tokens that theirs must have; for an attention, what its error must leave of 1.
    """

    names: str
    part: str
    package: str
    least: float


KINDS = (
    # Their block means have 8 bits, ours twice as many: blocks near the threshold differ.
    Kind(r"hisa", "hisa", "deep_gemm", 0.9),
    Kind(r"flat", "flat", "deep_gemm", 0.995),
    Kind(r"decode\d+_paged", "hisa_decode", "deep_gemm", 0.9),
    Kind(r"flat_decode\d+_paged", "flat_decode", "deep_gemm", 0.995),
    Kind(r"sparse_mla(_decode\d+)?", "sparse_mla", "flash_mla", 0.99),
    Kind(r"sparse_mla_decode\d+_8bit", "sparse_mla_8bit", "flash_mla", 0.98),
)


def kind_of(row: Row) -> Kind | None:
    """How a row of `python -m bench gpu` is compared, None if no peer does the same."""
    if row.implementation != "mosaic_gpu" or row.dtype != dtype_of(row.row):
        return None
    return next((kind for kind in KINDS if re.fullmatch(kind.names, row.row)), None)


def dtype_of(name: str) -> str:
    """Of the rows of a name those that are compared have this one."""
    return "bf16" if name.startswith("sparse_mla") else "e4m3"


def in_order(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Measured rows by kind, model, context and queries, as tables and plots have them."""
    kinds = [kind.names for kind in KINDS]

    def place(x: dict[str, Any]) -> tuple:
        kind = next(i for i, names in enumerate(kinds) if re.fullmatch(names, x["row"]))
        return kind, x["shape"], x["context"], x["queries"]

    return sorted(rows, key=place)


class Side(NamedTuple):
    """A call of one side, which waits for what it launches, and the result of one as an array of the host."""

    call: Call
    result: np.ndarray


def measure(row: Row, theirs: Callable[[tuple], dict[str, Callable[[], Side]]], timer: Timer) -> dict[str, Any]:
    """Checks and times a row.

    Args:
        theirs: operands of ours -> the peers' sides by name, each made when it is called.
        timer: spans of calls.

    Returns: the figures. A peer that fails or chooses otherwise is under "failed" with the reason, and not timed.
    Raises: AssertionError: our result is wrong. RuntimeError: no peer is left.
    """
    kind = kind_of(row)
    assert kind is not None  # rows that no peer has are left out before
    f, operands, check = row.make()
    compiled = jax.jit(f, compiler_options=AS_A_GRAPH)
    out = jax.tree.map(np.asarray, compiled(*operands))
    check(out)
    ours, failed, agrees = np.asarray(jax.tree.leaves(out)[0]), {}, {}
    calls: dict[str, Call] = {"ours": lambda: compiled(*operands)}
    for name, make in theirs(operands).items():
        try:
            side = make()
        except Exception as error:  # another composition may work; the row says why this one did not
            failed[name] = f"{type(error).__name__}: {error}"[:300]
            continue
        agrees[name] = agreement(ours, side.result)
        if agrees[name] < kind.least:
            failed[name] = f"agrees to {agrees[name]:.4f}, wanted {kind.least}"
        else:
            calls[name] = side.call
    if len(calls) == 1:
        raise RuntimeError(f"no peer is left: {failed}")
    found = timer(list(calls.values()) * _ROUNDS)
    spans = {name: _joined(found[i :: len(calls)]) for i, name in enumerate(calls)}
    ms = {name: float(np.median(span.ms)) for name, span in spans.items()}
    best = min((name for name in ms if name != "ours"), key=lambda name: ms[name])
    return records.device() | {
        "row": row.row, "shape": row.shape, "context": row.context, "queries": row.queries, "ours_ms": ms["ours"],
        "ours_ms_p10_p90": list(np.percentile(spans["ours"].ms, [10, 90])), "best": best, "best_ms": ms[best],
        "best_ms_p10_p90": list(np.percentile(spans[best].ms, [10, 90])), "ratio": ms["ours"] / ms[best],
        "peers_ms": {name: x for name, x in ms.items() if name != "ours"}, "agrees": agrees[best], "failed": failed,
        "kernels_ms": {name: span.kernels for name, span in spans.items()}, "clock_mhz": clock_mhz(), "checked": True,
    }  # fmt: skip


def agreement(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Of lists: the mean share of our tokens that theirs have. Of attention: 1 less the relative error."""
    if ours.size != theirs.size:
        return 0.0
    if not np.issubdtype(ours.dtype, np.integer):
        ours, theirs = ours.astype(np.float32).ravel(), theirs.astype(np.float32).ravel()
        return float(1 - np.linalg.norm(ours - theirs) / np.linalg.norm(ours))
    ours, theirs = (x.reshape(-1, x.shape[-1]) for x in (ours, theirs))
    rows = np.unique(np.linspace(0, len(ours) - 1, _COMPARED, dtype=int))
    lists = [(a[a >= 0], b[b >= 0]) for a, b in zip(ours[rows], theirs[rows], strict=True)]
    return float(np.mean([len(np.intersect1d(a, b)) / max(len(a), len(b), 1) for a, b in lists]))


def _joined(spans: list[Span]) -> Span:
    return Span(ms=[ms for span in spans for ms in span.ms], kernels=spans[0].kernels)


def events_by_torch(torch: Any) -> Callable[[Callable[[], None]], list[Event]]:
    """What runs on the GPU meanwhile, of both frameworks, by torch's profiler."""

    def record(run: Callable[[], None]) -> list[Event]:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            run()
            torch.cuda.synchronize()
        found = [x for x in profile.events() if str(x.device_type).endswith("CUDA")]
        return sorted(Event(1e3 * x.time_range.start, 1e3 * x.time_range.end, x.name) for x in found)

    record(lambda: torch.zeros(1, device="cuda"))  # a first profile may lack what ran while it started
    return record


def graphed(torch: Any, call: Call) -> Side:
    """A torch call as one CUDA graph, so that its kernels follow each other without the host."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # what is compiled, tuned or planned in a first call is not captured
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # JAX's threads may call CUDA meanwhile
        out = call()

    def replay() -> None:
        graph.replay()
        torch.cuda.synchronize()

    replay()
    result = out.float() if out.is_floating_point() else out
    return Side(replay, result.cpu().numpy())


def label(x: dict[str, Any]) -> str:
    """A row's name in tables."""
    return f"{x['row']} {x['shape']} {shapes.label(x['context'])}"
