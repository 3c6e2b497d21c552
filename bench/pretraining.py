"""What a checkpoint of the byte model keeps under block means: answers, bits and recall at ratios of 1 in 2 to 1 in 16.

A ratio is how many tokens of the context there are for each that HISA scores exactly. "More bits" are those beyond the
flat indexer's, window by window. Made for the arms of `hisa_jax.models.training.arms`: see docs/lighthouse.md. A part
that is done is written at once.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import hisa_jax as hj
from bench import UserError, options
from bench.quality.agreement import agreement_rows
from bench.quality.answers import bits_rows, most_keys, multikey_rows, multikey_samples, needle_rows
from bench.quality.command import corpus_of
from bench.quality.model import load
from bench.quality.tables import excess
from bench.quality.variants import FLAT, Variant
from bench.records import device, plain

RATIOS = (16, 8, 4, 2)
_DENSE = "dense"
_DEPTHS = tuple(i / 10 for i in range(11))
_MEASURES = ("recall", "mass")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="DIR")
    parser.add_argument("--corpus", type=Path, metavar="FILE.npz", help="default: this machine's text, read now")
    whole = options.whole
    parser.add_argument("--context", type=whole(1024, 16384), default=16384, metavar="N", help="default: %(default)s")
    parser.add_argument("--samples", type=whole(1, 1000), default=16, metavar="N", help="default: %(default)s")
    parser.add_argument("--queries", type=whole(2, 4096), default=128, metavar="N", help="compared in a sample")
    parser.add_argument("--keys", type=whole(2, 64), nargs="+", default=(8, 32), metavar="N", help="of multi-key tasks")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all rows there")


def variants(topk: int, context: int, block_size: int = 32) -> tuple[Variant, ...]:
    """Flat, HISA at each ratio that leaves it at least topk tokens, and all tokens."""
    kept = {ratio: context // (ratio * block_size) for ratio in RATIOS}
    return (
        Variant(name=FLAT, method=hj.Dsa(topk=topk)),
        *(
            Variant(name=f"HISA 1 in {ratio}", method=hj.Hisa(topk=topk, block_size=block_size, block_topk=n))
            for ratio, n in kept.items()
            if n * block_size >= topk and n >= 2
        ),
        Variant(name=_DENSE, method=hj.Dsa(topk=context)),
    )


def run(args: argparse.Namespace) -> int:
    if not args.checkpoint.is_dir():
        raise UserError(f"--checkpoint {args.checkpoint}: no such folder")
    stacked = load(args.checkpoint)
    corpus = corpus_of(args.corpus)
    topk, n, context = stacked.config.index_topk, args.samples, args.context
    flat, *others = variants(topk, context)
    rows: list[dict[str, Any]] = []
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)

    def add(part: str, method: str, found: list[dict[str, Any]]) -> None:
        rows.extend({"part": part, "context": context, "method": method} | row for row in found)
        for row in found:
            print(f"{part:<9} {row.get('method', method):<14} {line(row)}", flush=True)
        if args.json:
            args.json.write_text(json.dumps(device() | {"rows": plain(rows, digits=6)}, indent=1) + "\n")

    for variant in (flat, *others):
        add("multikey", variant.name, multikey_rows(stacked, corpus, variant, context, n, args.keys))
        add("needle", variant.name, needle_rows(stacked, corpus, variant, context, _DEPTHS, -(-n // 4)))
        add("bits", variant.name, bits_rows(stacked, corpus, variant, context, n)[-1:])
        more = None if variant == flat else excess(rows, variant.name, part="bits")
        if more is not None:
            add("more bits", variant.name, [dict(zip(("bits", "low", "high"), more, strict=True))])
    samples = multikey_samples(corpus, context, -(-n // 4), most_keys(context, args.keys))
    found = agreement_rows(stacked, samples, flat, (flat, *others[:-1]), args.queries, topk)
    add("layers", "", [row for row in found if row["measure"] in _MEASURES and row["method"] != FLAT])
    return 0


def line(row: dict[str, Any]) -> str:
    """What is printed of a row."""
    if "accuracy" in row:
        of = f"{row['n_keys']} keys" if "n_keys" in row else f"depth {row['depth']}"
        return f"{of}: {row['right']} of {row['n']} answered"
    if "bits" in row:
        return f"{row['bits']:.4f} bits a byte [{row['low']:.4f}, {row['high']:.4f}]"
    return f"layer {row['layer']}, {row['queries']}: {row['measure']} {row['mean']:.4f}"
