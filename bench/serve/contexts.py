"""Long contexts by a few layers of a published model at its real widths, on one device or a mesh, by each method.

    time to first token     of a prompt alone, from `submit` on
    time per output token   of a step in which all requests decode
    tokens a second         of all requests together in such steps

Weights and prompts are random: what is measured is the engine and its passes. Methods share the weights. On NVIDIA GPUs
one decode step is also looked at by the profiler: the first device's kernels, and what of the step is none of them.
"""

import dataclasses
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from rich.console import Console

from bench import UserError
from bench.gpu.span import by_jax
from bench.records import device
from hisa_jax import models
from hisa_jax.models.config import Config
from hisa_jax.models.engine import Engine
from hisa_jax.models.methods import make_method
from hisa_jax.models.sharding import size_of

CONFIGS = {"deepseek-v3.2": models.dsv32, "glm-5": models.glm5}
METHODS = ("dsa", "hisa", "scan")
_KERNELS_SHOWN = 6


@dataclasses.dataclass(frozen=True, kw_only=True)
class Load:
    """What is served: so many requests in each group of devices, of a context: prompt and `n_new` tokens.

    Pages are of `page_size` tokens, None: of as many as the model has by itself.
    """

    context: int
    requests: int
    n_new: int
    chunk: int
    page_size: int | None = None


def run(
    name: str, layers: int, contexts: list[int], methods: Sequence[str], load: Load, mesh: Mesh | None, seed: int,
    out: Path | None, console: Console,
) -> int:  # fmt: skip
    """Every method at every context, a line each; `load.context` is replaced."""
    config = cut(CONFIGS[name](), layers)
    if max(contexts) > config.max_position_embeddings:
        raise UserError(f"--contexts={max(contexts)}, wanted at most {config.max_position_embeddings} for {name}")
    model = models.from_config(config, rngs=nnx.Rngs(seed), dtype=jnp.bfloat16, mesh=mesh)
    rows: list[dict[str, Any]] = []
    for context in contexts:
        for method in methods:
            made = model.with_method(make_method(method, config))
            if load.page_size is not None:
                made = made.with_page_size(load.page_size)
            row = measured(made, dataclasses.replace(load, context=context), seed)
            shape = None if mesh is None else dict(mesh.shape)
            what = {"row": "serve_contexts", "config": name, "layers": layers, "indexer": method, "mesh": shape}
            rows.append({**what, **device(), **row})
            console.print("\n".join(lines(rows[-1])), highlight=False, markup=False, soft_wrap=True)
            if out:  # after each, since the machine may be taken away
                out.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


def cut(config: Config, layers: int) -> Config:
    """The first layers, index keys as servers have them: e4m3, after the rotation that spreads outliers."""
    if not 1 <= layers <= config.num_hidden_layers:
        raise UserError(f"--layers={layers}, wanted 1 to {config.num_hidden_layers}")
    return dataclasses.replace(
        config, num_hidden_layers=layers, layer_kinds=config.layer_kinds[:layers],
        indexer_kinds=config.indexer_kinds[:layers], index_key_dtype="float8_e4m3fn", index_hadamard=True,
    )  # fmt: skip


def measured(model: models.Model, load: Load, seed: int) -> dict[str, Any]:
    """The figures of one method at one context."""
    n_groups = size_of(model.mesh, "data")
    n_together = load.requests * n_groups
    rng = np.random.default_rng(seed)
    prompts = rng.integers(0, model.config.vocab_size, (n_together, load.context - load.n_new)).tolist()
    start, _ = read(model, load, prompts[:1], n_groups)
    first_s = time.perf_counter() - start
    # Prompts of one length that are read together begin to decode together.
    _, engine = read(model, load, prompts, n_together)
    seconds, kernels = list[float](), dict[str, float]()
    while len(seconds) < load.n_new - 3:  # the first token is there, the last step is left out, one may be profiled
        start = time.perf_counter()
        engine.step()
        seconds.append(time.perf_counter() - start)
    if jax.default_backend() == "gpu":
        kernels = kernels_of(engine)
    step_s = float(np.median(seconds))
    return {
        **dataclasses.asdict(load) | {"page_size": model.page_size}, "time_to_first_token_s": first_s,
        "prompt_tokens_per_s": len(prompts[0]) / first_s, "requests_together": n_together,
        "time_per_output_token_s": step_s, "tokens_per_s": n_together / step_s, "kernels_ms": kernels,
    }  # fmt: skip


def read(model: models.Model, load: Load, prompts: list[list[int]], rows: int) -> tuple[float, Engine]:
    """An engine of so many rows that has just made a token of every prompt, and when they were submitted."""
    n_devices = size_of(model.mesh, "context")
    # Each device has room for its part of every request of its group, and for a page to copy.
    per_round = model.stripe * n_devices
    per_request = -(-load.context // per_round) * per_round // model.page_size + n_devices
    sizes: Any = dict(
        n_pages=per_request * rows, rows=rows, prefill_rows=rows, max_length=load.context, chunk=load.chunk
    )
    engine = Engine(model, **sizes)
    engine.warm_up()
    start = time.perf_counter()
    for prompt in prompts:
        engine.submit(prompt, load.n_new, ())
    requests = list(engine.scheduler.waiting.values())
    while any(request.n_made == 0 for request in requests):
        engine.step()
    return start, engine


def kernels_of(engine: Engine) -> dict[str, float]:
    """Milliseconds of a step by kernel on the first GPU, the longest first after what lies between them."""

    def step() -> None:
        engine.step()

    events = by_jax(step)
    each: dict[str, float] = {}
    for event in events:
        each[event.name] = each.get(event.name, 0.0) + (event.end - event.start) / 1e6
    idle = (max(event.end for event in events) - events[0].start) / 1e6 - sum(each.values())
    return {"between kernels": max(idle, 0.0)} | dict(sorted(each.items(), key=lambda item: -item[1]))


def lines(row: dict[str, Any]) -> Iterator[str]:
    mesh = "" if row["mesh"] is None else ", mesh " + ", ".join(f"{k}={v}" for k, v in row["mesh"].items())
    yield (
        f"{row['config']}, {row['layers']} layers, {row['context']} tokens, {row['indexer']}{mesh}: "
        f"{row['time_to_first_token_s']:.3f} s to the first token, "
        f"{row['time_per_output_token_s'] * 1e3:.2f} ms a step of {row['requests_together']} requests, "
        f"{row['tokens_per_s']:.1f} tokens/s"
    )
    if kernels := row["kernels_ms"]:
        shown = list(kernels.items())[:_KERNELS_SHOWN]
        yield "  of a decode step: " + ", ".join(f"{name} {ms:.3f} ms" for name, ms in shown)
