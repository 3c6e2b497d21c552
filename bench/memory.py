"""Peak memory of each method beyond its inputs, at a long context; and what a token takes in the pages of a cache.

Each method runs in a fresh process on the CPU. Beyond the inputs means: the most resident memory while the call ran,
less what was resident before it, when inputs and compiled code were there. Where a process may not reset its high-water
mark (/proc/self/clear_refs), the mark also holds what came before the call: then the figure is an upper bound.
"""

import argparse
import dataclasses
import gc
import multiprocessing
import re
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from rich.console import Console
from rich.table import Table

import hisa_jax as hj
from bench import UserError, options, shapes, timing

METHODS = shapes.DSV32.methods()
_MIB, _GIB = 1 << 20, 1 << 30
_PAGE = 64
_CHUNK = 1 << 20  # numbers drawn at a time: making the inputs must not take more memory than they do


@dataclasses.dataclass(frozen=True, kw_only=True)
class Footprint:
    """What one call took; `is_bound`: the peak may be less."""

    inputs_bytes: int
    peak_bytes: int
    is_bound: bool
    compile_ms: float
    run_ms: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    for name, default, least, most in (
        ("context", shapes.MAX_CONTEXT, 1, 1 << 24), ("queries", 256, 1, 1 << 20), ("heads", shapes.DSV32.H, 1, 1024),
        ("dim", shapes.DSV32.D, 1, 1024),
    ):  # fmt: skip
        kind = options.whole(least, most)
        parser.add_argument(f"--{name}", type=kind, default=default, metavar="N", help="default: %(default)s")
    parser.add_argument("--method", choices=["all", *METHODS], default="all", help="default: %(default)s")
    parser.add_argument(
        "--limit-gib",
        type=float,
        default=2.0,
        metavar="X",
        help="exit with 1 if one takes more (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    if args.queries > args.context:
        raise UserError(f"--queries {args.queries}: must be at most --context {args.context}, they are its last tokens")
    if not Path("/proc/self/status").exists():
        raise UserError("reads resident memory from /proc: needs Linux")
    names = list(METHODS) if args.method == "all" else [args.method]
    console = Console()
    title = f"{args.context:,} keys x {args.queries} queries, H = {args.heads}, D = {args.dim}, bfloat16"
    table = Table("method", "beyond inputs, MiB", "inputs, MiB", "seconds", "ms/query", "compile, s", title=title)
    failed = False
    for name in names:
        with console.status(f"{name} ..."):
            footprint = in_fresh_process(name, args.context, args.queries, args.heads, args.dim)
        failed |= footprint.peak_bytes > args.limit_gib * _GIB
        table.add_row(name, *_cells(footprint, args.queries))
    console.print(table)
    console.print(_pages_table(args.dim))
    console.print(f"{'Over' if failed else 'Within'} the limit of {args.limit_gib:g} GiB.", highlight=False)
    return int(failed)


def bytes_per_token(dtype: str, D: int, page_size: int) -> dict[str, float]:
    """What a token's key, its sketch and its share of the page's sum, means and counts take in a cache."""
    cache = jax.eval_shape(lambda: hj.init_cache(1, page_size, D, dtype, sketch="int4"))
    arrays = [field.name for field in dataclasses.fields(cache) if not field.metadata.get("static")]
    sizes = {name: getattr(cache, name) for name in arrays}
    taken = {name: leaf.size * leaf.dtype.itemsize / page_size for name, leaf in sizes.items() if leaf is not None}
    key, sketch = (
        sum(taken.pop(name, 0) for name in names) for names in (("keys", "scales"), ("codes", "code_scales"))
    )
    return {"key": key, "sketch": sketch, "page": sum(taken.values())}


def _pages_table(D: int) -> Table:
    table = Table("keys", "key", "sketch", "page's own", title=f"bytes a token in pages of {_PAGE}, D = {D}")
    for dtype in ("bfloat16", "float8_e4m3fn"):
        table.add_row(dtype, *(f"{n:g}" for n in bytes_per_token(dtype, D, _PAGE).values()))
    return table


def _cells(footprint: Footprint, n_queries: int) -> list[str]:
    bound = "<= " if footprint.is_bound else ""
    return [
        f"{bound}{footprint.peak_bytes / _MIB:.1f}", f"{footprint.inputs_bytes / _MIB:.1f}",
        f"{footprint.run_ms / 1e3:.1f}", f"{footprint.run_ms / n_queries:.2f}", f"{footprint.compile_ms / 1e3:.1f}",
    ]  # fmt: skip


def in_fresh_process(name: str, context: int, n_queries: int, H: int, D: int) -> Footprint:
    """`measure` in a process that has done nothing else."""
    with ProcessPoolExecutor(max_workers=1, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(measure, name, context, n_queries, H, D).result()
        except BrokenProcessPool as error:
            raise UserError(f"{name}: its process died, probably for want of memory") from error


def measure(name: str, context: int, n_queries: int, H: int, D: int) -> Footprint:
    jax.config.update("jax_platforms", "cpu")
    rng = np.random.default_rng(0)
    q = jnp.asarray(_normal(rng, (1, n_queries, H, D)))
    k = jnp.asarray(_normal(rng, (1, context, D)))
    w = jnp.asarray(rng.standard_normal((1, n_queries, H)), jnp.float32)
    select = jax.jit(hj.select, static_argnames="method")
    compiled, compile_ms = timing.once(lambda: select.lower(q, k, w, METHODS[name]).compile())
    gc.collect()
    before_bytes = _status_bytes("VmRSS")
    is_reset = _reset_high_water_mark()
    selection, run_ms = timing.once(lambda: compiled(q, k, w))
    peak_bytes = max(_status_bytes("VmHWM") - before_bytes, 0)
    assert int(selection.count.min()) > 0
    return Footprint(
        inputs_bytes=q.nbytes + k.nbytes + w.nbytes, peak_bytes=peak_bytes, is_bound=not is_reset,
        compile_ms=compile_ms, run_ms=run_ms,
    )  # fmt: skip


def _normal(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    result = np.empty(shape, ml_dtypes.bfloat16)
    flat = result.reshape(-1)
    for first in range(0, flat.size, _CHUNK):
        part = flat[first : first + _CHUNK]
        part[:] = rng.standard_normal(part.size, np.float32)
    return result


def _status_bytes(field: str) -> int:
    """VmRSS, resident now, or VmHWM, the most there was since the mark was reset."""
    match = re.search(rf"^{field}:\s*(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    if match is None:
        raise UserError(f"/proc/self/status has no {field}")
    return int(match[1]) * 1024


def _reset_high_water_mark() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True
