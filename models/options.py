"""Options that several commands share: which checkpoint, by which indexer, and how tokens are taken."""

import argparse
from pathlib import Path

import jax.numpy as jnp
from jax.sharding import Mesh

from hisa_jax.command_line import UsageError, given_fields, indexer_name, method_fields
from hisa_jax.models.config import Config
from hisa_jax.models.methods import NAMES, make_method, read_methods
from hisa_jax.models.modeling import Model
from hisa_jax.models.overrides import add_override
from hisa_jax.models.params import from_pretrained
from hisa_jax.models.plan import MethodLike
from hisa_jax.models.progress import Progress
from hisa_jax.models.sampling import Sampling

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
CHECKPOINT = "folder with config.json and safetensors; bytes, the model in the repository; org/name on the Hub"


def add_model(command: argparse.ArgumentParser) -> None:
    """Checkpoint, indexer and dtype."""
    command.add_argument("--checkpoint", required=True, metavar="DIR", help=CHECKPOINT)
    add_override(command)
    command.add_argument(
        "--indexer",
        metavar="|".join([*NAMES, "FILE"]),
        type=indexer_name,
        help="flat is dsa, too; FILE: per-layer JSON; default: the checkpoint's own",
    )
    command.add_argument("--topk", type=int, help="tokens each query attends to; default: the checkpoint's")
    command.add_argument("--block-size", type=int, help="tokens a block, for hisa and block-sparse")
    command.add_argument("--block-topk", type=int, help="blocks kept, for hisa")
    command.add_argument("--block-ratio", type=int, help="for hisa: one block in so many is kept, up to --block-topk")
    command.add_argument("--candidates", type=int, help="tokens scored exactly, for scan; default: 4 times topk")
    command.add_argument("--exact-heads", type=int, help="heads scanned as they are, for scan; default: 4")
    command.add_argument("--unit", type=int, help="adjacent tokens that become candidates together, for scan")
    command.add_argument("--slopes", metavar="sampled|plain", help="of the virtual head, for scan")
    command.add_argument("--sketch", metavar="int4", help="what is scanned in place of the keys, for scan")
    command.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="default: %(default)s")


def method_of(options: argparse.Namespace, config: Config) -> MethodLike:
    """The method that the options name.

    Raises: UsageError: one that there is not, options that it does not have or take. ValueError: a file that is none.
    """
    if options.indexer not in (None, *NAMES):
        if given := given_fields(options):
            flags = ", ".join(f"--{name.replace('_', '-')}" for name in given)
            raise UsageError(f"{flags}: --indexer {options.indexer} is a file, which says all that its layers have")
        try:
            return read_methods(options.indexer, config)
        except FileNotFoundError as error:
            raise UsageError(f"--{error}") from error
    name = options.indexer or ("hisa" if config.use_hisa else "dsa")
    who = f"--indexer {name}" if options.indexer else f"the checkpoint's own indexer, {name},"
    given = method_fields(options, name, who)
    try:
        return make_method(name, config, "--indexer", **given)
    except ValueError as error:
        raise UsageError(str(error)) from error


def load(options: argparse.Namespace, folder: Path, config: Config, mesh: Mesh | None = None) -> Model:
    """The model that the options name, with signs of life on standard error."""
    method = method_of(options, config)
    return from_pretrained(folder, method, DTYPES[options.dtype], mesh, config=config, progress=Progress())


def add_sampling(command: argparse.ArgumentParser) -> None:
    """A field of `Sampling` each."""
    command.add_argument("--max-new-tokens", "--max-tokens", type=int, default=Sampling.max_tokens, metavar="N")
    command.add_argument("--temperature", type=float, default=0.0, help="0: the likeliest token")
    command.add_argument("--top-p", type=float, default=1.0, metavar="P", help="fewest tokens that reach it; 1: all")
    command.add_argument("--top-k", type=int, default=0, metavar="N", help="likeliest tokens to draw from; 0: all")
    command.add_argument("--min-p", type=float, default=0.0, metavar="P", help="times that of the likeliest")
    command.add_argument("--seed", type=int, default=0, help="of the draws, the same for every prompt")
    command.add_argument("--stop", action="append", metavar="TEXT", help="ends the answer, repeat for more")
    command.add_argument("--stop-id", action="append", type=int, metavar="ID", help="token that ends it, too")
    command.add_argument("--logprobs", type=int, metavar="N", help="show log probabilities, of N alternatives, too")
    command.add_argument("--ignore-eos", action="store_true", help="the checkpoint's stop tokens end nothing")


def sampling_of(options: argparse.Namespace) -> Sampling:
    """What `add_sampling` took. Raises UsageError: a value that `Sampling` does not take."""
    try:
        return Sampling(
            max_tokens=options.max_new_tokens, temperature=options.temperature, top_p=options.top_p,
            top_k=options.top_k, min_p=options.min_p, seed=options.seed, stop=tuple(options.stop or ()),
            stop_ids=tuple(options.stop_id or ()), logprobs=options.logprobs, ignore_eos=options.ignore_eos,
        )  # fmt: skip
    except ValueError as error:
        raise UsageError(str(error)) from error
