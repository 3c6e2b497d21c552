"""The command `chat`: messages from standard input, a line each; answers to standard output as they come."""

import argparse
import sys
from collections.abc import Iterator

from hisa_jax.command_line import UsageError, demand_at_least
from hisa_jax.models.chat import load_chat_template
from hisa_jax.models.config import read_config
from hisa_jax.models.engine import Engine
from hisa_jax.models.locate import locate
from hisa_jax.models.options import add_model, add_sampling, load, sampling_of
from hisa_jax.models.progress import Progress
from hisa_jax.models.tokens import load_tokenizer

_LENGTH = 4096


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `chat` takes."""
    add_model(parser)
    add_sampling(parser)
    parser.add_argument("--system", metavar="TEXT", help="the message that begins the conversation")
    parser.add_argument(
        "--max-length", type=int, metavar="N", help=f"tokens of the conversation (default: {_LENGTH}, or the model's)"
    )
    parser.add_argument(
        "--chunk", type=int, default=256, metavar="N", help="prompt tokens a step (default: %(default)s)"
    )
    parser.set_defaults(run=run, max_new_tokens=256)


def run(options: argparse.Namespace) -> int:
    """Answers until there are no more messages; 1 if one of them had no room."""
    demand_at_least(options, chunk=1, max_length=1)
    folder = locate(options.checkpoint)
    config = read_config(folder, options.override)
    sampling, tokenizer = sampling_of(options), load_tokenizer(folder, config.vocab_size)
    template = load_chat_template(folder)
    if template is None:
        raise ValueError(f"{folder}: has no chat template, as chat_template.jinja: generate continues plain text")
    room = config.max_position_embeddings
    length = min(_LENGTH, room) if options.max_length is None else options.max_length
    if length > room:
        raise UsageError(f"--max-length {length}: wanted at most {room}, the model's positions")
    model = load(options, folder, config)
    # A conversation is what its answer is made from and, one message later, what the next one shares its pages with.
    n_pages = 2 * (-(-length // model.page_size) + 1)
    engine = Engine(
        model, n_pages=n_pages, rows=1, prefill_rows=1, max_length=length, chunk=options.chunk, tokenizer=tokenizer
    )
    engine.warm_up(Progress())
    messages = [] if options.system is None else [{"role": "system", "content": options.system}]
    status = 0
    for said in _messages():
        asked = [*messages, {"role": "user", "content": said}]
        try:
            id = engine.submit(tokenizer.encode(template.render(asked), add_special=False), sampling=sampling)
        except ValueError as error:  # the conversation goes on without it
            print(f"error: {error}", file=sys.stderr)
            status = 1
            continue
        parts = []
        for piece in engine.stream(id):
            if piece.error is not None:
                raise FloatingPointError(f"chat: {piece.error}")
            parts.append(piece.text)
            print(piece.text, end="", flush=True)
        print()
        messages = [*asked, {"role": "assistant", "content": "".join(parts)}]
    return status


def _messages() -> Iterator[str]:
    is_terminal = sys.stdin.isatty()
    while True:
        try:
            line = input("> ") if is_terminal else sys.stdin.readline()
        except EOFError:
            return
        if not line and not is_terminal:
            return
        if line.strip():
            yield line.rstrip("\n")
