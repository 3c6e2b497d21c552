"""`python -m bench indexers`: indexers over pools trained beside the byte model, and options of indexers together.

    train       indexers over pools of 4 tokens for every layer, into --out/MODEL_TYPE.npz
    pools       flat, HISA and the scan over these pools
    random      the same over pools at 1M tokens, of random normal queries and keys at published sizes
    composed    flat, HISA and the scan of the model's own indexers, each alone and with each option (rules.py)

With --saved FILE.npz (saved.py) the options are compared on what another model's indexers were given, and nothing
else. Rows go to --out/indexers.json, a table to the screen and to --out/indexers.md.
"""

import argparse
import functools
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

import hisa_jax as hj
from bench import UserError, options, shapes
from bench.indexers import measure, saved, training
from bench.indexers.model import SIZES, Pools, Runner, random_pools
from bench.indexers.rules import Rule, composed
from bench.indexers.tables import tables
from bench.quality.answers import multikey_samples
from bench.quality.command import corpus_of
from bench.quality.model import BYTES, load
from bench.records import device, plain
from bench.smollm2.training import load as load_leaves
from bench.smollm2.training import save as save_leaves
from hisa_jax.models.training.text import Corpus

PARTS = ("train", "pools", "random", "composed")
_KEYS = 32  # statements of a sample, of which it asks for 16; fewer in a short one
_COMPARED = 2  # samples whose choices are compared
_RANDOM = 2**20  # tokens of random data
_POOLED = 8  # entries of a block, which hold the 32 tokens of the model's HISA


def add_arguments(parser: argparse.ArgumentParser) -> None:
    whole = options.whole
    parser.add_argument("--part", choices=PARTS, nargs="+", default=PARTS, metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--checkpoint", type=Path, default=BYTES, metavar="DIR", help="default: the byte model")
    parser.add_argument("--corpus", type=Path, metavar="FILE.npz", help="default: this machine's text, read now")
    parser.add_argument("--out", type=Path, default=Path("indexers_out"), metavar="DIR", help="default: %(default)s")
    parser.add_argument("--models", choices=SIZES, nargs="+", default=list(SIZES), help="whose indexers over pools")
    parser.add_argument("--context", type=whole(1024, 16384), default=4096, metavar="N", help="default: %(default)s")
    parser.add_argument("--samples", type=whole(1, 1000), default=2, metavar="N", help="of text with questions")
    parser.add_argument("--queries", type=whole(8, 4096), default=256, metavar="N", help="compared in a sample")
    parser.add_argument("--steps", type=whole(1, 100_000), default=300, metavar="N", help="of training")
    parser.add_argument("--minutes", type=options.positive, metavar="M", help="an indexer: no rule begins later")
    parser.add_argument(
        "--saved", type=Path, nargs="+", metavar="FILE.npz", help="compare on queries and keys of another model"
    )
    parser.add_argument("--window", type=whole(512, 16384), default=2048, metavar="N", help="tokens of a step")


def run(args: argparse.Namespace) -> int:
    if args.saved:
        return _compare_saved(args)
    if not args.checkpoint.is_dir():
        raise UserError(f"--checkpoint {args.checkpoint}: no such folder")
    if args.window % 4:
        raise UserError(f"--window {args.window}: wanted whole pools of 4 tokens")
    args.out.mkdir(parents=True, exist_ok=True)
    stacked, corpus = load(args.checkpoint), corpus_of(args.corpus)
    topk, H = stacked.config.index_topk, stacked.config.index_n_heads
    rows: list[dict[str, Any]] = []
    about = {
        "checkpoint": args.checkpoint.name, "corpus": corpus.sha256, "topk": topk, "heads": H, "context": args.context,
        "samples": args.samples, "queries": args.queries, **device(),
    }  # fmt: skip

    def add(row: dict[str, Any]) -> None:
        rows.append(row)
        print(" ".join(f"{name}={_short(x)}" for name, x in row.items() if not isinstance(x, list)), flush=True)
        (args.out / "indexers.json").write_text(json.dumps(about | {"rows": plain(rows, digits=5)}, indent=1) + "\n")
        (args.out / "indexers.md").write_text(tables(rows))

    for model_type in args.models:
        file, pools = args.out / f"{model_type}.npz", random_pools(model_type, stacked.config, seed=0)
        if "train" in args.part:
            recipe = training.Recipe(T=args.window, steps=args.steps)
            pools = training.train(stacked, pools, corpus, recipe, functools.partial(_report, add, model_type))
            save_leaves(file, pools.layers)
        if "pools" in args.part:
            if not file.is_file():
                raise UserError(f"{file}: no such file, wanted --part train before")
            pools = Pools(pools.graph, load_leaves(file, pools.layers))
            compare(args, Runner(stacked, pools), corpus, of_pools(topk, *SIZES[model_type][::2]), model_type, add)
    for model in (shapes.GLM53_FLASH, shapes.QSA) if "random" in args.part else ():
        for row in measure.random_recalls(model, of_pools(model.topk * 4, model.H, 4, model.block_size), _RANDOM, 16):
            add({"part": "random", "indexer": f"{model.name}, random", **row})
    if "composed" in args.part:
        # MISA's router pools 1024 tokens, of 128K; the model's longest context is an eighth of that.
        rules = composed(topk, 32, topk * 4 // 32, H, router_block=128)
        compare(args, Runner(stacked), corpus, rules, "own", add, H)
    return 0


def _compare_saved(args: argparse.Namespace) -> int:
    """A query takes one key in 64, as 2048 of 128K; heads are chosen by 128 means."""
    layers = saved.read(args.saved)
    (_, S, _), H = next(iter(layers.values())).k.shape, next(iter(layers.values())).here.q.shape[2]
    if S < 256 or H < 4:
        raise UserError(f"--saved: {S} keys and {H} heads, wanted at least 256 and 4")
    topk, found = S // 64, list[dict[str, Any]]()
    args.out.mkdir(parents=True, exist_ok=True)
    for row in saved.rows(layers, composed(topk, topk // 4, 16, H, router_block=S // 128)):
        found.append(row)
        print(" ".join(f"{name}={_short(x)}" for name, x in row.items()), flush=True)
        about = {"topk": topk, "keys": S, "heads": H, **device()}
        (args.out / "indexers.json").write_text(json.dumps(about | {"rows": plain(found, digits=5)}, indent=1) + "\n")
    return 0


def of_pools(topk: int, H: int, r: int, block_size: int = _POOLED) -> tuple[Rule, ...]:
    """Flat, HISA with 4 topk candidates and the scan over pools of r tokens, of indexers with H heads."""
    keys: dict[str, Any] = dict(topk=topk // r, entry_size=r, tail="open")
    blocks = 4 * topk // r // block_size
    scans = ((0, 4), (1, 2), (1, 4), (2, 2)) if H < 8 else ((0, 4), (1, 4), (4, 2), (4, 4))
    return (
        Rule(name="flat", method=hj.Dsa(**keys)),
        Rule(name="HISA", method=hj.Hisa(**keys, block_size=block_size, block_topk=blocks)),
        *(
            Rule(
                name=f"scan, {exact} exact heads, {times} k",
                method=hj.Scan(**keys, candidates=times * topk // r, exact_heads=exact),
            )
            for exact, times in scans
        ),
    )


def compare(
    args: argparse.Namespace, runner: Runner, corpus: Corpus, rules: Sequence[Rule], indexer: str, add: Any,
    H: int | None = None,
) -> None:  # fmt: skip
    """Answers, bits and recall of each rule and, given the heads, what it costs: a row as it comes."""
    samples = multikey_samples(corpus, args.context, args.samples, min(_KEYS, args.context // 80))
    if jax.default_backend() == "gpu":  # a CPU has no core to spare
        for rule in rules:
            runner.prepare(args.context, (rule,))
            measure.prepare_like(runner, rule, args.context, samples[0], args.queries)

    def name(rule: Rule) -> dict[str, Any]:
        return {"part": "composed" if H else "pools", "indexer": indexer, "method": rule.name}

    compared, flat = measure.references(runner, samples[:_COMPARED], rules[0], args.queries), None
    start = time.monotonic()
    for rule in rules:
        if args.minutes is not None and time.monotonic() - start > 60 * args.minutes:
            print(f"{indexer}: {rule.name} and what follows it are left out, for want of time")
            break
        found = measure.read(runner, samples, rule)
        flat = flat or found
        cost = measure.costs(rule, args.context, H) if H else {}
        shares = measure.recall(runner, rule, compared)
        add({**name(rule), **measure.beside(found, flat), **cost, **shares, "seconds": time.monotonic() - start})


def _report(add: Any, model_type: str, step: int, kl: float) -> None:
    add({"part": "train", "indexer": model_type, "step": step, "kl": kl})


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
