"""`python -m bench quality --model smollm2`: trains indexers for a real language model, measures the methods on it."""

import argparse
import dataclasses
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench import options
from bench.smollm2 import joint, page, training
from bench.smollm2.fetch import TEXT, default_cache, fetch, gguf_file
from bench.smollm2.gguf_file import read_tokenizer, read_weights
from bench.smollm2.indexers import random_indexers
from bench.smollm2.lab import SIZES, Data, Lab, Rows, Size, load_data, save_data
from bench.smollm2.methods import answering, fitting
from bench.smollm2.model import Config
from bench.smollm2.programs import Programs
from bench.smollm2.prompts import FORMS, make_prompts
from bench.smollm2.text import read_text

PARTS = ("data", "train", "compare", "answer", "joint", "adversary", "page")
DEFAULT = ("train", "compare", "answer", "adversary", "page")


def add_arguments(parser: argparse._ArgumentGroup) -> None:
    parser.add_argument("--cache", type=Path, metavar="DIR", help="of downloads (default: in the user's cache folder)")
    parser.add_argument(
        "--tokens", type=Path, metavar="FILE.npz", help="made where there is none yet (default: in --out, by size)"
    )
    parser.add_argument("--gguf", type=Path, metavar="FILE", help="the model (default: fetched)")
    parser.add_argument("--heads", type=options.whole(1, 256), nargs="+", metavar="N", help="index heads, in turn")
    parser.add_argument("--seeds", type=options.whole(0, 1 << 30), nargs="+", default=[0], metavar="N", help="in turn")
    parser.add_argument("--steps", type=options.whole(1, 1 << 20), metavar="N", help="of the indexers' training")
    parser.add_argument(
        "--queries", type=options.whole(1, 8192), metavar="N", help="of a window that train the indexers"
    )
    parser.add_argument("--compare-at", type=options.whole(1, 1 << 20), nargs="*", default=[], metavar="STEP")
    parser.add_argument("--joint-steps", type=options.whole(1, 1 << 20), default=1000, metavar="N")
    parser.add_argument(
        "--methods", type=options.whole(0, 100), metavar="N", help="of the part answer (default: those of the size)"
    )
    parser.add_argument("--load", type=Path, metavar="DIR", help="trained indexers to go on from")
    parser.add_argument("--save", type=Path, metavar="DIR", help="where trained indexers go")
    parser.add_argument("--until", type=options.positive, metavar="SECONDS", help="begin nothing later than this")


def run(args: argparse.Namespace) -> int:
    start = time.monotonic()
    args.part = args.part or list(DEFAULT)
    size, parts = SIZES[args.size], args.part
    if set(parts) - {"page"}:
        cache = args.cache or default_cache()
        gguf = args.gguf or gguf_file(cache)
        data = _data(args.tokens or args.out / f"tokens-{args.size}.npz", cache, gguf, size)
        if set(parts) - {"page", "data"}:
            _measure(args, size, data, gguf, start)
    if "page" in parts:
        rows = page.read(args.out / "smollm2.jsonl")
        (args.out / "smollm2.md").write_text(page.markdown(rows))
        print(f"Written: {args.out / 'smollm2.md'}")
    return 0


def _measure(args: argparse.Namespace, size: Size, data: Data, gguf: Path, start: float) -> None:
    config = Config()
    dtype = jnp.bfloat16 if jax.default_backend() == "gpu" else jnp.float32
    weights = read_weights(gguf, config, dtype)
    rows = Rows(args.out / "smollm2.jsonl")
    programs = Programs()
    until = start + (args.until or float("inf"))
    about: dict[str, Any] = {"size": args.size, "device": jax.devices()[0].device_kind, "jax": jax.__version__}
    for H in args.heads or [size.H]:
        methods = dict(list(fitting(answering(size.topk), H, size.T).items())[: args.methods or size.methods])
        for seed in args.seeds:
            indexers = random_indexers(jax.random.key(seed), config, H)
            about |= {"heads": H, "seed": seed}
            lab = Lab(config, weights, data, size, rows, until, indexers, programs, dict(about))
            lab.prepare(args.part, methods)
            _one(args, lab, methods)


def _one(args: argparse.Namespace, lab: Lab, methods: dict[str, Any]) -> None:
    """All parts for indexers of one kind and seed."""
    parts, size = args.part, lab.size
    H, seed = lab.about["heads"], lab.about["seed"]
    name = f"heads{H}-seed{seed}.npz"
    n_queries = args.queries or min(256, size.T // 4)
    recipe = training.Recipe(T=size.T, n_queries=n_queries, steps=args.steps or size.steps, seed=seed)
    lab.about |= {"queries": recipe.n_queries, "schedule": recipe.steps}
    load, save = (folder and folder / name for folder in (args.load, args.save))
    if save is not None:
        save.parent.mkdir(parents=True, exist_ok=True)
    if "train" in parts:
        lab.train(recipe, load, save, args.compare_at)
    elif load is not None:
        state = training.load(load, training.first_state(lab.config, H, recipe))
        lab.indexers = state.indexers
        lab.about["step"] = int(state.step)
    if "joint" in parts:
        lab.train_jointly(_joint_recipe(recipe, args.joint_steps, size))
    if "compare" in parts and lab.has_time():
        lab.compare()
    if "answer" in parts:
        lab.answer(methods)
    if "adversary" in parts and seed == args.seeds[0] and lab.has_time():
        lab.oppose()


def _joint_recipe(recipe: training.Recipe, steps: int, size: Size) -> joint.Recipe:
    """At half of the window and of the tokens selected, so that their ratio stays."""
    return joint.Recipe(
        T=size.T // 2, topk=size.topk // 2, steps=steps, seed=recipe.seed, n_queries=recipe.n_queries
    )  # fmt: skip


def _data(file: Path, cache: Path, gguf: Path, size: Size) -> Data:
    """What lies in `file`, made and kept there if it does not."""
    if file.is_file():
        return load_data(file, size)
    tokenizer = read_tokenizer(gguf)
    text = read_text(fetch(TEXT, cache), tokenizer)
    T, n_code = size.T, size.windows // 3
    windows = [text.prose[i * T : (i + 1) * T] for i in range(size.windows - n_code)]
    windows += [text.code[i * T : (i + 1) * T] for i in range(n_code)]
    # Short prompts have no room for lines stated several times.
    forms = FORMS if T >= 4096 else [dataclasses.replace(form, asked=2, times=1) for form in FORMS]
    data = Data(text.train, np.stack(windows), make_prompts(tokenizer, text.filler, T, size.prompts, forms))
    save_data(file, data)
    return data
