"""A server in small: requests with shared prefixes arrive, are read in chunks, decode, finish, and give pages back.

The model is a random one of three layers, two of which select by HISA or the scan; the traffic is drawn from a seed.
What is measured is the loop (models/engine.py) on this machine, not a model. `--verify` compares every selection of
every layer with the NumPy oracle on keys recorded beside the cache, and counts pages that were not given back.
`--mesh` serves on several devices; on a CPU they are emulated. `--config` takes layers of a published model at their
real widths and long prompts instead, and measures the flat indexer, HISA and the scan in turn.
"""

import argparse
import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import hisa_jax as hj
from bench import UserError, options
from bench.records import device
from bench.serve import contexts, engine_faults
from bench.serve import faults as serve_faults
from bench.serve.check import Recorder, is_tie
from bench.serve.mesh import make_mesh, mesh_sizes
from bench.serve.small import METHODS, make_engine, small_server, traffic
from hisa_jax.models.engine import Engine

_ARRIVALS = 1.5  # requests a step
_LONGEST = 20  # steps after which a request that is to be cancelled is, at the latest


@dataclasses.dataclass(kw_only=True)
class Counts:
    """What happened so far."""

    steps: int = 0
    finished: int = 0
    cancelled: int = 0
    prompt_tokens: int = 0
    shared_tokens: int = 0
    new_tokens: int = 0
    proposed: int = 0
    accepted: int = 0
    peak_pages: int = 0
    seconds: float = 0.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    def number(name: str, least: int, most: int, default: int, meaning: str) -> None:
        help = f"{meaning} (default: %(default)s)"
        parser.add_argument(name, type=options.whole(least, most), default=default, metavar="N", help=help)

    number("--requests", 1, 1_000_000, 100, "how many arrive")
    number("--rows", 1, 1024, 8, "requests that decode at a time")
    number("--pages", 12, 1_000_000, 80, "pages in each group of data, of 16 tokens, of 64 for the scan")
    number("--draft", 0, 7, 3, "tokens proposed and verified a step, by looking up what followed before; 0: none")
    number("--seed", 0, 2**31 - 1, 0, "of the weights and the traffic")
    parser.add_argument("--indexer", choices=METHODS, default="hisa", help="what selects (default: %(default)s)")
    parser.add_argument("--sketch", choices=("int4",), help="what pages keep and a scan reads in place of the keys")
    parser.add_argument("--keys", choices=("float32", "float8_e4m3fn", "int8"), default="float32", help="index keys")
    parser.add_argument("--verify", action="store_true", help="compare every selection with the oracle, count leaks")
    parser.add_argument("--faults", action="store_true", help="afterwards inject faults into small servers")
    number("--cancels", 0, 100, 0, "of a hundred requests, so many are cancelled on the way")
    parser.add_argument(
        "--mesh", type=mesh_sizes, metavar="AXES", help="devices, for instance data=2,model=2,context=2; default: one"
    )
    parser.add_argument("--config", choices=sorted(contexts.CONFIGS), help="layers of this model at their real widths")
    number("--layers", 1, 100, 2, "how many of its layers, from the first on")
    parser.add_argument(
        "--contexts", type=options.context, nargs="+", default=[32 * 1024, 128 * 1024], metavar="N",
        help="tokens of a request of --config (default: 32K and 128K)",
    )  # fmt: skip
    parser.add_argument(
        "--methods", choices=contexts.METHODS, nargs="+", default=contexts.METHODS,
        help="what selects with --config, one after the other (default: all)",
    )  # fmt: skip
    parser.add_argument("--page-size", type=int, choices=(64, 128), help="tokens of a page of --config (default: 64)")
    parser.add_argument("--attention-only", action="store_true", help="--config without its MLPs and experts")
    number("--chunk", 1, 65536, 2048, "prompt tokens of a pass of --config")
    number("--new", 5, 4096, 16, "tokens that a request of --config makes")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="write the result as JSON; with --config each row, among others"
    )


def run(args: argparse.Namespace) -> int:
    console = Console()
    mesh = None if args.mesh is None else make_mesh(*args.mesh)
    if args.config is not None:
        if args.verify or args.faults:
            raise UserError("--config with --verify or --faults, wanted them without: the oracle is not made for it")
        load = contexts.Load(requests=args.rows, n_new=args.new, chunk=args.chunk, page_size=args.page_size)
        sizes = args.config, args.layers, args.contexts, args.methods
        only: Any = dict(attention_only=args.attention_only)
        return contexts.run(*sizes, load, mesh, args.seed, args.out, console, **only)
    if args.page_size is not None or args.attention_only:
        what = "--attention-only" if args.page_size is None else f"--page-size={args.page_size}"
        raise UserError(f"{what} without --config, wanted one of its models")
    method = METHODS[args.indexer]
    if args.sketch is not None:
        if not isinstance(method, hj.Scan):
            raise UserError(f"--sketch={args.sketch} with --indexer={args.indexer}, wanted --indexer=scan")
        method = dataclasses.replace(method, sketch=args.sketch)
    engine = make_engine(
        args.seed, args.keys, args.rows, args.pages, args.draft, trace=args.verify, method=method, mesh=mesh
    )
    recorder, tokens = Recorder(method) if args.verify else None, dict[int, list[int]]()
    counts = serve(engine, args.requests, args.seed, recorder, console, args.cancels / 100, tokens)
    engine.release()
    engine.pool.check()
    leaked, shape = engine.pool.n_pages - engine.pool.n_free, None if mesh is None else dict(mesh.shape)
    row = {
        "row": "serve", **device(), "requests": args.requests, "rows": args.rows, "pages": args.pages,
        "page_size": engine.pool.page_size, "mesh": shape, "draft": args.draft, "indexer": args.indexer,
        "sketch": args.sketch, "keys": args.keys, "seed": args.seed, **dataclasses.asdict(counts),
        "tokens_per_s": counts.new_tokens / counts.seconds, "leaked_pages": leaked,
    }  # fmt: skip
    if recorder:
        row |= {"selections_checked": recorder.n_checked, "mismatches": len(recorder.mismatches)}
        if mesh is not None:
            alone = make_engine(args.seed, args.keys, args.rows, args.pages, args.draft, trace=False, method=method)
            row |= compared(alone, args.requests, args.seed, tokens, console)
    _print(console, row)
    for mismatch in recorder.mismatches[:3] if recorder else ():
        console.print(mismatch, highlight=False, markup=False)
    is_right = not leaked and not row.get("mismatches") and not row.get("other_tokens")
    if args.faults:
        results = [*serve_faults.inject(args.seed, method), *engine_faults.inject(*small_server(args.seed))]
        serve_faults.show(console, results)
        row["faults"] = {result.fault: result.outcome for result in results}
        is_right &= all(result.is_right for result in results)
    if args.out:
        args.out.write_text(json.dumps(row, indent=2) + "\n")
        console.print(f"Written: {args.out}", highlight=False, markup=False, soft_wrap=True)
    return 0 if is_right else 1


def serve(
    engine: Engine, n_requests: int, seed: int, recorder: Recorder | None, console: Console, cancels: float = 0.0,
    tokens: dict[int, list[int]] | None = None,
) -> Counts:  # fmt: skip
    """Serves all requests to their ends; the time is that of the engine, the oracle's left out.

    A share of them is cancelled, each at a random step. `tokens` takes the new ones of each that is not.
    """
    requests, rng, counts = traffic(n_requests, seed), np.random.default_rng(seed + 1), Counts()
    to_cancel: list[tuple[int, int]] = []
    columns = BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("", total=n_requests)
        while requests or not engine.is_idle:
            for _ in range(min(rng.poisson(_ARRIVALS), len(requests))):
                prompt, n_new = requests.popleft()
                id = engine.submit(prompt, n_new)
                counts.prompt_tokens += len(prompt)
                if cancels and rng.random() < cancels:
                    to_cancel.append((counts.steps + int(rng.integers(_LONGEST)), id))
            for _, id in [one for one in to_cancel if one[0] <= counts.steps]:
                counts.cancelled += engine.cancel(id)
            to_cancel = [one for one in to_cancel if one[0] > counts.steps]
            # The clock runs in the engine alone.
            start = time.perf_counter()
            report = engine.step()
            counts.seconds += time.perf_counter() - start
            if recorder:
                recorder.check(report, engine.pool.lengths)
            counts.steps += 1
            counts.finished += len(report.finished)
            if tokens is not None:
                tokens |= report.finished
            counts.new_tokens += sum(map(len, report.finished.values()))
            counts.shared_tokens += sum(shared for _, _, shared in report.forks)
            for step in report.steps:
                if step.phase == "decode":
                    counts.proposed += sum(step.n_new) - len(step.n_new)
                    counts.accepted += sum(step.n_kept) - len(step.n_kept)
            used = engine.pool.n_pages - engine.pool.n_free
            counts.peak_pages = max(counts.peak_pages, used)
            progress.update(bar, completed=counts.finished + counts.cancelled, description=_state(engine, counts, used))
    return counts


def compared(
    alone: Engine, n_requests: int, seed: int, tokens: dict[int, list[int]], console: Console
) -> dict[str, int]:  # fmt: skip
    """The same requests on one device: how many of them have other tokens, and how many part at ties alone."""
    wanted, prompts = dict[int, list[int]](), [prompt for prompt, _ in traffic(n_requests, seed)]
    serve(alone, n_requests, seed, None, console, tokens=wanted)
    parted = [id for id, made in tokens.items() if made != wanted[id]]
    n_ties = sum(is_tie(alone.model, prompts[id], tokens[id], wanted[id]) for id in parted)
    return {"tokens_compared": len(tokens), "ties": n_ties, "other_tokens": len(parted) - n_ties}


def _state(engine: Engine, counts: Counts, used: int) -> str:
    running, waiting = len(engine.scheduler.running), len(engine.scheduler.waiting)
    return (
        f"{running} running, {waiting} waiting, {used}/{engine.pool.n_pages} pages, "
        f"{counts.new_tokens / counts.seconds:.0f} tokens/s"
    )


def _print(console: Console, row: dict[str, Any]) -> None:
    per_group = "" if row["mesh"] is None else " a group of devices"
    lines = [
        f"{row['finished']} requests in {row['steps']} steps, {row['cancelled']} cancelled",
        f"{row['new_tokens']} new tokens, {row['tokens_per_s']:.1f} tokens/s on {row['device']} "
        f"({row['cpu_cores']} CPU cores), compiling included",
        f"{row['prompt_tokens']} prompt tokens, {row['shared_tokens']} of them shared; at most {row['peak_pages']} "
        f"pages held, of {row['pages']}{per_group}; {row['accepted']} of {row['proposed']} proposed tokens accepted",
    ]
    if "mismatches" in row:
        lines.append(f"{row['selections_checked']} selections against the oracle: {row['mismatches']} mismatches")
    if "ties" in row:
        lines.append(
            f"{row['tokens_compared']} requests against one device: {row['other_tokens']} have other tokens, "
            f"{row['ties']} part at tokens that are as likely"
        )
    lines.append(f"{row['leaked_pages']} leaked pages")
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
