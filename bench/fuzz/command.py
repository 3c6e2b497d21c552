"""Fuzzes selection and sparse attention: all methods, dtypes and forms, over values and edges that find faults.

Case i of a seed is always the same, on every machine: `--case` runs one again. Shapes are few and compiled once, all
else of a case is traced, so a case of some 60 queries in four forms takes a tenth of a second once its programs are
compiled (docs/reliability.md has figures). What is wrong is made small and written as a program of its own.
"""

import argparse
import dataclasses
import json
import os
import time
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich import box
from rich.console import Console
from rich.progress import Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from bench import UserError, options
from bench.fuzz import draw, entries, mla, repro
from bench.fuzz import judges as fuzz_judges
from bench.fuzz import setups as fuzz_setups
from bench.fuzz import shrink as fuzz_shrink
from bench.fuzz.judges import Judge
from bench.fuzz.setups import MlaSetup, Setup
from bench.records import device

_SHRINK_SECONDS = 20.0
_MOST_SHOWN = 5  # faults that are made small; the others are counted


@dataclasses.dataclass(frozen=True, order=True)
class Line:
    """What is counted: queries of a form, by whom they were judged."""

    form: str
    method: str
    dtype: str
    judge: str


@dataclasses.dataclass
class Counts:
    """Rows so far, by line, and the faults that were made small."""

    rows: Counter[Line] = dataclasses.field(default_factory=Counter)
    wrong: Counter[Line] = dataclasses.field(default_factory=Counter)
    faults: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    cases: int = 0

    @property
    def n_rows(self) -> int:
        """Queries that the oracle judged: a query counts once in each form."""
        return sum(n for line, n in self.rows.items() if line.judge == "oracle")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    def number(name: str, least: int, most: int, default: int | None, meaning: str) -> None:
        shown = "" if default is None else " (default: %(default)s)"
        parser.add_argument(name, type=options.whole(least, most), default=default, metavar="N", help=meaning + shown)

    parser.add_argument(
        "--minutes", type=options.positive, default=1.0, metavar="N", help="how long (default: %(default)s)"
    )
    number("--cases", 1, 10**9, None, "stop after so many cases, however long they take")
    number("--seed", 0, 2**31 - 1, 0, "of all cases")
    number("--case", 0, 10**9, None, "run this case alone")
    number("--devices", 1, 16, 1, "emulated devices for the sharded forms; 1: none of them")
    parser.add_argument(
        "--implementation", choices=("xla", "triton", "mosaic_gpu", "mosaic_tpu"), default="xla",
        help="kernels without their device are interpreted, some rows a second (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--out", type=Path, default=Path("fuzz_out"), metavar="DIR", help="for reproductions (default: %(default)s)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all counts")


def run(args: argparse.Namespace) -> int:
    if args.json and not args.json.parent.is_dir():  # before the run, not after it
        raise UserError(f"--json {args.json}: {args.json.parent} is no folder")
    if args.devices > 1:
        try:
            jax.config.update("jax_num_cpu_devices", args.devices)
        except RuntimeError as error:
            raise UserError(f"--devices {args.devices}: JAX has started already") from error
    if args.implementation == "mosaic_gpu":
        # Its interpreter blocks a thread for each warp-group that waits. Read when the CPU backend starts.
        os.environ.setdefault("NPROC", "32")
    fuzz_setups.interpret(args.implementation)
    console, counts, start = Console(), Counts(), time.monotonic()
    if not console.is_terminal:
        console.width = 120
    cases = range(args.case, args.case + 1) if args.case is not None else range(args.cases or 10**9)
    until = start + 60 * args.minutes if args.case is None and args.cases is None else float("inf")
    setups = fuzz_setups.all_of(args.implementation, args.devices)
    with Progress(TextColumn("{task.description}"), TimeElapsedColumn(), console=console) as progress:
        bar = progress.add_task("", total=None)
        try:
            for i in cases:
                if time.monotonic() >= until:
                    break
                setup = setups[i % len(setups)]
                progress.update(bar, description=f"case {i}: {setup.kind} {setup.dtype}; {_state(counts)}")
                judge_case(setup, args.seed, i, counts, args.out, console)
        except KeyboardInterrupt:
            console.print("Stopped; what was done until then:")
    minutes = (time.monotonic() - start) / 60
    _show(console, counts)
    summary = f"{args.implementation}, seed {args.seed}: {counts.cases} cases, {_state(counts)}, {minutes:.1f} minutes"
    console.print(summary, highlight=False, markup=False, soft_wrap=True)
    if args.json:
        args.json.write_text(json.dumps(_as_json(args, counts, minutes), indent=2) + "\n")
    return 1 if counts.wrong.total() else 0


def judge_case(setup: Setup | MlaSetup, seed: int, i: int, counts: Counts, out: Path, console: Console) -> None:
    """Draws case i and lets each judge of its share look at every form."""
    rng = np.random.default_rng([seed, i])
    drawn = int(rng.integers(2**31))
    judges: dict[str, Judge] = fuzz_judges.JUDGES | entries.JUDGES if isinstance(setup, Setup) else mla.JUDGES
    scene: Any = draw.scene(setup, drawn) if isinstance(setup, Setup) else mla.scene(setup, drawn)
    counts.cases += 1
    for name, judge in judges.items():
        is_asked = rng.random() < judge.share
        for form in scene.forms if is_asked else ():
            if not judge.applies(scene, form):
                continue
            verdict = judge.judge(scene, form)
            line = Line(form, setup.kind, setup.dtype, name)
            counts.rows[line] += verdict.rows
            if verdict.wrong:
                counts.wrong[line] += len(verdict.wrong)
                if len(counts.faults) < _MOST_SHOWN and not _is_known(counts, line):
                    _reproduce(scene, line, judge, seed, i, counts, out, console)


def _is_known(counts: Counts, line: Line) -> bool:
    """Whether a fault like it was made small already, in whatever form."""
    return any(fault["line"] | {"form": ""} == dataclasses.asdict(line) | {"form": ""} for fault in counts.faults)


def _reproduce(
    scene: Any, line: Line, judge: Judge, seed: int, i: int, counts: Counts, out: Path, console: Console
) -> None:
    start = time.monotonic()
    small, verdict = fuzz_shrink.shrink(scene, line.form, judge, _SHRINK_SECONDS)
    name = f"{small.setup.implementation}_seed{seed}_case{i}_{line.form}_{line.judge}".replace(" ", "_")
    what = f"{line.form} of {line.method} {line.dtype} by {line.judge}"
    title = f"{small.setup.implementation}, seed {seed}, case {i}: {what}"
    program = repro.write(small, line.form, name, judge, title, out)
    counts.faults.append(
        {"line": dataclasses.asdict(line), "case": i, "why": verdict.wrong[0].why, "file": str(out / f"{name}.py")}
    )
    found = f"WRONG, made small in {time.monotonic() - start:.1f} s, written to {out / name}.py:"
    console.print(found, style="bold red", highlight=False, markup=False, soft_wrap=True)
    console.print(program, highlight=False, markup=False, soft_wrap=True)


def _state(counts: Counts) -> str:
    judged = counts.rows.total()
    return f"{counts.n_rows:,} rows against the oracle, {judged:,} judgements of rows, {counts.wrong.total():,} wrong"


def _show(console: Console, counts: Counts) -> None:
    """Rows tried and wrong: by form, method and dtype, and by judge; --json has each line."""
    console.print(_table(counts, "form", "method", "dtype"))
    console.print(_table(counts, "judge"))


def _table(counts: Counts, *by: str) -> Table:
    table = Table(box=box.SIMPLE, pad_edge=False, show_edge=False)
    for column in by:
        table.add_column(column, no_wrap=True)
    for column in ("rows judged", "wrong", "by"):
        table.add_column(column, justify="left" if column == "by" else "right")
    groups: dict[tuple[str, ...], list[Line]] = {}
    for line in sorted(counts.rows):
        groups.setdefault(tuple(getattr(line, name) for name in by), []).append(line)
    for names, lines in groups.items():
        rows, wrong = (sum(counter[line] for line in lines) for counter in (counts.rows, counts.wrong))
        judges = ", ".join(dict.fromkeys(line.judge for line in lines if counts.wrong[line]))
        table.add_row(*names, f"{rows:,}", f"{wrong:,}", judges, style="bold red" if wrong else "")
    return table


def _as_json(args: argparse.Namespace, counts: Counts, minutes: float) -> dict[str, Any]:
    lines = [
        {**dataclasses.asdict(line), "rows": n, "wrong": counts.wrong[line]} for line, n in sorted(counts.rows.items())
    ]
    return {
        "row": "fuzz", **device(), "implementation": args.implementation, "seed": args.seed, "devices": args.devices,
        "cases": counts.cases, "rows": counts.n_rows, "judgements": counts.rows.total(),
        "wrong": counts.wrong.total(), "minutes": minutes, "lines": lines, "faults": counts.faults,
    }  # fmt: skip
