"""Loads checkpoints with a fault in one file, and shows how each load ends.

Right are two ends: an error that is meant for the user and names the file, and the key if the fault has one; or, where
the fault bears on nothing, the same model to the last bit of every parameter. Each load is timed, its memory traced.
"""

import argparse
import dataclasses
import json
import random
import shutil
import signal
import tempfile
import time
import tracemalloc
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from rich.console import Console

from bench import options
from bench.files.faults import CONFIG, OUTSIDE, SHARD, TOKENIZER, Fault, faults
from hisa_jax import models
from hisa_jax.models.tokens import load_tokenizer

_CHECKPOINT = Path(__file__).parents[2] / "tests" / "golden" / "fp8_loader"
_MIB = 1 << 20
# Errors that say to the user what to do; subclasses of them, such as JSONDecodeError, do not.
_MEANT = (ValueError, TypeError, models.CheckpointError, FileNotFoundError)
# Settings that bear on nothing that this model computes: its index keys are not quantised.
_WITHOUT_EFFECT = ("eos_token_ids", "num_nextn_predict_layers", "max_position_embeddings", "index_key_scale")
_TEXT = "a b a"


@dataclasses.dataclass(frozen=True)
class Result:
    """How a load ended.

    Attributes:
        fault: what was wrong.
        outcome: "refused", "harmless", or why neither is so.
        error: what the user reads.
        seconds: CPU time, some times as long as without the tracing of memory.
        peak_bytes: what Python and NumPy allocated at most.
    """

    fault: Fault
    outcome: str
    error: str
    seconds: float
    peak_bytes: int

    @property
    def is_right(self) -> bool:
        return self.outcome in ("refused", "harmless")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seed", type=int, default=0, help="places bytes, and draws (default: %(default)s)")
    parser.add_argument("--faults", type=options.whole(1, 10**6), metavar="N", help="how many to try; default: all")
    parser.add_argument(
        "--seconds", type=options.positive, default=60.0, help="after which a load is stopped (default: %(default)s)"
    )
    parser.add_argument(
        "--mib", type=options.positive, default=1024.0, help="of one load at most (default: %(default)s)"
    )


def run(args: argparse.Namespace) -> int:
    console = Console(width=160)
    chosen = faults(args.seed)
    if args.faults is not None and args.faults < len(chosen):
        chosen = random.Random(args.seed).sample(chosen, args.faults)
    results = try_all(chosen, args.seconds)
    for file, part in by_file(results).items():
        ends = Counter(result.outcome if result.is_right else "wrong" for result in part)
        counts = ", ".join(f"{count} {end}" for end, count in sorted(ends.items()))
        console.print(f"{file:34} {len(part):5} faults: {counts}")
    slowest, largest = max(results, key=lambda r: r.seconds), max(results, key=lambda r: r.peak_bytes)
    console.print(
        f"longest {slowest.seconds:.2f} s of CPU time, memory traced ({slowest.fault.name})",
        highlight=False,
        markup=False,
    )
    console.print(
        f"most memory {largest.peak_bytes / _MIB:.0f} MiB ({largest.fault.name})", highlight=False, markup=False
    )
    wrong = [result for result in results if not result.is_right or result.peak_bytes > args.mib * _MIB]
    for result in wrong:
        console.print(
            f"WRONG {result.fault.name}: {result.outcome}: {result.error[:300]}", highlight=False, markup=False
        )
    console.print(f"{len(results)} faults, seed {args.seed}: {len(wrong)} wrong")
    return 1 if wrong else 0


def by_file(results: Sequence[Result]) -> dict[str, list[Result]]:
    """Results by the file that the fault was in."""
    found: dict[str, list[Result]] = {}
    for result in results:
        found.setdefault(result.fault.file, []).append(result)
    return found


def try_all(chosen: Sequence[Fault], seconds: float) -> list[Result]:
    """Loads a checkpoint once for each fault.

    Args:
        chosen: the faults.
        seconds: after which a load is stopped and counts as wrong.
    """
    with tempfile.TemporaryDirectory() as outer:
        good = _write(Path(outer) / "good")
        wanted = _load(good)
        # What a name that leads out of the folder might find.
        shutil.copy(good / SHARD, Path(outer) / OUTSIDE)
        return [_try(fault, good, Path(outer) / "bad", wanted, seconds) for fault in chosen]


def _write(folder: Path) -> Path:
    shutil.copytree(_CHECKPOINT, folder, ignore=shutil.ignore_patterns("*.npz", "blocks*", "meta*"))
    model = {"type": "WordLevel", "vocab": {"a": 0, "b": 1}, "unk_token": "a"}
    parts = {"pre_tokenizer": {"type": "Whitespace"}, "normalizer": None, "post_processor": None, "decoder": None}
    keys: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        **parts,
        "model": model,
    }
    (folder / TOKENIZER).write_text(json.dumps(keys))
    return folder


def _load(folder: Path) -> tuple[models.Config, dict[str, np.ndarray], list[int]]:
    """All that comes of a folder: config, parameters, how its tokenizer takes a text."""
    config = models.read_config(folder)
    tokens = load_tokenizer(folder, config.vocab_size).encode(_TEXT)
    state = nnx.state(models.from_pretrained(folder, config=config))
    return config, {str(path): np.asarray(x) for path, x in jax.tree.leaves_with_path(state)}, tokens


def _try(fault: Fault, good: Path, bad: Path, wanted: tuple, seconds: float) -> Result:
    shutil.copytree(good, bad)
    error = ""
    try:
        fault.make(bad)
        tracemalloc.start()
        start = time.process_time()
        try:
            with _stopped_after(seconds):
                outcome = _compared(_load(bad), wanted)
        except BaseException as caught:
            if isinstance(caught, KeyboardInterrupt):
                raise
            outcome, error = _judged(caught, fault, bad), f"{type(caught).__name__}: {caught}"
        took = time.process_time() - start
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
        shutil.rmtree(bad)
    return Result(fault, outcome, error, took, peak)


def _compared(got: tuple, wanted: tuple) -> str:
    (config, parameters, tokens), (right, values, ids) = got, wanted
    same = dataclasses.replace(config, **{name: getattr(right, name) for name in _WITHOUT_EFFECT})
    if same != right:
        return f"another model: {config}"
    if tokens != ids:
        return f"other tokens: {tokens}"
    if parameters.keys() != values.keys() or not all(np.array_equal(parameters[name], values[name]) for name in values):
        return "other parameters"
    return "harmless"


def _judged(error: BaseException, fault: Fault, folder: Path) -> str:
    if type(error) not in _MEANT:
        return f"a bare {type(error).__name__}"
    message = str(error)
    if str(folder) not in message:
        return "an error that does not name the file"
    # A size that does not fit the tensors is found at the first of them.
    names_tensor = fault.file == CONFIG and ("model." in message or "lm_head." in message)
    if fault.key not in message and not names_tensor:
        return f"an error that does not name {fault.key}"
    return "refused" if len(message) < 2000 else "an error of more than 2000 letters"


@contextmanager
def _stopped_after(seconds: float) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise TimeoutError(f"still loading after {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
