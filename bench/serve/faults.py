"""Faults that a server's bookkeeping might make, put into the tables and lengths of a running one.

Each must end in the empty selection of its request alone, the others' bit for bit as without it, and under
`hj.checked` in an error that names it; or be refused by the bookkeeping before anything runs.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

import hisa_jax as hj
from bench.serve.small import make_engine, traffic
from hisa_jax.models.engine import Engine
from hisa_jax.page_pool import OutOfPages

_VICTIM = 0
_select = jax.jit(hj.select_paged, static_argnames="method")


@dataclasses.dataclass(frozen=True)
class Result:
    """What came of a fault: `outcome` in words, `error` what the user reads."""

    fault: str
    outcome: str
    error: str
    is_right: bool


def inject(seed: int, method: hj.Method) -> list[Result]:
    """Runs a few requests, stops in the middle, and injects every fault; `method` selects from the faulty tables."""
    engine = make_engine(seed, "float32", 4, 60, 0, trace=False)
    for prompt, _ in list(traffic(4, seed)):
        engine.submit(prompt, 24)
    running = engine.scheduler.running
    # Until all four have made a few tokens.
    while len(running) < 4 or min(len(request.tokens) - request.n_prompt for request in running.values()) < 4:
        engine.step()
    return [*_in_selection(engine, method), *_in_bookkeeping(engine)]


def _in_selection(engine: Engine, method: hj.Method) -> Iterator[Result]:
    requests, size = list(engine.scheduler.running), engine.pool.page_size
    tables = engine.pool.table(requests, engine.scheduler.max_pages)
    lengths = np.array([engine.pool.lengths[request] for request in requests], np.int32)
    rng, cache, R = np.random.default_rng(0), engine.pages[0], len(requests)
    H, D = engine.model.config.index_n_heads, engine.model.config.index_head_dim
    q, w = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((R, H, D), (R, H)))
    starts = jnp.arange(R + 1, dtype=jnp.int32)
    right = _select(q, w, cache, jnp.asarray(tables), starts, jnp.asarray(lengths), method)
    # One token more than its last page holds.
    last = -(-int(lengths[_VICTIM]) // size) - 1
    unwritten = last * size + int(cache.counts[tables[_VICTIM, last]]) + 1

    def table(*changes: tuple[int, int]) -> np.ndarray:
        changed = tables.copy()
        for place, page in changes:
            changed[_VICTIM, place] = page
        return changed

    def length(n: int) -> np.ndarray:
        return np.where(np.arange(R) == _VICTIM, n, lengths).astype(np.int32)

    first = tables[_VICTIM]
    for fault, bad_tables, bad_lengths in (
        ("table cut short", table((last, -1)), lengths),
        ("page beyond the cache", table((0, engine.pool.n_pages)), lengths),
        ("one page twice", table((1, first[0])), lengths),
        ("two pages exchanged", table((0, first[1]), (1, first[0])), lengths),
        ("length beyond what was written", tables, length(unwritten)),
        ("length beyond the pages", tables, length((last + 1) * size + 1)),
        ("length beyond the table", tables, length(engine.scheduler.max_pages * size + 1)),
        ("negative length", tables, length(-1)),
    ):
        arrays = q, w, cache, jnp.asarray(bad_tables), starts, jnp.asarray(bad_lengths)
        got = _select(*arrays, method)
        is_empty = int(got.count[_VICTIM]) == 0 and bool(jnp.all(got.indices[_VICTIM] == -1))
        others = np.arange(R) != _VICTIM
        is_same = np.array_equal(np.asarray(got.indices)[others], np.asarray(right.indices)[others])
        error = _error_of(functools.partial(hj.checked(_select), *arrays, method))
        outcome = "selects nothing, the others as before" if is_empty and is_same else "WRONG SELECTION"
        yield Result(fault, outcome, error, is_empty and is_same and error.startswith("select_paged: "))


def _in_bookkeeping(engine: Engine) -> Iterator[Result]:
    request, pool = next(iter(engine.scheduler.running)), engine.pool
    for fault, call, kind in (
        ("more tokens than pages", lambda: pool.extend(request, pool.n_pages * pool.page_size), OutOfPages),
        ("fork of more than there is", lambda: pool.fork(request, "new", 10_000), ValueError),
        ("truncated to more than there is", lambda: pool.truncate(request, 10_000), ValueError),
        ("a request of a name there is", lambda: pool.add(request), ValueError),
        ("a table too narrow", lambda: pool.table([request], 1), ValueError),
        ("a prompt longer than any may be", lambda: engine.submit([0] * 10_000, 1), ValueError),
    ):
        before = dict(pool.lengths), pool.n_free
        error = _error_of(call, kind)
        pool.check()
        is_right = bool(error) and before == (pool.lengths, pool.n_free)
        yield Result(fault, "refused, nothing changed" if is_right else "NOT REFUSED", error, is_right)


def _error_of(call: Callable[[], object], kind: type[Exception] = Exception) -> str:
    try:
        call()
    except kind as error:
        return str(error).splitlines()[0].removesuffix(" (`check` failed)")
    return ""


def show(console: Console, results: list[Result]) -> None:
    table = Table(title="Injected faults", title_justify="left", box=box.SIMPLE, pad_edge=False, show_edge=False)
    for column in ("fault", "outcome", "error"):
        table.add_column(column)
    for result in results:
        table.add_row(result.fault, result.outcome, result.error or "NONE", style="" if result.is_right else "bold red")
    console.print(table, markup=False)
