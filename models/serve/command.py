"""The command `serve`: loads, compiles, serves until it is told to stop."""

import argparse
import gc
import logging
import signal
from pathlib import Path
from typing import Any

from hisa_jax.checks import optional_packages
from hisa_jax.command_line import UsageError, demand_at_least
from hisa_jax.models.chat import load_chat_template
from hisa_jax.models.config import read_config
from hisa_jax.models.drafts import lookup
from hisa_jax.models.engine import Engine
from hisa_jax.models.locate import locate
from hisa_jax.models.options import add_model, load
from hisa_jax.models.progress import Progress
from hisa_jax.models.tokens import load_tokenizer

_LENGTH = 4096


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `serve` takes; needs the extra `serve` to run."""
    parser.set_defaults(run=run)
    add_model(parser)
    parser.add_argument("--host", default="127.0.0.1", help="default: %(default)s, this machine alone")
    parser.add_argument("--port", type=int, default=8000, help="default: %(default)s; 0: any that is free")
    parser.add_argument("--model-name", metavar="NAME", help="that clients send; default: the folder's")
    parser.add_argument("--api-key", action="append", metavar="KEY", help="one that clients send, repeat for more")
    parser.add_argument("--api-key-file", type=Path, metavar="FILE", help="keys, one a line: not seen in `ps`")
    parser.add_argument("--rows", type=int, default=8, metavar="N", help="requests at a time (default: %(default)s)")
    parser.add_argument(
        "--max-length",
        type=int,
        metavar="N",
        help=f"tokens of a request (default: {_LENGTH}, or the model's positions)",
    )
    parser.add_argument("--pages", type=int, metavar="N", help="of each layer (default: for all rows at full length)")
    parser.add_argument(
        "--chunk", type=int, default=256, metavar="N", help="prompt tokens a step (default: %(default)s)"
    )
    parser.add_argument("--draft", type=int, default=0, metavar="N", help="tokens to propose by looking them up")
    parser.add_argument("--max-waiting", type=int, default=64, metavar="N", help="requests (default: %(default)s)")
    parser.add_argument(
        "--grace",
        type=int,
        default=30,
        metavar="SECONDS",
        help="to finish requests when stopped (default: %(default)s)",
    )


def run(options: argparse.Namespace) -> None:
    """Serves until SIGINT or SIGTERM, then finishes what runs, and cancels what is left after `--grace` seconds."""
    demand_at_least(options, max_waiting=0, grace=0)
    with optional_packages():
        import uvicorn

        from hisa_jax.models.serve.app import Server

    folder = locate(options.checkpoint)
    config = read_config(folder, options.override)
    tokenizer = load_tokenizer(folder, config.vocab_size)
    template = load_chat_template(folder)
    keys = _keys(options)
    progress = Progress()
    model = load(options, folder, config)
    max_length = min(_LENGTH, config.max_position_embeddings) if options.max_length is None else options.max_length
    n_pages = options.pages
    if n_pages is None:  # and one more a row, for a copy
        n_pages = options.rows * (-(-max_length // model.page_size) + 1)
    engine = Engine(
        model, n_pages=n_pages, rows=options.rows, max_length=max_length, chunk=options.chunk, tokenizer=tokenizer,
        draft=lookup if options.draft else None, n_draft=options.draft,
    )  # fmt: skip
    engine.warm_up(progress)
    name = options.model_name or folder.resolve().name
    server = Server(engine, name, template=template, api_keys=keys, most_waiting=options.max_waiting)
    # A full garbage collection stops every thread. What loading and compiling left stays until the end, and to go
    # through it, 340,000 objects of the byte model, took 290 ms: so it is never gone through again.
    gc.collect()
    gc.freeze()

    class Announcing(uvicorn.Server):
        async def startup(self, sockets: Any = None) -> None:
            await super().startup(sockets)
            if self.started:
                host, port = self.servers[0].sockets[0].getsockname()[:2]
                print(f"serving {name} on http://{host}:{port}", flush=True)

    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
    uvicorn_config = uvicorn.Config(
        server.application(), host=options.host, port=options.port, log_level="warning",
        timeout_graceful_shutdown=options.grace, access_log=False,
    )  # fmt: skip
    # It ends itself by the signal that stopped it, when all is done; there is something to say after that.
    for one in (signal.SIGINT, signal.SIGTERM):
        signal.signal(one, lambda *_: None)
    Announcing(uvicorn_config).run()
    print(f"stopped: {engine.pool.n_free} of {n_pages} pages are free", flush=True)


def _keys(options: argparse.Namespace) -> list[str]:
    keys = list(options.api_key or ())
    if options.api_key_file is not None:
        found = [line.strip() for line in options.api_key_file.read_text().splitlines() if line.strip()]
        if not found:  # else everybody would be served
            raise ValueError(f"--api-key-file {options.api_key_file}: has no key")
        keys += found
    if not all(keys):
        raise UsageError("--api-key '': wanted one that is not empty")
    return keys
