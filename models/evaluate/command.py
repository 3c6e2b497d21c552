"""The command `hisa-jax evaluate`: arguments, tasks, one run an indexer, the table."""

import argparse
import collections
import json
import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from hisa_jax.checks import optional_packages
from hisa_jax.command_line import UsageError, demand_at_least
from hisa_jax.models.config import read_config
from hisa_jax.models.evaluate import needles, results
from hisa_jax.models.locate import locate
from hisa_jax.models.options import CHECKPOINT, DTYPES
from hisa_jax.models.params import from_pretrained
from hisa_jax.models.progress import Progress
from hisa_jax.models.tokens import load_tokenizer

TASKS = Path(__file__).parent / "tasks"
_NEEDLES = "needles"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `evaluate` takes; needs lm_eval to run."""
    parser.set_defaults(run=run)
    parser.add_argument("--checkpoint", required=True, metavar="DIR", help=CHECKPOINT)
    parser.add_argument(
        "--tasks", required=True, metavar="NAMES",
        help=f"with commas between: {_NEEDLES} (or needle_{', needle_'.join(needles.KINDS)}), any task of lm-eval",
    )  # fmt: skip
    parser.add_argument(
        "--indexers", default="flat,hisa,scan", metavar="NAMES",
        help="with commas between: flat, hisa, scan, block-sparse, files of a method a layer (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--lengths", type=int, nargs="+", metavar="N", help="tokens of needle and RULER questions")
    parser.add_argument(
        "--limit", type=int, default=needles.QUESTIONS, metavar="N",
        help="questions of a task and length at most (default: %(default)s); 0: all that lm-eval has",
    )  # fmt: skip
    parser.add_argument("--text", metavar="PATH", help="to hide needles in (default: Python's standard library)")
    parser.add_argument("--style", choices=needles.STYLES, default="lines", help="of needles (default: %(default)s)")
    parser.add_argument("--include", type=Path, metavar="DIR", help="more tasks, as YAML of lm-eval")
    parser.add_argument("--num-fewshot", type=int, metavar="N", help="examples before a question; default: the task's")
    parser.add_argument("--chat", action="store_true", help="ask by the checkpoint's chat template")
    parser.add_argument("--batch", type=int, default=4, metavar="N", help="requests at a time (default: %(default)s)")
    parser.add_argument("--chunk", type=int, default=512, metavar="N", help="tokens a pass (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of needles and examples (default: %(default)s)")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="default: %(default)s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every question's value")


def run(options: argparse.Namespace) -> int:
    """Asks, shows; 1 if a task could not be asked."""
    demand_at_least(options, limit=0, batch=1, chunk=1)
    if options.json and not options.json.parent.is_dir():  # before the run, not after it
        raise UsageError(f"--json {options.json}: {options.json.parent} is no folder")
    with optional_packages():
        from hisa_jax.models.evaluate import harness
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    folder = locate(options.checkpoint)
    config = read_config(folder)
    load_tokenizer(folder, config.vocab_size)  # refused before the weights are read
    for length in options.lengths or ():
        if not 1 <= length <= config.max_position_embeddings:
            raise UsageError(f"--lengths {length}: wanted 1 to {config.max_position_embeddings}, the model's positions")
    try:
        methods = {name: harness.method_of(name, config) for name in _names(options.indexers, "--indexers")}
    except FileNotFoundError as error:
        raise UsageError(f"--indexers: {error}") from error
    loaded, missing = _load(options, folder)
    if not loaded["tasks"]:
        raise ValueError("no task can be asked:\n" + "\n".join(_reasons(missing)))
    chosen = {name: _chosen(task, options.limit) for name, task in loaded["tasks"].items()}
    model = from_pretrained(folder, None, DTYPES[options.dtype], progress=Progress())
    samples, costs = {}, {}
    for name, method in methods.items():
        print(f"{name}: {sum(map(len, chosen.values()))} questions", file=sys.stderr, flush=True)
        lm = harness.HisaLM(
            model.with_method(method), batch_size=options.batch, chunk=options.chunk, progress=Progress()
        )
        samples[name], costs[name] = _ask(lm, loaded, chosen, options), lm.cost
    rows = results.rows_of(samples)
    for line in results.table(rows):
        print(line)
    for name, cost in costs.items():
        cut = f"; {cost.n_cut} contexts lost their beginning" if cost.n_cut else ""
        print(f"{name}: {cost.read:,} tokens read, {cost.made:,} made, {cost.seconds:.0f} s{cut}")
    print(f"In brackets 95 %; after the value the difference to {next(iter(methods))} on the same questions.")
    for line in _reasons(missing):
        print(line)
    if options.json:
        found = {"row": "evaluate", "checkpoint": folder.name, "dtype": options.dtype, "jax": jax.__version__,
                 "device": jax.devices()[0].device_kind, "methods": {name: str(m) for name, m in methods.items()},
                 "costs": {name: vars(cost) for name, cost in costs.items()}, "missing": missing,
                 "rows": results.json_of(rows)}  # fmt: skip
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    return int(bool(missing))


def _names(text: str, option: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names or len(set(names)) < len(names):
        raise UsageError(f"{option} {text}: wanted different names with commas between")
    return names


def _load(options: argparse.Namespace, folder: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """lm-eval's tasks and groups, and why those are missing that are."""
    from lm_eval.tasks import TaskManager

    metadata = {"checkpoint": str(folder), "tokenizer": str(folder), "text": options.text, "style": options.style,
                "seed": options.seed, "n": options.limit or needles.QUESTIONS}  # fmt: skip
    if options.lengths:
        metadata |= {"lengths": options.lengths, "max_seq_lengths": options.lengths}
    include = [str(path) for path in (TASKS, options.include) if path]
    manager = TaskManager(include_path=include, metadata=metadata)
    loaded: dict[str, Any] = {"tasks": {}, "groups": {}}
    missing: dict[str, str] = {}
    for name in _names(options.tasks, "--tasks"):
        for one in [f"needle_{kind}" for kind in needles.KINDS] if name == _NEEDLES else [name]:
            try:
                found = manager.load([one])
            except (KeyboardInterrupt, MemoryError):
                raise
            except Exception as error:  # packages and data that are not there fail in many ways
                if one.startswith("needle_"):
                    raise
                missing[one] = _reason(error)
                continue
            for part in loaded:
                loaded[part] |= found.get(part, {})
    for task in loaded["tasks"].values():
        _prepare(task, options)
    return loaded, missing


def _prepare(task: Any, options: argparse.Namespace) -> None:
    """Few-shot examples, as lm-eval's own command sets them."""
    own = task.get_config("num_fewshot")
    if options.num_fewshot is not None and own != 0:
        task.set_config(key="num_fewshot", value=options.num_fewshot)
    elif own is None:
        task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(seed=options.seed)


def _reason(error: BaseException) -> str:
    """The first error of a chain, in a line: it names the package or the data."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}"


def _reasons(missing: Mapping[str, str]) -> list[str]:
    return [f"not asked: {name}: {why}" for name, why in missing.items()]


def _chosen(task: Any, limit: int) -> list[int]:
    """The first questions of each length."""
    by_length: dict[Any, list[int]] = collections.defaultdict(list)
    for i, doc in enumerate(task.eval_docs):
        by_length[doc.get(results.LENGTH)].append(i)
    return sorted(i for of_length in by_length.values() for i in of_length[: limit or None])


def _ask(
    lm: Any, loaded: Mapping[str, Any], chosen: Mapping[str, Sequence[int]], options: argparse.Namespace
) -> dict[str, list[dict[str, Any]]]:
    """lm-eval's samples, by task."""
    from lm_eval.evaluator import evaluate

    found = evaluate(
        lm=lm, task_dict=dict(loaded), samples={name: list(ids) for name, ids in chosen.items()}, log_samples=True,
        bootstrap_iters=0, apply_chat_template=options.chat,
    )  # fmt: skip
    return found["samples"]
