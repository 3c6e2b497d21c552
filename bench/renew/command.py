"""`python -m bench renew`: measures what the documents publish of NVIDIA GPUs, in the minutes that there are.

Jobs run side by side, a GPU each or as many as they take: first those whose figures are not there, or are of other code
than this. Each row stands in its result file as soon as it is measured; the others there stay. A row that fails or
hangs costs itself alone. A line tells how each job ended, its log the rest.
"""

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jaxlib
from rich.console import Console
from rich.table import Table

from bench import UserError, options, records
from bench.renew import queue
from bench.renew.job import Job
from bench.renew.jobs import jobs, tests
from bench.renew.plan import CURRENT, Planned, only, plan
from bench.renew.process import Ended

_BEFORE_S = 10.0  # that all ends before the minutes are over


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--minutes", type=options.positive, metavar="N",
        help="from the start of this command: what cannot end in them does not start, and all has ended 10 s before",
    )  # fmt: skip
    parser.add_argument(
        "--only",
        nargs="+",
        metavar="PATTERN",
        help="jobs by the names of --plan, or rows of them: 'layer:*' 'gpu:scan:*:64K:*'; with --tests also tests",
    )
    parser.add_argument("--due", action="store_true", help="leave out figures that are of this code")
    parser.add_argument(
        "--tests", action="store_true", help="first those of tests/gpu that need a GPU, on all GPUs together"
    )
    parser.add_argument("--plan", action="store_true", help="print the jobs, and measure nothing; needs no GPU")
    parser.add_argument(
        "--results", type=Path, default=records.RESULTS, metavar="DIR",
        help="where result files are; those that are not begin as copies of bench/results (default: bench/results)",
    )  # fmt: skip
    parser.add_argument(
        "--logs", type=Path, default=records.ROOT / "build" / "renew", metavar="DIR",
        help="a file a process (default: build/renew)",
    )  # fmt: skip
    parser.add_argument("--commit", metavar="HASH", help="of the code, where a copy of it has no .git")
    parser.add_argument("--topk-library", type=Path, metavar="FILE", help="sglang's top-k for peers (docs/peers.md)")


def run(args: argparse.Namespace) -> int:
    ends_at = None if args.minutes is None else time.monotonic() - _age_s() + 60 * args.minutes - _BEFORE_S
    jax.config.update("jax_platforms", "cpu")  # the GPUs are the jobs'
    gpus, commit = _gpus(), args.commit or records.commit()
    if commit is None:
        print("the commit is not known, so rows do not tell it: git says nothing of this folder; --commit does")
    chosen = [*([tests(max(len(gpus), 1), os.cpu_count() or 1)] if args.tests else []), *jobs(args.topk_library)]
    if args.only is not None:
        chosen = only(chosen, [*args.only, *(["tests"] if args.tests else [])])
    results = args.results.resolve()
    planned = plan(chosen, (results, records.RESULTS), commit, gpus[0][1] if gpus else None)
    if args.due:
        planned = [part for part in planned if part.is_due]
    if args.plan:
        _show(planned, commit)
        return 0
    if not gpus:
        raise UserError("needs an NVIDIA GPU, nvidia-smi shows none here; --plan needs none")
    todo = [part.job for part in planned]
    for folder in (results, args.logs):
        folder.mkdir(parents=True, exist_ok=True)
    _copy_results({job.file for job in todo if job.file}, results)
    place = queue.Place(
        gpus=tuple(name for name, _ in gpus), ends_at=ends_at, results=results, logs=args.logs.resolve(),
        environment=_environment() | ({records.COMMIT: args.commit} if args.commit else {}),
    )  # fmt: skip
    with _as_an_interrupt(signal.SIGTERM):
        ended, waiting = queue.run(todo, place, lambda line: print(line, flush=True))
    return _summary(ended, waiting, place)


def _age_s() -> float:
    """Seconds since this process was started: a machine's minutes begin before Python has read its modules."""
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        return time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError):  # not on Linux
        return 0.0


def _gpus() -> list[tuple[str, str]]:
    """Each GPU that jobs may use: its number or name for CUDA_VISIBLE_DEVICES, and its kind."""
    command = ["nvidia-smi", "--query-gpu=index,uuid,name", "--format=csv,noheader"]
    try:
        lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        return []
    found = [(index, uuid, kind) for index, uuid, kind in (line.split(", ", 2) for line in lines if line)]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [index for index, *_ in found] if visible is None else [x.strip() for x in visible.split(",") if x.strip()]
    kinds = {name: kind for index, uuid, kind in found for name in (index, uuid)}
    if unknown := [name for name in names if name not in kinds]:
        raise UserError(f"CUDA_VISIBLE_DEVICES={visible}: nvidia-smi shows no {', '.join(unknown)}")
    return [(name, kinds[name]) for name in names]


def _environment() -> dict[str, str]:
    """Of all jobs: programs that one has compiled the others need not, and GPUs are numbered as nvidia-smi does."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(home / "hisa_jax" / f"jaxlib-{jaxlib.__version__}"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    return cache | os.environ | {"PYTHONUNBUFFERED": "1", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}


def _copy_results(files: set[str], folder: Path) -> None:
    for name in files:
        if not (folder / name).exists() and (records.RESULTS / name).exists():
            shutil.copy(records.RESULTS / name, folder / name)


@contextlib.contextmanager
def _as_an_interrupt(number: signal.Signals) -> Iterator[None]:
    """This signal ends all jobs, as Ctrl-C does, not this process alone."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(number, interrupt)
    try:
        yield
    finally:
        signal.signal(number, before)


def _summary(ended: Sequence[Ended], waiting: Sequence[Job], place: queue.Place) -> int:
    """Prints what was not started and how many rows were measured; the exit status, 1 if a job failed or hung."""
    n_gpus = len(place.gpus) - sum(end.job.gpus - len(end.gpus) for end in ended)  # without those that are lost
    refused = {end.job.name for end in ended if end.is_refused}
    for job in waiting:
        why = "lack of time" if job.gpus <= n_gpus else f"lack of GPUs: it takes {job.gpus}, of {n_gpus}"
        why = "what it failed of above" if job.name in refused else why
        rows = f" {len(job.figures)} rows" if job.figures else ""
        print(f"{job.name:20} skipped{rows}, {job.seconds:.0f} s, for {why}")
    measured = sum(len(end.measured) for end in ended)
    bad = [end for end in ended if end.how in ("failed", "hung")]
    print(f"{measured} rows measured into {place.results}; {len(bad)} jobs failed or hung; logs in {place.logs}")
    return 1 if bad else 0


def _show(planned: Sequence[Planned], commit: str | None) -> None:
    """A line a job, in their order."""
    table = Table("job", "rows", "GPUs", "seconds", "figures are", "oldest", "file", box=None, pad_edge=False)
    for part in planned:
        job = part.job
        oldest = min(part.dates, default="")
        table.add_row(
            job.name, str(len(job.figures)), str(job.gpus), f"{job.seconds:.0f}", part.count, oldest, job.file
        )
    Console(width=160 if not os.isatty(1) else None).print(table)
    total = sum(part.job.seconds * part.job.gpus for part in planned)
    due = sum(state != CURRENT for part in planned for state in part.states)
    rows = sum(len(part.states) for part in planned)
    print(f"{due} of {rows} rows are due; about {total / 60:.0f} minutes of one GPU; code: {commit or 'not known'}")
