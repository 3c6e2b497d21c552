"""The command `check`: arguments, what it refuses, a progress bar, the report."""

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import hisa_jax as hj
from hisa_jax.command_line import UsageError, demand_at_least
from hisa_jax.models.check import report
from hisa_jax.models.check.measures import Measured, fewest_candidates, measure, methods_to_check, scan_ranks
from hisa_jax.models.check.reading import read, sampled_positions
from hisa_jax.models.config import Config, read_config
from hisa_jax.models.locate import locate
from hisa_jax.models.modeling import Model
from hisa_jax.models.overrides import add_override
from hisa_jax.models.params import from_pretrained
from hisa_jax.models.sharding import make_mesh
from hisa_jax.models.tokens import Tokenizer, load_tokenizer

Show = Callable[[str, int, int], None]
_TIMES_TOPK = 64  # context by default: as 128K tokens are to 2048
_CHARACTERS = 64  # of a token, at most: no more of a long file is read
_DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `check` takes; needs rich to run."""
    parser.set_defaults(run=run)
    parser.add_argument("--checkpoint", required=True, type=Path, metavar="DIR", help="config.json and safetensors")
    add_override(parser)
    parser.add_argument(
        "--text", required=True, type=Path, metavar="FILE", help="UTF-8, of the kind that matters to you"
    )
    parser.add_argument(
        "--context", type=int, metavar="N",
        help=f"tokens of the text to read (default: {_TIMES_TOPK} times topk, as far as text and model go)",
    )  # fmt: skip
    parser.add_argument("--topk", type=int, metavar="K", help="tokens each query selects (default: the checkpoint's)")
    parser.add_argument(
        "--queries", type=int, default=256, metavar="N",
        help="evenly spaced over the last half of the tokens (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--block-size", type=int, metavar="N",
        help="tokens of a block of HISA and block-sparse (default: topk / 16, at most 128); HISA has 4 topk candidates",
    )  # fmt: skip
    parser.add_argument(
        "--chunk", type=int, default=512, metavar="N", help="tokens a forward pass (default: %(default)s)"
    )
    parser.add_argument("--dtype", choices=_DTYPES, default="bfloat16", help="default: %(default)s")
    parser.add_argument("--model-parallel", type=int, default=1, metavar="N", help="devices the weights are split over")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every layer's figures")


def run(options: argparse.Namespace) -> None:
    """Reads the text, measures layer by layer, shows."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    demand_at_least(options, context=1, topk=1, queries=1, block_size=1, chunk=1)
    if options.json and not options.json.parent.is_dir():  # before the run, not after it
        raise UsageError(f"--json {options.json}: {options.json.parent} is no folder")
    folder = locate(options.checkpoint)
    config = read_config(folder, options.override)
    topk = config.index_topk if options.topk is None else options.topk
    if options.block_size is not None and options.block_size > 2 * topk:
        raise UsageError(f"--block-size {options.block_size}: wanted at most {2 * topk}, twice topk")
    methods = methods_to_check(topk, options.block_size)
    tokens = _tokens(options, load_tokenizer(folder, config.vocab_size), config, topk)
    mesh = None if options.model_parallel == 1 else make_mesh(1, options.model_parallel)
    model = from_pretrained(folder, methods["flat"], _DTYPES[options.dtype], mesh, config=config)
    console = Console()
    if not console.is_terminal:
        console.width = 120
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task("reading", total=len(tokens))

        def show(what: str, done: int, total: int) -> None:
            progress.update(bar, description=what, completed=done, total=total)

        data = check(model, tokens, methods, options, show)
    for part in (report.table(data["methods"]), *report.sentences(data)):
        console.print(part, highlight=False, markup=False, soft_wrap=isinstance(part, str))
    if options.json:
        report.write(options.json, data)
        console.print(f"Written: {options.json}", highlight=False, markup=False, soft_wrap=True)


def check(
    model: Model, tokens: list[int], methods: dict[str, hj.Method], options: argparse.Namespace, progress: Show
) -> dict[str, Any]:
    """All that is shown and written; `progress` is told what is done, how much of it, and of how much."""
    flat = methods["flat"]
    assert isinstance(flat, hj.Dsa)
    positions = sampled_positions(len(tokens), options.queries)
    layers: dict[int, dict[str, Measured]] = {}
    ranks: dict[int, np.ndarray] = {}
    n_layers = model.config.indexer_kinds.count("full")
    for seen in read(model, tokens, positions, options.chunk, lambda n: progress("reading", n, len(tokens))):
        progress("comparing, layer by layer", len(layers), n_layers)
        layers[seen.layer] = measure(seen, methods, model.config.softmax_scale)
        if not math.isfinite(layers[seen.layer]["flat"].mass):
            raise FloatingPointError(f"check: the attention of layer {seen.layer} is not finite (NaN or infinity)")
        ranks[seen.layer] = scan_ranks(seen, flat)
    by_layer = {layer: fewest_candidates(of, report.SHARE, flat.topk) for layer, of in ranks.items()}
    return {
        "row": "check", "checkpoint": options.checkpoint.name, "text": options.text.name, "tokens": len(tokens),
        "topk": flat.topk, "queries": len(positions), "dtype": options.dtype, "platform": jax.default_backend(),
        "device": jax.devices()[0].device_kind, "jax": jax.__version__, "methods": report.rows_of(methods, layers),
        "fewest_candidates": {
            "share": report.SHARE, "all": fewest_candidates(np.concatenate([*ranks.values()]), report.SHARE, flat.topk),
            **report.summary(by_layer, max),
        },
    }  # fmt: skip


def _tokens(options: argparse.Namespace, tokenizer: Tokenizer, config: Config, topk: int) -> list[int]:
    """Ids of as much of the text as is to be read."""
    longest, wanted = config.max_position_embeddings, options.context
    if wanted is not None and wanted > longest:
        raise UsageError(f"--context {wanted}: wanted at most {longest}, the positions of the model")
    if wanted is not None and wanted < 2 * topk:
        raise UsageError(f"--context {wanted}: wanted at least {2 * topk}, twice topk, else there is little to choose")
    context = min(longest, _TIMES_TOPK * topk) if wanted is None else wanted
    if context < 2 * topk:
        raise UsageError(f"--topk {topk}: wanted at most {longest // 2}, half of the model's positions")
    least = 2 * topk if wanted is None else wanted
    try:
        with options.text.open(encoding="utf-8") as file:
            tokens = tokenizer.encode(file.read(_CHARACTERS * context))
    except UnicodeDecodeError:
        raise ValueError(f"--text {options.text}: wanted a text in UTF-8") from None
    if len(tokens) < least:
        raise ValueError(f"--text {options.text}: {len(tokens):,} tokens, wanted at least {least:,}: give more text")
    return tokens[:context]
