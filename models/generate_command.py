"""The command `generate`: continues prompts, prints the answers, and on standard error what they cost."""

import argparse
import sys
from collections.abc import Sequence

from hisa_jax.command_line import UsageError, demand_at_least
from hisa_jax.models.config import read_config
from hisa_jax.models.generate import Generation, generate
from hisa_jax.models.json_object import shown
from hisa_jax.models.locate import locate
from hisa_jax.models.options import add_model, add_sampling, load, sampling_of
from hisa_jax.models.progress import Progress
from hisa_jax.models.sampling import Logprobs
from hisa_jax.models.sharding import make_mesh
from hisa_jax.models.tokens import load_tokenizer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `generate` takes."""
    parser.set_defaults(run=run)
    add_model(parser)
    prompts = parser.add_mutually_exclusive_group(required=True)
    prompts.add_argument("--prompt", action="append", metavar="TEXT", help="repeat for a batch")
    prompts.add_argument("--prompt-ids", action="append", metavar="1,2,3", help="token ids; prints ids, too")
    add_sampling(parser)
    parser.add_argument("--chunk", type=int, default=512, help="prompt tokens a forward pass")
    parser.add_argument("--data-parallel", type=int, default=1, metavar="N", help="devices the batch is split over")
    parser.add_argument("--model-parallel", type=int, default=1, metavar="N", help="devices the weights are split over")
    parser.add_argument("--warm-up", action="store_true", help="run twice, so that tokens/s leave compilation out")
    parser.add_argument("--report-recall", action="store_true", help="compare each selection with the flat indexer's")


def run(options: argparse.Namespace) -> None:
    """Generates, prints the answers, and what they cost on standard error."""
    demand_at_least(options, chunk=1, data_parallel=1, model_parallel=1)
    folder = locate(options.checkpoint)
    config = read_config(folder, options.override)
    sampling = sampling_of(options)
    prompts: list = [_ids(text) for text in options.prompt_ids] if options.prompt_ids else options.prompt
    if not options.prompt_ids:
        tokenizer = load_tokenizer(folder, config.vocab_size)
        prompts = [tokenizer.encode(text) for text in prompts]  # refused before the weights are read
    devices = options.data_parallel, options.model_parallel
    mesh = None if devices == (1, 1) else make_mesh(*devices)
    model = load(options, folder, config, mesh)
    for _ in range(2 if options.warm_up else 1):
        result = generate(
            model, prompts, sampling=sampling, chunk=options.chunk, report_recall=options.report_recall,
            tokenizer=None if options.prompt_ids else tokenizer, progress=Progress(),
        )  # fmt: skip
    for answer in [",".join(map(str, tokens)) for tokens in result.tokens] if options.prompt_ids else result.texts:
        print(answer)
    for row, logprobs in enumerate(result.logprobs):
        _show_logprobs(row, logprobs)
    _report(result, options.warm_up)


def _ids(text: str) -> list[int]:
    try:
        return [int(token) for token in text.split(",")]
    except ValueError:
        raise UsageError(f"--prompt-ids: {shown(text)}, wanted token ids with commas between, as 1,2,3") from None


def _show_logprobs(row: int, logprobs: Sequence[Logprobs]) -> None:
    if logprobs:
        print(f"prompt {row}: token, its log probability, the likeliest in its place", file=sys.stderr)
    for one in logprobs:
        top = ", ".join(f"{token} {value:.3f}" for token, value in one.top)
        print(f"{one.token:>8} {one.logprob:>8.3f}  {top}".rstrip(), file=sys.stderr)


def _report(result: Generation, is_warm: bool) -> None:
    new = sum(map(len, result.tokens))
    print(
        f"prefill {result.prompt_tokens} tokens, {result.prefill_rate:.1f} tokens/s; "
        f"decode {new} tokens, {result.decode_rate:.1f} tokens/s"
        f"{'' if is_warm else ' (compilation included)'}",
        file=sys.stderr,
    )
    if not result.recall:
        return
    print("recall against the flat indexer, where more than topk tokens are visible", file=sys.stderr)
    print(f"{'layer':>5} {'prefill':>8} {'decode':>8}", file=sys.stderr)
    for layer, pair in enumerate(zip(result.recall["prefill"], result.recall["decode"], strict=True)):
        cells = " ".join(f"{'-' if value is None else format(value, '.4f'):>8}" for value in pair)
        print(f"{layer:>5} {cells}", file=sys.stderr)
